"""What the image classifiers share: embed -> trunk -> head, their loss, and their score at every depth."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acn_scale.models.base import Model
from acn_scale.models.trunk import Readouts


class Classifier(Model):
    """Subclasses set `embed`, `trunk` and `head`."""

    # (num_classes,) the task of each class, where a sample's task is known: its class is one of that task's. With a
    # linear head that is a head for each task.
    tasks: Tensor | None = None

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """images: (batch, channels, height, width), labels: (batch,) classes or (batch, num_classes) shares of each.

        Returns "logits" (batch, num_classes) and, with labels, "loss", the mean cross-entropy.
        """
        x = self.embed(images)
        if labels is None:
            return {"logits": self.head(self.trunk(x, read=self.read(x)))}
        return self.supervised(x, None, self.read(x), lambda logits: self.loss(logits, labels))

    def read(self, x: Tensor) -> Tensor | None:
        """x: (batch, tokens, dim) -> (batch, read): numbers of the tokens that the trunk need give; None: all."""
        return None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """() mean cross-entropy."""
        return F.cross_entropy(self.possible(logits, labels), labels, label_smoothing=self.label_smoothing)

    def possible(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits in fp32, -inf for classes of other tasks."""
        if self.tasks is None:
            return logits.float()
        return logits.float().masked_fill(self.tasks != self.tasks[labels][:, None], -torch.inf)

    def readouts(self, images: Tensor, labels: Tensor | None = None) -> Readouts:
        """The same -> logits (batch, num_classes) at each depth 0, 1, ..., in one pass.

        Samples can leave on the way, as in Trunk.states().
        """
        return self.trunk.readouts(self.embed(images), head=self.head)

    def score(self, logits: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits: (batch, num_classes), labels: (batch,) -> "loss" and "accuracy" of each sample: (batch,)."""
        logits = self.possible(logits, labels)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": (logits.argmax(dim=-1) == labels).float(),
        }
