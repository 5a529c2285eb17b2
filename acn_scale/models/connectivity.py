"""How blocks are joined: one small class per pattern.

Notation: f_i is block i, x_0 the embedding, x_i what block i + 1 gets, v_i the output of block i, v_0 = x_0. A cut at
depth k is always the same readout after k blocks, so a pattern is three answers: the state before the first block, the
state after a block, and what the trunk would output if it ended here.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from acn_scale.models.tokens import take

State = tuple[Tensor, ...]
Block = Callable[..., Tensor]


class Connectivity(nn.Module):
    """The join at block `index`. The trunk calls it, so that ZeRO-3 gathers its parameters; use them only there."""

    first_is_input = True  # whether state[0] is what a block is given

    def __init__(self, dim: int, index: int) -> None:
        super().__init__()

    @staticmethod
    def start(x: Tensor) -> State:
        """x: (batch, tokens, dim) -> the state before the first block. Of all its tensors axis 0 is the batch."""
        return (x,)

    def forward(self, state: State, block: Block) -> State:
        """state before the block, and the block, (batch, tokens, dim) -> the same -> state after the block."""
        raise NotImplementedError

    @staticmethod
    def readout(state: State) -> Tensor:
        """state -> (batch, tokens, dim): the trunk's output if it is cut here."""
        return state[0]

    @staticmethod
    def at(state: State, read: Tensor) -> State:
        """The state of some tokens alone; read: (batch, read), their numbers. What attention looks at stays whole."""
        return tuple(take(part, read) for part in state)


class Feedforward(Connectivity):
    """x_i = f_i(x_{i-1}); output x_L."""

    def forward(self, state: State, block: Block) -> State:
        return (block(state[0]),)


class Residual(Connectivity):
    """x_i = x_{i-1} + f_i(x_{i-1}); output x_L (He et al. 2016, arXiv 1512.03385)."""

    def forward(self, state: State, block: Block) -> State:
        return (state[0] + block(state[0]),)


class AutoCompressing(Connectivity):
    """x_i = f_i(x_{i-1}); output x_0 + x_1 + ... + x_L (Dorovatas et al. 2025, arXiv 2506.09714, Eq. 1).

    With a share a of the short connections, x_i = v_i + a x_{i-1}, and the output is still v_0 + v_1 + ... + v_L: a = 1
    is Residual (the same, app. D). The sum is kept in fp32 at least: in bf16 its rounding error grows with depth.
    """

    short = 0.0  # a, which a run may bring down from 1 (train.anneal)

    @staticmethod
    def start(x: Tensor) -> State:
        return (x, x.to(torch.promote_types(x.dtype, torch.float32)))

    def forward(self, state: State, block: Block) -> State:
        x, total = state
        y = block(x)
        return (y + self.short * x if self.short else y, total + y)

    @staticmethod
    def readout(state: State) -> Tensor:
        return state[1].to(state[0].dtype)


class DetachedAutoCompressing(AutoCompressing):
    """As AutoCompressing, but no gradient flows from a block into the one below it (the same, Fig. 2).

    Each block then learns through its own direct path to the output alone. The first block still trains the embedding:
    a class token's readout would reach no patch directly.
    """

    def forward(self, state: State, block: Block) -> State:
        y = block(state[0])
        return (y.detach(), state[1] + y)


class ScaledAutoCompressing(AutoCompressing):
    """As AutoCompressing, with output x_0 + x_1 / sqrt(1) + ... + x_L / sqrt(L).

    One factor for the whole sum, such as 1 / L, would change nothing where the head begins with a LayerNorm.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.scale = (index + 1) ** -0.5

    def forward(self, state: State, block: Block) -> State:
        y = block(state[0])
        return (y, state[1] + self.scale * y)


class HybridAutoCompressing(AutoCompressing):
    """x_i = v_i + g x_{i-1}, of sublayers, g learned, one for both of a block, 0.75 at first; output v_0 + ... + v_L.

    H-ACN, from the code that the ACN's authors published beside arXiv 2506.09714. g = 1 is Residual, g = 0
    AutoCompressing. A gate for each sublayer would leave the last one without use.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.gate = nn.Parameter(torch.tensor([0.75])) if index % 2 == 0 else None

    def forward(self, state: State, block: Block) -> State:
        x, total, *gate = state
        if self.gate is not None:
            gate = [self.gate * torch.ones_like(x[:, :1, :1])]  # no view of it, which counting FLOPs stumbles over
        carried = gate[0] * x  # before the block: recomputing ends with it then, and ZeRO-3 does not drop its weights
        y = block(x)
        return (y + carried, total + y, *gate)

    @staticmethod
    def at(state: State, read: Tensor) -> State:
        return (*AutoCompressing.at(state[:2], read), *state[2:])


class Highway(Connectivity):
    """x_i = g v_i + (1 - g) x_{i-1}, g = sigmoid(W x_{i-1} + b), b = -2 at first; output x_L.

    Srivastava et al. 2015, arXiv 1505.00387.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.gate = nn.Linear(dim, dim)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, state: State, block: Block) -> State:
        (x,) = state
        return (torch.lerp(x, block(x), self.gate(x).sigmoid()),)


class LayerScale(Connectivity):
    """x_i = x_{i-1} + diag(s_i) v_i; output x_L (Touvron et al. 2021, arXiv 2103.17239).

    s is 1e-4 at first, as in the ViTs of the same authors' DeiT III (arXiv 2204.07118).
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.scale = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, state: State, block: Block) -> State:
        return (state[0] + self.scale * block(state[0]),)


