"""Parameter groups, the optimizer, and learning rates as a pure function of the step."""

import math

import torch
from torch import nn

from acn_scale.config import OptimConfig
from acn_scale.durations import Horizon


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices get weight decay; biases, norms and other vectors get none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if len(shape(parameter)) >= 2]
    vectors = [parameter for parameter in parameters if len(shape(parameter)) < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def shape(parameter: nn.Parameter) -> torch.Size:
    """Also of one that ZeRO-3 has taken apart."""
    return getattr(parameter, "ds_shape", parameter.shape)


def names_in_order(model: nn.Module) -> list[str]:
    """The parameters' names in the order in which the optimizer numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in parameter_groups(model, 0.0) for parameter in group["params"]]


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) from PyTorch: nothing is compiled when training starts."""
    return torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps)


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
