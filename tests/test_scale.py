"""Each option for scale does what it says and nothing else, on real engines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_pretrain import measured, named, run, run_until

from acn_scale import distributed
from acn_scale.checkpoint import complete
from acn_scale.config import Config
from acn_scale.data import build_stream
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.ema import WeightAverage
from acn_scale.engine import build_engine, train_step
from acn_scale.models import build_model
from acn_scale.optim import build_optimizer, parameter_groups
from acn_scale.runs import run_folder

STEPS = 8


def losses(cfg: Config) -> list[float]:
    """The losses of a few steps on this rank's engine."""
    return [loss for loss, _ in trained(cfg)]


def trained(cfg: Config) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """(loss, whole weights after the update) of each step."""
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    stream = build_stream(cfg, distributed.rank(), distributed.world_size())
    results = []
    for step in range(STEPS):
        result = train_step(engine, stream, 1e-2, batch_size=stream.plan.size(step))
        whole = safe_get_full_fp32_param if cfg.train.zero_stage else (lambda parameter: parameter.detach())
        weights = {name: whole(parameter).clone() for name, parameter in engine.module.named_parameters()}
        results.append((result.loss, weights))
    return results


def plain(cfg: Config, make: Callable = build_optimizer) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The same with PyTorch alone."""
    torch.manual_seed(0)
    model = build_model(cfg.model)
    optimizer = make(model, cfg.optim)
    stream = build_stream(cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": None})}))
    results = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group.get("lr_scale", 1.0)
        parts = [model(**next(stream))["loss"] for _ in range(stream.plan.micro_steps(step))]
        loss = torch.stack(parts).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        results.append((loss.item(), weights))
    return results


def assert_alike(got: list, expected: list, tolerance: float = 1e-4) -> None:
    for (loss, weights), (expected_loss, expected_weights) in zip(got, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=tolerance)
        for name, weight in weights.items():
            assert (weight - expected_weights[name]).abs().max() < tolerance, name


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "parameters")])
def test_offload_computes_the_same(two_ranks: Callable, vit: Callable[..., Config], stage: int, offload: str) -> None:
    here = vit(train={"zero_stage": stage, "clip_norm": 0.5})
    there = vit(train={"zero_stage": stage, "clip_norm": 0.5, "offload": offload})
    expected = two_ranks(losses, here)[0]
    assert two_ranks(losses, there)[0] == pytest.approx(expected, abs=1e-5)
    assert two_ranks(offloaded, there) == [True, True]


def offloaded(cfg: Config) -> bool:
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    return bool((engine.zero_offload_optimizer() and engine.zero_offload_param()) or cfg.train.offload == "optimizer")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_blocks_compute_the_same(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    train = {"zero_stage": stage}
    expected = two_ranks(losses, vit(train=train))[0]
    got, compilations = two_ranks(compiled, vit(train=train | {"compile": True}))[0]
    assert got == pytest.approx(expected, abs=1e-4)
    assert 0 < compilations <= 3, "once for all three blocks, or for each of them"


def compiled(cfg: Config) -> tuple[list[float], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return losses(cfg), torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_recomputing_computes_the_same(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    for stage in (0, 3):
        expected = two_ranks(losses, vit(train={"zero_stage": stage}))[0]
        assert two_ranks(losses, vit(train={"zero_stage": stage}, model={"recompute": True}))[0] == expected


def test_precisions_agree(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """bf16 with fp32's losses to a hundredth, on a few steps."""
    full = two_ranks(losses, vit(train={"zero_stage": 1}, model={"depth": 1}))[0]
    half = two_ranks(losses, vit(train={"zero_stage": 1, "precision": "bf16"}, model={"depth": 1}))[0]
    assert half == pytest.approx(full, abs=0.05)
    assert half != full


@pytest.mark.parametrize(("stage", "micro"), [(0, None), (1, 1), (2, 2), (3, None)])
def test_batch_ramp(two_ranks: Callable, vit: Callable[..., Config], stage: int, micro: int | None) -> None:
    """2, 4, 8, 16 samples: what plain PyTorch does with such batches."""
    cfg = vit(
        optim={"eps": 1e-3},
        train={"zero_stage": stage, "batch_ramp": "6step", "clip_norm": 0.0, "micro_batch_size": None},
    )
    assert [build_stream(cfg).plan.size(step) for step in range(8)] == [2, 2, 4, 4, 8, 8, 16, 16]
    assert_alike(two_ranks(trained, cfg)[0], plain(cfg))


