"""Linear weights of a network's blocks that are set to zero: at once, or more and more while a run goes on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acn_scale.config import PruneConfig
from acn_scale.durations import Horizon
from acn_scale.models.base import Model


def prunable(model: Model) -> list[nn.Parameter]:
    """The weights of linear maps in the blocks. What joins blocks or sublayers stays whole: it is not what they learn,
    and may start as zeros."""
    named = model.trunk.blocks.named_modules()
    return [part.weight for name, part in named if isinstance(part, nn.Linear) and "joins" not in name.split(".")]


def sparsity(model: Model) -> dict[str, float]:
    """The share of zeros (0..1): "sparsity" of what is prunable, "sparsity_all" of all parameters."""
    return {"sparsity": _zeros(prunable(model)), "sparsity_all": _zeros([*model.parameters()])}


def _zeros(weights: Sequence[Tensor]) -> float:
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / _size(weights)


def _size(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


@torch.no_grad()
def prune_by_magnitude(model: Model, share: float) -> None:
    """Set the smallest of all prunable weights together to zero, so that `share` of them is zero (Dorovatas et al.
    2025, app. G; after Han et al. 2015)."""
    weights = prunable(model)
    count = round(share * _size(weights))
    for weight, low in zip(weights, _lowest([weight.abs() for weight in weights], count), strict=True):
        weight.masked_fill_(low, 0)


@torch.no_grad()
def prune_by_movement(cfg: PruneConfig, horizon: Horizon, engine: Any, step: int) -> None:
    """What pruning adds to the update after `step` updates, right before it is made; at stage 0 in fp32.

    After k times cfg.every, (1 - cfg.share)^k of the prunable weights are left at most. Those with the smallest |w g|
    of all together are set to zero (the code beside Dorovatas et al. 2025, whose g is of the last batch before; here it
    is of the first one after, at the weights that are pruned). They stay zero, since their gradient and the optimizer's
    moments are zero too. Nothing but the weights says what is pruned: a resumed run goes on as the unbroken one.
    """
    if not cfg.share:
        return
    weights = prunable(engine.module)
    left = round(_size(weights) * (1 - cfg.share) ** (step // max(1, horizon.count(cfg.every))))
    if sum(int(weight.count_nonzero()) for weight in weights) > left:
        scores = [torch.where(weight == 0, -1, (weight * weight.grad).abs()) for weight in weights]
        for weight, low in zip(weights, _lowest(scores, _size(weights) - left), strict=True):
            weight.masked_fill_(low, 0)
            for moment in engine.optimizer.state[weight].values():
                if moment.shape == weight.shape:
                    moment.masked_fill_(low, 0)
    for weight in weights:
        weight.grad.masked_fill_(weight == 0, 0)


def _lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Where the `count` lowest of all scores are, the first ones among equals."""
    flat = torch.cat([score.flatten() for score in scores])
    low = torch.zeros_like(flat, dtype=torch.bool)
    low[flat.argsort(stable=True)[:count]] = True
    return [part.view_as(score) for part, score in zip(low.split([*map(Tensor.numel, scores)]), scores, strict=True)]