class ReZero(Connectivity):
    """x_i = x_{i-1} + a_i v_i, a_i = 0 at first; output x_L (Bachlechner et al. 2020, arXiv 2003.04887).

    There it takes the place of LayerNorm, here it stands beside it: the blocks are those of the twins.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, state: State, block: Block) -> State:
        return (state[0] + self.scale * block(state[0]),)


class ValueResidual(Connectivity):
    """Residual round each sublayer, and from block 2 on attention takes (V_1 + V_i) / 2 for its values V_i; output x_L.

    ResFormer (Zhou et al. 2024, arXiv 2410.17897). The sublayers are an attention, whose output comes with V_1, and an
    MLP in turn.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.attends = index % 2 == 0

    def forward(self, state: State, block: Block) -> State:
        x, *values = state
        if self.attends:
            y, *values = block(x, *values)
        else:
            y = block(x)
        return (x + y, *values)

    @staticmethod
    def at(state: State, read: Tensor) -> State:
        return (take(state[0], read), *state[1:])


class Dense(Connectivity):
    """x_i = W_i [v_0; ...; v_i]; output x_L (after Huang et al. 2017, arXiv 1608.06993).

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

    def forward(self, state: State, block: Block) -> State:
        outputs = (*state[1:], block(state[0]))
        return (self.mix(torch.cat(outputs, dim=-1)), *outputs)


class DenseFormer(Connectivity):
    """x_i = sum_j a_ij v_j; output x_L (Pagliardini et al. 2024, arXiv 2402.02622).

    a_i starts as (0, ..., 0, 1): at first the pattern is Feedforward.
    """

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        self.weight = nn.Parameter(torch.eye(index + 2)[-1].clone())

    @staticmethod
    def start(x: Tensor) -> State:
        return (x, x)

    def forward(self, state: State, block: Block) -> State:
        outputs = (*state[1:], block(state[0]))
        mixed = sum(weight * x for weight, x in zip(self.weight, outputs, strict=True))
        return (mixed, *outputs)


class HyperConnections(Connectivity):
    """H_i = A_i^T H_{i-1} + b_i v_i, v_i = f_i(a_i^T H_{i-1}), for streams H of (n, dim), n = 4, all x_0 at first.

    Static hyper-connections (Zhu et al. 2024, arXiv 2409.19606): A starts as the identity, b as ones, and a picks
    stream i mod n, which is Residual. The output is the mean of the streams; the sum there is the same to a head that
    begins with a LayerNorm.
    """

    streams = 4
    first_is_input = False

    def __init__(self, dim: int, index: int) -> None:
        super().__init__(dim, index)
        identity = torch.eye(self.streams)
        self.into = nn.Parameter(identity[index % self.streams].clone())  # a
        self.across = nn.Parameter(identity.flatten())  # A, as a vector: without weight decay, as they all are there
        self.out = nn.Parameter(torch.ones(self.streams))  # b

    @staticmethod
    def start(x: Tensor) -> State:
        return (x[:, None].expand(-1, HyperConnections.streams, -1, -1),)

    def forward(self, state: State, block: Block) -> State:
        (streams,) = state
        y = block(torch.einsum("n,bntd->btd", self.into, streams))
        across = self.across.view(self.streams, self.streams)
        return (torch.einsum("nm,bntd->bmtd", across, streams) + self.out[:, None, None] * y[:, None],)

    @staticmethod
    def readout(state: State) -> Tensor:
        return state[0].mean(dim=1)


class Through(Connectivity):
    """Of blocks that join their own sublayers: the state goes through them, and they give the state after them."""

    def forward(self, state: State, block: Block) -> State:
        return block(state)


CONNECTIVITY: dict[str, type[Connectivity]] = {
    "feedforward": Feedforward,
    "residual": Residual,
    "acn": AutoCompressing,
    "acn_detached": DetachedAutoCompressing,
    "acn_scaled": ScaledAutoCompressing,
    "h_acn": HybridAutoCompressing,
    "highway": Highway,
    "layer_scale": LayerScale,
    "rezero": ReZero,
    "layernorm_scaling": Residual,  # what is scaled is the LayerNorm of its blocks
    "value_residual": ValueResidual,
    "dense": Dense,
    "denseformer": DenseFormer,
    "hyper": HyperConnections,
}
# Variants of the residual network, which has a skip round each sublayer: they join the sublayers of all blocks. As in
# the config, which this cannot import: exported networks take this file with them, alone.
OF_SUBLAYERS = ("h_acn", "layer_scale", "rezero", "layernorm_scaling", "value_residual", "hyper")


def patterns(connectivity: str, inner: str) -> tuple[str, str]:
    """The pattern between blocks and the one between a block's sublayers, with inner = "auto" resolved.

    The second is "through" where the first goes on through the blocks and joins their sublayers. The standard residual
    transformer has a skip round each sublayer and none round the block; DenseFormer keeps those skips inside its
    blocks; most others stand between blocks without skips.
    """
    if inner != "auto":
        return connectivity, inner
    if connectivity in OF_SUBLAYERS:
        return connectivity, "through"
    usual = {"residual": ("feedforward", "residual"), "denseformer": ("denseformer", "residual")}
    return usual.get(connectivity, (connectivity, "feedforward"))
