"""What the image classifiers share: embed -> trunk -> head, their loss, and their score at every depth."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Subclasses set `embed`, `trunk` and `head`."""

    embed: nn.Module
    trunk: nn.Module
    head: nn.Module

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """images: (batch, channels, height, width), labels: (batch,) classes or (batch, num_classes) shares of each.

        Returns "logits" (batch, num_classes) and, with labels, "loss", the mean cross-entropy.
        """
        logits = self.head(self.trunk(self.embed(images)))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)}

    def readouts(self, images: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
        """The same -> logits (batch, num_classes) at each depth 0, 1, ..., in one pass."""
        for x in self.trunk.readouts(self.embed(images)):
            yield self.head(x)

    def score(self, logits: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits: (batch, num_classes), labels: (batch,) -> "loss" and "accuracy" of each sample: (batch,)."""
        return {
            "loss": F.cross_entropy(logits.float(), labels, reduction="none"),
            "accuracy": (logits.argmax(dim=-1) == labels).float(),
        }
