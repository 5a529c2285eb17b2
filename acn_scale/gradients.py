"""What a block's gradient is made of: what comes straight from the output, and what comes through later blocks; and
the 1-D linear network, where all of it is known in closed form.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acn_scale.models.base import Model
from acn_scale.models.connectivity import Feedforward
from acn_scale.models.trunk import Trunk
from acn_scale.optim import part_of


@dataclass(frozen=True)
class Split:
    """L2 norms of the gradient of one part's weights, of its direct part and of the rest, and the cosine of the first
    two, nan where one of them is 0."""

    full: float
    direct: float
    mediated: float
    cosine: float


def split_gradients(model: Model, batch: dict[str, Tensor]) -> dict[str, Split]:
    """Of one batch's loss, for the parts "embed", "block_01", ..., "head".

    FG = DG + NG (Dorovatas et al. 2025, section 2): the direct part DG of a block is what reaches it by the paths that
    lead through no later block: in an ACN from the sum, in a residual network by the skips. Blocks without either get
    nothing so, but for the last. It takes a pass for each block. The model is in eval() for it, or dropout would differ
    between passes. One process, no ZeRO.
    """
    was_training = model.training
    model.eval()
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    full = dict(zip(parts, _gradients(model, batch, parts.values()), strict=True))
    splits = {}
    for part, parameters in parts.items():
        direct = full[part]
        if part != "head":
            later = model.trunk.blocks[int(part[6:]) if part.startswith("block_") else 0 :]
            with _no_gradient_into(later, inside=model.trunk.pattern is Feedforward):
                (direct,) = _gradients(model, batch, [parameters])
        splits[part] = _split(full[part], direct)
    model.train(was_training)
    return splits


def _gradients(model: Model, batch: dict[str, Tensor], parts: Iterable[list[nn.Parameter]]) -> list[Tensor]:
    """Of each part, as one vector."""
    parts = list(parts)
    wanted = [parameter for part in parts for parameter in part]
    gradients = iter(torch.autograd.grad(model(**batch)["loss"], wanted, allow_unused=True, materialize_grads=True))
    return [torch.cat([next(gradients).double().flatten() for _ in part]) for part in parts]


@contextmanager
def _no_gradient_into(blocks: Sequence[nn.Module], *, inside: bool) -> Iterator[None]:
    """Past the blocks it goes on: `inside` them too, where the skips are round the sublayers."""

    def detach(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)

    branches = []
    for block in blocks:
        skips = isinstance(block, Trunk) and block.pattern is not Feedforward and (inside or block.is_inner)
        branches += block.blocks if skips else [block]
    hooks = [branch.register_forward_pre_hook(detach) for branch in branches]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _split(full: Tensor, direct: Tensor) -> Split:
    norms = full.norm().item(), direct.norm().item(), (full - direct).norm().item()
    product = norms[0] * norms[1]
    return Split(*norms, cosine=(full @ direct).item() / product if product else float("nan"))


class Line(Model):
    """The 1-D linear network: block i multiplies by w_i, and the loss is the output (Dorovatas et al. 2025, app. C)."""

    def __init__(self, pattern: str, weights: Tensor) -> None:
        """weights: (depth,)."""
        super().__init__()
        self.trunk = Trunk([_Factor(weight) for weight in weights], pattern, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: (batch, tokens, 1) -> "loss": (), the sum of the outputs."""
        return {"loss": self.trunk(x).sum()}


class _Factor(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.weight * x


def line_gradients(pattern: str, weights: Tensor) -> Tensor:
    """dy/dw_i / x_0 of the 1-D linear network, i = 1, ..., depth (Dorovatas et al. 2025, table 1 and app. C).

    weights: (depth,) -> (depth,). What enters the block, times what the blocks above make of its output:
    feedforward  prod_{m<i} w_m        prod_{k>i} w_k
    residual     prod_{m<i} (1 + w_m)  prod_{k>i} (1 + w_k)
    acn          prod_{m<i} w_m        1 + sum_{j>i} prod_{i<k<=j} w_k
    acn_detached                       the direct path alone, 1
    """
    factors = 1 + weights if pattern == "residual" else weights
    found = []
    for i in range(len(weights)):
        below, above = factors[:i].prod(), factors[i + 1 :]
        direct = 1.0 if pattern.startswith("acn") else above.prod()
        mediated = above.cumprod(dim=0).sum() if pattern == "acn" else 0.0
        found.append(below * (direct + mediated))
    return torch.stack(found)


def backward_paths(pattern: str, depth: int) -> list[int]:
    """Paths from the output to the output of block i, i = 1, ..., depth (the same, section 2).

    Among those of an ACN and of a residual network there is one direct path, past all later blocks.
    """
    count = {
        "feedforward": lambda later: 1,
        "residual": lambda later: 2**later,
        "acn": lambda later: 1 + later,
        "acn_detached": lambda later: 1,
    }[pattern]
    return [count(depth - i) for i in range(1, depth + 1)]
