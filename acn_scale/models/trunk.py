"""The only loop over depth: blocks, joined by a pattern."""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acn_scale.models.connectivity import CONNECTIVITY, State, Through
from acn_scale.models.tokens import Mask, take

Readouts = Generator[Any, Tensor | None, None]  # what it is sent picks the samples that go on


def drop(before: State, after: State, rate: float) -> State:
    """Have each sample pass the block by with probability `rate`: its state stays what it was before.

    Every block is computed all the same, so that all ranks gather the same weights. For patterns that carry x past the
    block and nothing beside it.
    """
    passes = torch.rand(len(after[0]), 1, 1, device=after[0].device) < rate
    return (torch.where(passes, before[0], after[0]),)


class Trunk(nn.Module):
    """Blocks and the joins between them. A block is itself a Trunk of two sublayers with a pattern of its own.

    A block is called as block(x, mask). With `through`, the pattern goes on through the blocks, as block(state, mask):
    they are trunks of the same pattern with `within`, the number of sublayers below them. `looks`: which of the blocks
    is the last to look at other tokens: the last of all, and the first of a block's sublayers.
    `norms` follow each join (post-LN), on state[0], for patterns that carry one stream there and no sum beside it.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        connectivity: str,
        dim: int,
        *,
        norms: Sequence[nn.Module] = (),
        recompute: bool = False,
        through: bool = False,
        within: int | None = None,
        looks: int = -1,
    ) -> None:
        super().__init__()
        self.pattern = CONNECTIVITY[connectivity]
        self.blocks = nn.ModuleList(blocks)
        join, first = Through if through else self.pattern, within or 0
        self.joins = nn.ModuleList(join(dim, first + index) for index in range(len(self.blocks)))
        self.norms = nn.ModuleList(norms)
        self.recompute = recompute
        self.through, self.looks = through, looks
        self.is_inner = within is not None  # and not the number: blocks that are alike are compiled once
        self.drop_rates: Sequence[float] = ()  # of each block, in training; empty: no block is dropped

    def states(
        self,
        state: State,
        mask: Mask | None = None,
        view: Callable[[State], Any] = lambda state: state,
        read: Tensor | None = None,
    ) -> Readouts:
        """state before the first block -> view(state) at depth 0, 1, ..., number of blocks.

        read: as in forward(); after the block that `looks`, the state is of those tokens alone. What is sent to it, an
        index into the batch such as a (batch,) bool, picks the samples that go on.
        """
        for index, (block, join) in enumerate(zip(self.blocks, self.joins, strict=True)):
            keep = yield view(state)
            if keep is not None:
                state = tuple(part[keep] for part in state)
                mask = mask if mask is None else mask[keep]
            run = partial(self._run, block, mask)
            if read is not None and index == self.looks % len(self.blocks):
                run = partial(run, whole=state if self.through else state[0], read=read)
                state = self.pattern.at(state, read)
            before = state
            state = join(state, run)
            if self.norms:
                state = (self.norms[index](state[0]), *state[1:])
            if self.training and self.drop_rates:
                state = drop(before, state, self.drop_rates[index])
        yield view(state)

    def _run(
        self,
        block: nn.Module,
        mask: Mask | None,
        x: Tensor | State,
        *more: Tensor,
        whole: Tensor | State | None = None,
        **read: Tensor,
    ) -> Any:
        """whole: what the block is given where x is of the tokens to read alone."""
        x = x if whole is None else whole
        if self.recompute and self.training:
            return checkpoint(block, x, mask, *more, use_reentrant=False, **read)
        return block(x, mask, *more, **read)

    def forward(self, x: Tensor | State, mask: Mask | None = None, read: Tensor | None = None) -> Tensor | State:
        """x: (batch, tokens, dim) -> (batch, tokens, dim); within another trunk, its state -> its state.

        read: (batch, read), numbers of the tokens that are wanted -> (batch, read, dim). For the others, nothing is
        computed that only the output needs: most of the last block.
        """
        first = x if self.is_inner else self.pattern.start(x)
        early = read is not None and self.pattern.first_is_input and len(self.blocks) > 0
        for each in self.states(first, mask, read=read if early else None):
            state = each  # none of those before it, a running sum each, is kept
        if self.is_inner:
            return state
        out = self.pattern.readout(state)
        return out if read is None or early else take(out, read)

    def readouts(
        self, x: Tensor, mask: Tensor | None = None, head: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Readouts:
        """x: (batch, tokens, dim) -> head(output (batch, tokens, dim)) at each depth 0, 1, ..., in one pass.

        Samples can leave on the way, as in states().
        """
        return self.states(self.pattern.start(x), mask, lambda state: head(self.pattern.readout(state)))

    def truncate(self, depth: int) -> None:
        """Drop the blocks above `depth`: forward(x) is then the former readouts(x)[depth].

        Raises ValueError for a depth outside 0 ... number of blocks.
        """
        if not 0 <= depth <= len(self.blocks):
            raise ValueError(f"depth {depth}: must be 0 to {len(self.blocks)}, the number of blocks")
        self.blocks, self.joins, self.norms = self.blocks[:depth], self.joins[:depth], self.norms[:depth]
