"""Gradients are averaged over two real ranks while others are computed."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acn_scale import distributed
from acn_scale.averaging import averaging
from acn_scale.config import Config
from acn_scale.data import build_stream
from acn_scale.engine import build_engine, train_step
from acn_scale.models import build_model


def left_when_sums_begin(cfg: Config) -> list[list[float]]:
    """Of two steps: the share of all numbers that have no gradient yet, whenever a sum begins."""
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    stream = build_stream(cfg, distributed.rank(), distributed.world_size())
    weights = list(engine.module.parameters())
    whole = sum(weight.numel() for weight in weights)
    sum_up, steps, come = torch.distributed.all_reduce, [], 0

    def arrived(weight: nn.Parameter) -> None:
        nonlocal come
        come += weight.numel()

    def noted(tensor: Tensor, *args: Any, **keys: Any) -> Any:
        if tensor.numel() > 10:  # gradients, and not what the ranks agree on
            steps[-1].append(-come % whole / whole)
        return sum_up(tensor, *args, **keys)

    for weight in weights:
        weight.register_post_accumulate_grad_hook(arrived)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", noted)
        for _ in range(2):
            steps.append([])
            train_step(engine, stream, lr=0.001)
    return steps


CASES = [
    ({"zero_stage": 0}, "acn"),
    ({"zero_stage": 0, "precision": "bf16"}, "acn"),
    ({"zero_stage": 0}, "dense"),  # with weights of each join, in the order of joins
    ({"zero_stage": 1, "overlap_comm": True}, "acn"),
    ({"zero_stage": 1, "overlap_comm": True, "precision": "bf16"}, "acn"),
]


@pytest.mark.parametrize(("train", "connectivity"), CASES)
def test_sums_begin_while_gradients_are_to_come(
    two_ranks: Callable, vit: Callable[..., Config], train: dict[str, Any], connectivity: str
) -> None:
    """From an eighth on; where there are several micro batches, in the backward pass of the last alone."""
    counts = []
    for micro_batch_size in (8, 4):
        model = {"connectivity": connectivity, "depth": 8}
        cfg = vit(model=model, train=train | {"micro_batch_size": micro_batch_size})
        for steps in two_ranks(left_when_sums_begin, cfg):
            for left in steps:
                counts.append(len(left))
                assert left == sorted(left, reverse=True)
                assert left[0] > 0.8 and left[len(left) // 2] > 0.3 and left[-1] == 0
    assert min(counts) == max(counts) >= 8


class Fork(nn.Module):
    """Two branches. Gradients of the one that is computed last come first."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.rare = nn.Parameter(torch.ones(2))

    def forward(self, *, left_first: bool, rare: bool) -> Tensor:
        branches = [lambda: self.left.sum() * 2, lambda: self.right.sum() * 4]
        values = [branch() for branch in (branches if left_first else branches[::-1])]
        return sum(values) + (self.rare.sum() if rare else 0)


def averaged(_: None) -> list[list[float]]:
    rank = distributed.rank()
    model = Fork()
    torch.use_deterministic_algorithms(True)  # what nobody has written is NaN then
    with averaging([[weight] for weight in model.parameters()]):
        (model(left_first=rank == 0, rare=rank == 0) * (rank + 1)).backward()
    torch.use_deterministic_algorithms(False)
    means = [weight.grad.tolist() for weight in model.parameters()]
    model.zero_grad()
    if rank == 0:
        model(left_first=True, rare=True).backward()  # nobody's but this rank's
        assert model.left.grad.tolist() == [2.0] * 3
    return means


def test_all_ranks_sum_the_same_whatever_comes_first(two_ranks: Callable) -> None:
    """And zeros for what has no gradient on one of them; outside, nothing is summed."""
    assert two_ranks(averaged, None) == [[[3.0] * 3, [6.0] * 3, [0.5] * 2]] * 2


def weights_left(cfg: Config) -> int:
    """When their engine has gone."""
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    train_step(engine, build_stream(cfg, distributed.rank(), distributed.world_size()), lr=0.001)
    weights = [weakref.ref(weight) for weight in engine.module.parameters()]
    engine.destroy()
    del engine
    gc.collect()
    return sum(weight() is not None for weight in weights)


def test_weights_go_with_their_engine(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    assert two_ranks(weights_left, vit()) == [0, 0]
