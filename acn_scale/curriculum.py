"""What changes in a model's forward pass over a run, as a pure function of the step: weights of the losses at every
depth and layer dropout, for early exit, and the short connections of an ACN that begins as a residual network.
"""

import math

from acn_scale.config import Config, EarlyExitConfig
from acn_scale.durations import Horizon
from acn_scale.models.base import Model
from acn_scale.models.connectivity import AutoCompressing


def apply(cfg: Config, model: Model, step: int, horizon: Horizon) -> None:
    """Set up the model's forward pass for the update after `step` updates.

    It depends on nothing else, so that all ranks run the same blocks and a resumed run goes on as the unbroken one.
    """
    depth = len(model.trunk.blocks)
    model.loss_weights = loss_weights(cfg.early_exit, depth, step, horizon.steps)
    model.trunk.drop_rates = drop_rates(cfg.early_exit, depth, step, horizon.steps)
    for join in model.modules():
        if isinstance(join, AutoCompressing):
            join.short = short_share(horizon.count(cfg.train.anneal), step)


def short_share(steps: int, step: int) -> float:
    """Of an ACN's short connections, which is left after `step` updates: from 1 in a line to 0 after `steps`."""
    return max(0.0, 1 - step / steps) if steps else 0.0


def loss_weights(cfg: EarlyExitConfig, depth: int, step: int, steps: int) -> tuple[float, ...]:
    """Of the losses of the readouts at depth 1 to `depth`; they sum to 1. Empty where full depth alone is trained on.

    Block l = 0, ..., L - 1 of the sources is read out at depth l + 1; the readout of the embedding has no loss.
    all: 2 (l + 1) / (L (L + 1)), the "Aligned" training of Dorovatas et al. 2025, section 7, after Jiang et al. 2025.
    rotational, gradual: C(l) e(l) / sum_i C(i) e(i) (Elhoushi et al. 2024, section 4.1.2), where
    e(l) = scale (0 + 1 + ... + l) below the last block, so that depth 1 has no weight, and
    e(L - 1) = L - 1 + scale (0 + 1 + ... + L - 2).
    """
    if cfg.losses == "last":
        return ()
    if cfg.losses == "all":
        return tuple(2 * (block + 1) / (depth * (depth + 1)) for block in range(depth))
    if depth == 1:  # what cut_while_training may leave
        return (1.0,)
    scales = [cfg.scale * block * (block + 1) / 2 for block in range(depth - 1)]
    scales.append(depth - 1 + cfg.scale * (depth - 2) * (depth - 1) / 2)
    used = [scale * _enabled(cfg, block, depth, step, steps) for block, scale in enumerate(scales)]
    return tuple(scale / sum(used) for scale in used)


def _enabled(cfg: EarlyExitConfig, block: int, depth: int, step: int, steps: int) -> bool:
    """C(t, l) of Elhoushi et al. 2024: the last block always, and

    rotational: every `rotation`-th block, in each step one further, round and round;
    gradual: one block more, from above, each time 1 / (2 L) of the run has passed.
    """
    if block == depth - 1:
        return True
    if cfg.losses == "rotational":
        return (block - step) % depth % cfg.rotation == 0
    return block >= depth - 1 - 2 * depth * step // steps


def drop_rates(cfg: EarlyExitConfig, depth: int, step: int, steps: int) -> tuple[float, ...]:
    """Probability that a sample passes a block by, for each block. Empty where layer dropout is off.

    layer_dropout S(t) D(l), D(l) = e^(l ln 2 / (L - 1)) - 1, and S(t) = e^(t ln 2 / (T - 1)) - 1, the curriculum for
    training from scratch (Elhoushi et al. 2024, section 4.1.1). What is not dropped is not scaled up, as there.
    """
    if not cfg.layer_dropout:
        return ()

    def rise(part: int, parts: int) -> float:
        return math.expm1(math.log(2) * part / max(1, parts - 1))

    return tuple(cfg.layer_dropout * rise(step, steps) * rise(block, depth) for block in range(depth))
