"""How blocks are joined: one small class per pattern, and Trunk, the only loop over depth.

Notation: f_i is block i, x_0 the embedding, x_i what block i + 1 gets. A cut at depth k is always the same readout
after k blocks, so a pattern is three answers: the state before the first block, the state after a block, and what
the trunk would output if it ended here.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

State = tuple[Tensor, ...]
Readouts = Generator[Any, Tensor | None, None]  # what it is sent picks the samples that go on


class Connectivity(nn.Module):
    """The join after block `index`. The trunk calls it, so that ZeRO-3 gathers its parameters; use them only there."""

    def __init__(self, dim: int, index: int) -> None:
        super().__init__()

    @staticmethod
    def start(x: Tensor) -> State:
        """x: (batch, tokens, dim) -> the state before the first block; state[0] is always the next block's input."""
        return (x,)

    def forward(self, state: State, y: Tensor) -> State:
        """state before the block and the block's output y: (batch, tokens, dim) -> state after the block."""
        raise NotImplementedError

    @staticmethod
    def readout(state: State) -> Tensor:
        """state -> (batch, tokens, dim): the trunk's output if it is cut here."""
        return state[0]


class Feedforward(Connectivity):
    """x_i = f_i(x_{i-1}); output x_L."""

    def forward(self, state: State, y: Tensor) -> State:
        return (y,)


class Residual(Connectivity):
    """x_i = x_{i-1} + f_i(x_{i-1}); output x_L (He et al. 2016)."""

    def forward(self, state: State, y: Tensor) -> State:
        return (state[0] + y,)


class AutoCompressing(Connectivity):
    """x_i = f_i(x_{i-1}); output x_0 + x_1 + ... + x_L (Dorovatas et al. 2025, Eq. 1).

    The sum is kept in fp32 at least: in bf16 its rounding error grows with depth.
    """

    @staticmethod
    def start(x: Tensor) -> State:
        return (x, x.to(torch.promote_types(x.dtype, torch.float32)))

    def forward(self, state: State, y: Tensor) -> State:
        return (y, state[1] + y)

    @staticmethod
    def readout(state: State) -> Tensor:
        return state[1].to(state[0].dtype)


class DetachedAutoCompressing(AutoCompressing):
    """As AutoCompressing, but no gradient flows from a block into the one below it (Dorovatas et al. 2025, Fig. 2).

    Each block then learns through its own direct path to the output alone. The first block still trains the embedding:
    a class token's readout would reach no patch directly.
    """

    def forward(self, state: State, y: Tensor) -> State:
        return (y.detach(), state[1] + y)


class Highway(Connectivity):
    """x_i = g f_i(x_{i-1}) + (1 - g) x_{i-1}, g = sigmoid(W x_{i-1} + b), b = -2 at first (Srivastava et al. 2015)."""

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.gate = nn.Linear(dim, dim)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, state: State, y: Tensor) -> State:
        return (torch.lerp(state[0], y, self.gate(state[0]).sigmoid()),)


class Dense(Connectivity):
    """x_i = W_i [v_0; ...; v_i], v_i = f_i(x_{i-1}), v_0 = x_0; output x_L (after Huang et al. 2017).

    W_i starts as a row of identities: at first the pattern is Residual.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.mix = nn.Linear((index + 2) * dim, dim, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(dim).repeat(1, index + 2))

    @staticmethod
    def start(x: Tensor) -> State:
        return (x, x)

    def forward(self, state: State, y: Tensor) -> State:
        outputs = (*state[1:], y)
        return (self.mix(torch.cat(outputs, dim=-1)), *outputs)


class DenseFormer(Connectivity):
    """x_i = sum_j a_ij v_j, v_i = f_i(x_{i-1}), v_0 = x_0; output x_L (Pagliardini et al. 2024).

    a_i starts as (0, ..., 0, 1): at first the pattern is Feedforward.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.weight = nn.Parameter(torch.eye(index + 2)[-1].clone())

    @staticmethod
    def start(x: Tensor) -> State:
        return (x, x)

    def forward(self, state: State, y: Tensor) -> State:
        outputs = (*state[1:], y)
        mixed = sum(weight * x for weight, x in zip(self.weight, outputs, strict=True))
        return (mixed, *outputs)