def test_a_ramped_run_is_the_same_on_any_ranks_and_after_a_stop(
    one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config]
) -> None:
    train = {"batch_ramp": "12step", "log_every": "1step"}
    one, two = vit(run={"name": "one"}, train=train), vit(run={"name": "two"}, train=train | {"zero_stage": 2})
    one_rank(run, one)
    two_ranks(run, two)
    broken = named(two, "broken")
    two_ranks(run_until, broken, 8)
    two_ranks(run, broken)
    assert measured(broken) == measured(two)
    for a, b in zip(measured(one), measured(two), strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("ramp", [0, 1, 2, 3, 7, 30])
def test_plan_with_a_ramp(ramp: int) -> None:
    """Steps follow each other without a gap, and a place is found again."""
    plan = BatchPlan(64, 2, 1, 4, 1, ramp)
    position = 0
    taken = 0
    for step in range(50):
        assert plan.start(step) == position
        assert plan.step_at(position) == step
        for micro_step in range(plan.micro_steps(step)):
            assert plan.place(taken) == (step, micro_step)
            taken += 1
        position += plan.size(step)
    assert plan.size(ramp) == 64
    every = np.concatenate([BatchPlan(64, 2, rank, 4, 1, ramp).positions(5).flatten() for rank in range(4)])
    assert sorted(every) == list(range(plan.start(5), plan.start(6)))


def test_layer_decay_scales_the_rates(vit: Callable[..., Config]) -> None:
    cfg = vit(optim={"layer_decay": 0.5, "weight_decay": 0.1})
    model = build_model(cfg.model)
    rates, decays = {}, {}
    for group in parameter_groups(model, cfg.optim):
        for parameter in group["params"]:
            rates[parameter], decays[parameter] = group["lr_scale"], group["weight_decay"]
    for name, parameter in model.named_parameters():
        level = 0 if name.startswith("embed") else 4 if name.startswith("head") else 1 + int(name.split(".")[2])
        assert rates[parameter] == 0.5 ** (4 - level), name
        assert decays[parameter] == (0.1 if parameter.ndim >= 2 else 0.0), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layer_decay_in_an_engine(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    cfg = vit(optim={"layer_decay": 0.7, "eps": 1e-3}, train={"zero_stage": stage, "clip_norm": 0.0})
    assert_alike(two_ranks(trained, cfg)[0], plain(cfg))


def test_lamb(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    cfg = vit(optim={"name": "lamb", "eps": 1e-3}, train={"clip_norm": 0.0})
    got = two_ranks(trained, cfg)[0]
    assert_alike(got, plain(cfg))
    # The ratio of layers (You et al. 2020, alg. 2): in its first step a matrix moves by lr * its own norm.
    torch.manual_seed(0)
    before = dict(build_model(cfg.model).named_parameters())
    name = "trunk.blocks.0.blocks.1.linear1.weight"
    name = name if name in before else next(n for n, p in before.items() if p.ndim == 2 and n.startswith("trunk"))
    moved = (got[0][1][name] - before[name].detach()).norm()
    assert moved == pytest.approx(float(1e-2 * before[name].detach().norm()), rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    """The blocks' matrices move by orthogonal steps as large as AdamW's, whatever the stage; all else as with AdamW."""
    cfg = vit(optim={"name": "muon", "weight_decay": 0.0}, train={"zero_stage": stage, "clip_norm": 0.0})
    got = two_ranks(trained, cfg)[0]
    torch.manual_seed(0)
    model = build_model(cfg.model)
    adamw = plain(vit(optim={"weight_decay": 0.0}))
    for name, before in model.named_parameters():
        step = got[0][1][name] - before.detach()
        if before.ndim == 2 and name.startswith("trunk.blocks"):
            assert 0.14 < step.square().mean().sqrt() / 1e-2 < 0.24, name
            singular = torch.linalg.svdvals(step)
            singular = singular / singular.median()
            assert singular.max() < 2.0, name
            assert (singular > 0.5).float().mean() > 0.6, name  # where there is a gradient
        elif not name.startswith("trunk"):
            assert (got[0][1][name] - adamw[0][1][name]).abs().max() < 1e-4, name
    assert got[-1][0] < got[0][0]


def test_muon_takes_the_rate_and_the_decay_of_adamw(vit: Callable[..., Config]) -> None:
    """What DeepSpeed multiplies an orthogonal update by counts in."""
    from deepspeed.runtime.zero.muon.original_muon import _aspect_ratio_scale

    train = {"zero_stage": 1, "clip_norm": 0.0}
    cfg = vit(optim={"name": "muon", "weight_decay": 0.1, "layer_decay": 0.5}, train=train)
    model = build_model(cfg.model)
    level = {p: 0.5 ** (3 - index) for index, block in enumerate(model.trunk.blocks) for p in block.parameters()}
    shapes = set()
    for group in parameter_groups(model, cfg.optim):
        for parameter in group["params"] if group["use_muon"] else ():
            rows, columns = parameter.shape
            shapes.add((rows, columns))
            update = group["lr_scale"] * _aspect_ratio_scale(rows, columns)
            assert update == pytest.approx(level[parameter] * 0.2 * max(rows, columns) ** 0.5)
            assert group["lr_scale"] * group["weight_decay"] == pytest.approx(level[parameter] * 0.1)
    assert shapes == {(48, 16), (16, 16), (64, 16), (16, 64)}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ema(one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    """Its formula, in the checkpoint's files, whatever the ranks and after a stop."""
    train = {"zero_stage": stage, "ema_decay": 0.9, "length": "8step", "clip_norm": 0.0}
    optim = {"schedule": "wsd", "warmup": "0step", "decay": "0step", "lr": 1e-2, "eps": 1e-3}
    cfg = vit(train=train, optim=optim)
    two_ranks(run_until, cfg, 7)
    one_rank(run, cfg)
    torch.manual_seed(0)
    average = {name: parameter.detach().clone() for name, parameter in build_model(cfg.model).named_parameters()}
    for _, weights in plain(cfg):
        for name, weight in weights.items():
            average[name] = 0.9 * average[name] + 0.1 * weight
    newest = complete(run_folder(cfg))[-1]
    stored = load_file(newest / "ema_00000.safetensors")
    assert stored.keys() == average.keys()
    for name, tensor in stored.items():
        assert (tensor - average[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("stage", [0, 1])
def test_ema_averages_what_bf16_does_not_round(one_rank: Callable, vit: Callable[..., Config], stage: int) -> None:
    """Updates too small to show in bf16 show in the average."""
    train = {"precision": "bf16", "zero_stage": stage, "ema_decay": 0.5}
    for moved in one_rank(ema_of_a_small_step, vit(train=train, model={"depth": 1})):
        assert 0 < moved < 1e-5


def ema_of_a_small_step(cfg: Config) -> float:
    """How far the average of a large weight has gone."""
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), 1)
    average = WeightAverage(engine, cfg.train.ema_decay)
    before = average.average["head.linear.weight"].clone()
    train_step(engine, build_stream(cfg), 1e-6)
    average.update()
    return (average.average["head.linear.weight"] - before).abs().max().item()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"name": "lamb"}, "train": {"zero_stage": 1}}, "optim.name = lamb"),
        ({"optim": {"name": "muon"}}, "optim.name = muon: train.zero_stage must be"),
        ({"optim": {"name": "muon"}, "train": {"zero_stage": 1}}, "train.clip_norm = 1.0: optim.name = muon takes 0"),
        ({"train": {"offload": "optimizer"}}, "train.offload = optimizer"),
        ({"train": {"offload": "parameters", "zero_stage": 2}}, "train.offload = parameters"),
        ({"train": {"compile": True, "zero_stage": 3}}, "train.compile = true"),
    ],
)
def test_what_does_not_go_together(vit: Callable[..., Config], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        vit(**sections)
