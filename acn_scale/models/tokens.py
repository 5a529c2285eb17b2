"""Some of a batch's tokens: those of these numbers, or all but padding."""

from typing import NamedTuple

import torch
from torch import Tensor


def take(x: Tensor, read: Tensor) -> Tensor:
    """x: (batch, tokens, ...), read: (batch, read), numbers of tokens -> (batch, read, ...)."""
    index = read.view(*read.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def first_token(x: Tensor) -> Tensor:
    """x: (batch, tokens, ...) -> (batch, 1): its number in each sample."""
    return x.new_zeros(x.shape[0], 1, dtype=torch.long)


class Layout(NamedTuple):
    """Where the tokens of a batch lie: all that is computed token by token is of one sequence of them, end to end."""

    mask: Tensor  # (batch, tokens), False at padding, which no sequence begins with
    places: Tensor  # (total,), of each token in the flattened mask

    @classmethod
    def of(cls, mask: Tensor) -> "Layout":
        """mask: (batch, tokens)."""
        return cls(mask, mask.flatten().nonzero()[:, 0])

    def flat(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, ...) -> (1, total, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def padded(self, x: Tensor) -> Tensor:
        """x: (1, total, dim) -> (batch, tokens, dim), 0 at padding."""
        batch, tokens = self.mask.shape
        return x.new_zeros(batch * tokens, x.shape[-1]).index_copy_(0, self.places, x[0]).view(batch, tokens, -1)

    def firsts(self) -> Tensor:
        """(1, batch): the number of each sequence's first token."""
        lengths = self.mask.sum(1)
        return (lengths.cumsum(0) - lengths)[None]


Mask = Tensor | Layout  # what a trunk hands on to what looks at other tokens; (batch, tokens), False at padding
