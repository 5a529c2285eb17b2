"""Parameter groups, the optimizer, and learning rates as a pure function of the step."""

import math
import re

import torch
from torch import nn

from acn_scale.config import OptimConfig
from acn_scale.durations import Horizon

RMS = 0.2  # of AdamW's updates, over the learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2)


def part_of(name: str) -> str:
    """trunk.blocks.0.norm.weight -> block_01; head.linear.bias -> head. A join counts to the block below it."""
    match = re.match(r"trunk\.(?:blocks|joins)\.(\d+)\.", name)
    return f"block_{int(match[1]) + 1:02d}" if match else name.split(".")[0]


def level_of(name: str) -> float:
    """0 for a weight of the embedding, then the number of its block; infinity for the head's."""
    part = part_of(name)
    return 0 if part == "embed" else int(part[6:]) if part.startswith("block_") else math.inf


def from_the_top(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are trained, in about the order in which a backward pass comes to them."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return [weight for _, weight in sorted(named[::-1], key=lambda each: -level_of(each[0]))]


def freeze(model: nn.Module) -> None:
    """Leave the head alone to be trained; a weight that it shares with another part is not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == "head")


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict]:
    """Matrices get weight decay; biases, norms and other vectors get none. `lr_scale` multiplies the learning rate.
    What is frozen is in no group.

    With cfg.layer_decay = d, a block's rate is d times that of the block above it, and so on from the head down to the
    embedding (Clark et al. 2020, app. A; Bao et al. 2022). With Muon, the blocks' matrices are groups of their own, of
    as many columns each: see muon_scale.
    """
    depth = len(model.trunk.blocks)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level, matrix = min(level_of(name), depth + 1), parameter.ndim >= 2
        muon = cfg.name == "muon" and matrix and 0 < level <= depth
        decay = cfg.weight_decay if matrix else 0.0
        scale = cfg.layer_decay ** (depth + 1 - level)
        size = muon_scale(parameter) if muon else 1.0
        group = groups.setdefault((not muon, not matrix, scale, size), {"params": [], "weight_decay": decay / size})
        group["params"].append(parameter)
        group |= {"lr_scale": scale * size} | ({"use_muon": muon} if cfg.name == "muon" else {})
    return [groups[key] for key in sorted(groups)]


def muon_scale(matrix: nn.Parameter) -> float:
    """What makes DeepSpeed's update with Muon as large as AdamW's, so that both take the same learning rate.

    An orthogonal (rows, columns) has an RMS of max(rows, columns)^-0.5, and DeepSpeed multiplies it by
    max(1, rows / columns)^0.5: columns^-0.5 is left.
    """
    return RMS * matrix.shape[-1] ** 0.5


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) from PyTorch, in one pass, or LAMB (You et al. 2020) from timm."""
    groups, options = parameter_groups(model, cfg), {"lr": cfg.lr, "betas": tuple(cfg.betas), "eps": cfg.eps}
    if cfg.name == "lamb":
        from timm.optim import Lamb  # here: it takes a second

        return Lamb(groups, **options, max_grad_norm=None)
    return torch.optim.AdamW(groups, **options, fused=True)


def learning_rate(cfg: OptimConfig, horizon: Horizon, step: int) -> float:
    """The rate of the update after `step` updates, 0 <= step < horizon.steps.

    Linear warm-up to cfg.lr, then down to cfg.lr * cfg.final_lr at the end: by a half cosine, by a line, or by a line
    over the last cfg.decay only (warmup-stable-decay).
    """
    warmup = min(horizon.count(cfg.warmup), horizon.steps)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    start = warmup if cfg.schedule != "wsd" else max(warmup, horizon.steps - horizon.count(cfg.decay))
    progress = max(0, step - start) / max(1, horizon.steps - start)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if cfg.schedule == "cosine" else 1 - progress
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * remaining)