CONNECTIVITY: dict[str, type[Connectivity]] = {
    "feedforward": Feedforward,
    "residual": Residual,
    "acn": AutoCompressing,
    "acn_detached": DetachedAutoCompressing,
    "highway": Highway,
    "dense": Dense,
    "denseformer": DenseFormer,
}


def patterns(connectivity: str, inner: str) -> tuple[str, str]:
    """The pattern between blocks and the one between a block's sublayers, with inner = "auto" resolved.

    The standard residual transformer has a skip round each sublayer and none round the block; DenseFormer keeps
    those skips inside its blocks; the others stand between blocks without skips.
    """
    if inner != "auto":
        return connectivity, inner
    usual = {"residual": ("feedforward", "residual"), "denseformer": ("denseformer", "residual")}
    return usual.get(connectivity, (connectivity, "feedforward"))


def drop(before: State, after: State, rate: float) -> State:
    """Have each sample pass the block by with probability `rate`: its state stays what it was before.

    Every block is computed all the same, so that all ranks gather the same weights. For patterns that carry x past the
    block in a state of one tensor: residual and highway.
    """
    passes = torch.rand(len(after[0]), 1, 1, device=after[0].device) < rate
    return (torch.where(passes, before[0], after[0]),)


class Trunk(nn.Module):
    """Blocks and the joins between them. A block is itself a Trunk of two sublayers with a pattern of its own.

    A block is called as block(x, mask). `norms` follow each join (post-LN); they take patterns whose state is one
    tensor: feedforward, residual, highway.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        connectivity: str,
        dim: int,
        *,
        norms: Sequence[nn.Module] = (),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.pattern = CONNECTIVITY[connectivity]
        self.blocks = nn.ModuleList(blocks)
        self.joins = nn.ModuleList(self.pattern(dim, index) for index in range(len(self.blocks)))
        self.norms = nn.ModuleList(norms)
        self.recompute = recompute
        self.drop_rates: Sequence[float] = ()  # of each block, in training; empty: no block is dropped

    def states(
        self, x: Tensor, mask: Tensor | None = None, view: Callable[[State], Any] = lambda state: state
    ) -> Readouts:
        """x: (batch, tokens, dim) -> view(state) at depth 0, 1, ..., number of blocks.

        What is sent to it, an index into the batch such as a (batch,) bool, picks the samples that go on.
        """
        state = self.pattern.start(x)
        for index, (block, join) in enumerate(zip(self.blocks, self.joins, strict=True)):
            keep = yield view(state)
            if keep is not None:
                state = tuple(part[keep] for part in state)
                mask = mask if mask is None else mask[keep]
            before = state
            if self.recompute and self.training:
                y = checkpoint(block, state[0], mask, use_reentrant=False)
            else:
                y = block(state[0], mask)
            state = join(state, y)
            if self.norms:
                state = (self.norms[index](state[0]),)
            if self.training and self.drop_rates:
                state = drop(before, state, self.drop_rates[index])
        yield view(state)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, tokens, dim) -> (batch, tokens, dim)."""
        *_, state = self.states(x, mask)
        return self.pattern.readout(state)

    def readouts(
        self, x: Tensor, mask: Tensor | None = None, head: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Readouts:
        """x: (batch, tokens, dim) -> head(output (batch, tokens, dim)) at each depth 0, 1, ..., in one pass.

        Samples can leave on the way, as in states().
        """
        return self.states(x, mask, lambda state: head(self.pattern.readout(state)))

    def truncate(self, depth: int) -> None:
        """Drop the blocks above `depth`: forward(x) is then the former readouts(x)[depth].

        Raises ValueError for a depth outside 0 ... number of blocks.
        """
        if not 0 <= depth <= len(self.blocks):
            raise ValueError(f"depth {depth}: must be 0 to {len(self.blocks)}, the number of blocks")
        self.blocks, self.joins, self.norms = self.blocks[:depth], self.joins[:depth], self.norms[:depth]
