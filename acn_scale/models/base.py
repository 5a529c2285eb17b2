"""What all models are: embed -> trunk -> one head, which reads out at every depth and can be trained at every depth."""

from collections.abc import Callable, Sequence
from itertools import islice

from torch import Tensor, nn

from acn_scale.models.tokens import take
from acn_scale.models.trunk import Trunk


class Model(nn.Module):
    """Subclasses set `embed`, `trunk` and `head`."""

    embed: nn.Module
    trunk: Trunk
    head: nn.Module
    # In training: of the losses at depth 1, 2, ..., number of blocks, the last above 0; empty: of full depth alone.
    loss_weights: Sequence[float] = ()

    def supervised(
        self, x: Tensor, mask: Tensor | None, read: Tensor | None, loss: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """x: (batch, tokens, dim), embedded; read: (batch, read), numbers of the tokens that the head takes, None
        for all; loss: of logits.

        Returns "logits" at full depth and "loss", in training the sum of the losses at every depth, by their weights.
        The head is left out where a weight is 0.
        """
        if not (self.training and self.loss_weights):
            logits = self.head(self.trunk(x, mask, read))
            return {"logits": logits, "loss": loss(logits)}
        total = 0.0
        outputs = islice(self.trunk.readouts(x, mask), 1, None)
        for weight, output in zip(self.loss_weights, outputs, strict=True):
            if weight:
                logits = self.head(output if read is None else take(output, read))
                total = total + weight * loss(logits)
        return {"logits": logits, "loss": total}
