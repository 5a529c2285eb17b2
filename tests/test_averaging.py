"""Gradients are averaged over two real ranks while others are computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acn_scale import distributed
from acn_scale.averaging import GradientAverage
from acn_scale.config import Config
from acn_scale.data import build_stream
from acn_scale.engine import build_engine, train_step
from acn_scale.models import build_model


def gradients_to_come(cfg: Config) -> list[list[int]]:
    """Of two steps: how many weights have no gradient yet whenever a sum begins."""
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    stream = build_stream(cfg, distributed.rank(), distributed.world_size())
    sum_up, steps = torch.distributed.all_reduce, []

    def noted(tensor: Tensor, *args: Any, **keys: Any) -> Any:
        if tensor.numel() > 10:  # gradients, and not what the ranks agree on
            steps[-1].append(sum(weight.grad is None for weight in engine.module.parameters()))
        return sum_up(tensor, *args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", noted)
        for _ in range(2):
            steps.append([])
            train_step(engine, stream, lr=0.001)
    return steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "asked_for"), [(0, False), (1, True)])
def test_sums_begin_while_gradients_are_to_come(
    two_ranks: Callable, vit: Callable[..., Config], precision: str, stage: int, asked_for: bool
) -> None:
    """Also where they are of several micro batches: in the backward pass of the last alone."""
    train = {"bucket_size": 1500, "micro_batch_size": 8, "zero_stage": stage, "overlap_comm": asked_for}
    cfg = vit(train=train | {"precision": precision})
    for steps in two_ranks(gradients_to_come, cfg):
        for to_come in steps:
            assert len(to_come) > 5
            assert to_come == sorted(to_come, reverse=True) and to_come[0] > to_come[-1] == 0


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


def averaged(_: None) -> dict[str, list[list[float] | None]]:
    rank = distributed.rank()
    model = Fork()
    average = GradientAverage(model, most=3)
    if rank == 0:
        model(left_first=True, rare=True).backward()  # nobody's but this rank's
    alone = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    torch.use_deterministic_algorithms(True)  # what nobody has written is NaN then
    with average.during():
        (model(left_first=rank == 0, rare=rank == 0) * (rank + 1)).backward()
    torch.use_deterministic_algorithms(False)
    return {"alone": alone, "mean": [weight.grad.tolist() for weight in model.parameters()]}


def test_all_ranks_sum_the_same_whatever_comes_first(two_ranks: Callable) -> None:
    """And zeros for what has no gradient on one of them."""
    for rank, result in enumerate(two_ranks(averaged, None)):
        assert result["mean"] == [[3.0] * 3, [6.0] * 3, [0.5] * 2]
        assert [gradient is None for gradient in result["alone"]] == [rank == 1] * 3
