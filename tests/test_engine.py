"""DeepSpeed at every ZeRO stage does what plain PyTorch does, on two real ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.utils import safe_get_full_fp32_param

from acn_scale import distributed, foreach
from acn_scale import engine as engine_module
from acn_scale.config import Config
from acn_scale.data import build_evaluation, build_stream
from acn_scale.depth import evaluate
from acn_scale.durations import Horizon
from acn_scale.engine import Step, build_engine, deepspeed_config, train_step
from acn_scale.models import build_model
from acn_scale.models.connectivity import CONNECTIVITY
from acn_scale.optim import build_optimizer, learning_rate

STEPS = 20


def plain_run(cfg: Config, steps: int = STEPS) -> tuple[list[float], list[dict[str, float]]]:
    """The losses and gradient norms of one process with PyTorch alone: the oracle."""
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model)
    optimizer = build_optimizer(model, cfg.optim)
    stream = build_stream(cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": None})}))
    horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, horizon, step)
        loss = model(**next(stream))["loss"]
        loss.backward()
        blocks = [[*block.parameters(), *join.parameters()] for block, join in _with_joins(model)]
        parts = {"embed": model.embed.parameters(), "head": model.head.parameters(), "all": model.parameters()}
        parts |= {f"block_{index + 1:02d}": block for index, block in enumerate(blocks)}
        norms.append({name: _norm(parameters) for name, parameters in parts.items()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def _with_joins(model: torch.nn.Module) -> Any:
    return zip(model.trunk.blocks, model.trunk.joins, strict=True)


def _norm(parameters: Any) -> float:
    return sum(parameter.grad.double().square().sum().item() for parameter in parameters) ** 0.5


def engine_run(cfg: Config, steps: int = STEPS) -> tuple[list[float], list[dict[str, float]], list[float]]:
    """The same on this rank of a DeepSpeed run; an evaluation comes before the first step."""
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(cfg.run.seed)
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), world_size)
    first = evaluate(engine.module, build_evaluation(cfg, rank, world_size), distributed.local_device())
    stream = build_stream(cfg, rank, world_size)
    horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
    losses, norms = [], []
    for step in range(steps):
        result = train_step(engine, stream, learning_rate(cfg.optim, horizon, step), measure_gradients=True)
        assert result.applied
        losses.append(result.loss)
        norms.append(result.gradient_norms)
    return losses, norms, first["loss"]


@pytest.mark.parametrize("connectivity", ["acn", "residual", "highway", "denseformer"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_equals_plain_pytorch(
    two_ranks: Callable, vit: Callable[..., Config], stage: int, connectivity: str
) -> None:
    model = {"connectivity": connectivity, "recompute": stage == 3}
    optim = {"eps": 1e-3}  # or it would not matter how much shorter gradients are made
    cfg = vit(model=model, optim=optim, train={"zero_stage": stage, "micro_batch_size": 4, "clip_norm": 0.5})
    expected_losses, expected_norms = plain_run(cfg)
    for losses, norms, _ in two_ranks(engine_run, cfg):
        np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
        for got, expected in zip(norms, expected_norms, strict=True):
            assert got == pytest.approx(expected, rel=1e-4)


def sums_of_a_run(cfg: Config) -> tuple[list[float], list[int]]:
    """The losses of a few steps on this rank, and how many numbers are summed over the ranks at once."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch.distributed, "all_reduce"), (TorchBackend, "reduce_scatter_tensor")):
            communicate = getattr(place, name)

            def noted(*args: Any, communicate: Callable = communicate, **keys: Any) -> Any:
                tensors = (each for each in (*args, *keys.values()) if isinstance(each, torch.Tensor))
                sizes.append(max(tensor.numel() for tensor in tensors))
                return communicate(*args, **keys)

            patch.setattr(place, name, noted)
        losses, *_ = engine_run(cfg, steps=3)
    return losses, sizes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buckets_are_as_large_as_asked_for_and_change_no_result(
    two_ranks: Callable, vit: Callable[..., Config], stage: int
) -> None:
    """One is as large as the largest weight where that is more than it was asked to be; and so where they are summed
    while others are computed.
    """
    train, largest = {"zero_stage": stage, "micro_batch_size": 4}, 16 * 64
    small = {"bucket_size": 600}
    early = [small | {"overlap_comm": True}] if stage in (1, 2) else []
    runs = [two_ranks(sums_of_a_run, vit(train=train | more)) for more in ({}, small, *early)]
    for (losses, sizes), *others in zip(*runs, strict=True):
        for same, smaller in others:
            assert losses == same
            assert max(smaller) < max(sizes) and max(smaller) <= 600 + largest


def losses_of(cfgs: list[Config], plain: bool) -> list[list[float]]:
    """The first losses of each, on this rank of a DeepSpeed run or of one process alone.

    ZeRO-3 parts every weight: by itself it leaves small ones whole on every rank.
    """
    build = engine_module.deepspeed_config

    def parting(cfg: Config, world_size: int, parameters: int) -> dict[str, Any]:
        values = build(cfg, world_size, parameters)
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return values

    if plain:
        return [plain_run(cfg, steps=2)[0] for cfg in cfgs]
    engine_module.deepspeed_config = parting
    try:
        return [engine_run(cfg, steps=2)[0] for cfg in cfgs]
    finally:
        engine_module.deepspeed_config = build


@pytest.mark.parametrize("stage", [0, 3])
def test_every_pattern_trains(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    names = sorted(CONNECTIVITY.keys() - {"acn", "residual", "highway", "denseformer"})
    train = {"zero_stage": stage, "micro_batch_size": 4}
    cfgs = [vit(model={"connectivity": name, "depth": 2, "recompute": stage == 3}, train=train) for name in names]
    for got in two_ranks(losses_of, cfgs, False):
        for name, losses, expected in zip(names, got, losses_of(cfgs, plain=True), strict=True):
            assert losses == pytest.approx(expected, abs=1e-5), name


def test_evaluation_does_not_depend_on_ranks(one_rank: Callable, two_ranks: Callable, vit: Callable) -> None:
    """397 samples in batches of 33 on 1 rank, 2 ranks and 2 ranks under ZeRO-3: the same loss at every depth."""
    (one,) = one_rank(engine_run, vit(eval={"batch_size": 33}))
    for stage in (1, 3):
        for two in two_ranks(engine_run, vit(eval={"batch_size": 33}, train={"zero_stage": stage})):
            assert two[2] == pytest.approx(one[2], abs=1e-9)


def skipped_run(cfg: Config) -> tuple[bool, bool, bool]:
    """Whether a step was applied on good data, after one NaN pixel, and on good data again; and weights stayed."""
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    images = torch.rand(8, 1, 8, 8)
    broken = images.clone()
    if distributed.rank() == 0:
        broken[0, 0, 0, 0] = torch.nan
    batches = [{"images": pixels, "labels": torch.arange(8)} for pixels in (images, broken, images)]
    return tuple(train_step(engine, iter([batch]), 1e-3, measure_gradients=False).applied for batch in batches)


def weights_after(cfg: Config, own_loops: bool) -> list[torch.Tensor]:
    """What is kept in fp32 after some steps, one of them on a NaN; `own_loops`: DeepSpeed's."""
    fast = engine_module.foreach.speed_up
    engine_module.foreach.speed_up = (lambda optimizer: None) if own_loops else fast
    try:
        torch.manual_seed(0)
        engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    finally:
        engine_module.foreach.speed_up = fast
    stream = build_stream(cfg, distributed.rank(), distributed.world_size())
    for step in range(6):
        batch = next(stream)
        if step == 3 and distributed.rank() == distributed.world_size() - 1:
            batch["images"][0, 0, 0, 0] = torch.nan
        # Small: where a weight is rounded to 16 bits the other way once, its gradients are others from then on.
        assert train_step(engine, iter([batch]), 1e-5).applied == (step != 3)
    if cfg.train.zero_stage:
        return [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    return [weight.detach() for group in engine.optimizer.fp32_groups for weight in group]


@pytest.mark.parametrize(
    ("name", "stage", "clip_norm"),
    [("adamw", 0, 0.0), ("adamw", 0, 0.1), ("adamw", 1, 0.0), ("adamw", 1, 0.1), ("adamw", 2, 0.0), ("adamw", 2, 0.1),
     ("lamb", 0, 0.0), ("lamb", 0, 0.1), ("muon", 1, 0.0)],
)  # fmt: skip
def test_an_update_at_once_is_deepspeed_s(
    two_ranks: Callable, vit: Callable[..., Config], name: str, stage: int, clip_norm: float
) -> None:
    train = {"zero_stage": stage, "precision": "bf16", "clip_norm": clip_norm}
    cfg = vit(optim={"name": name}, train=train, model={"depth": 1})
    for got, expected in zip(two_ranks(weights_after, cfg, False), two_ranks(weights_after, cfg, True), strict=True):
        assert all(weight.abs().max() > 1e-6 for weight in expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-8)  # five updates come to 5e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_skipped_updates_show(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    """A NaN on one rank skips the update on all, and they say so."""
    cfg = vit(train={"zero_stage": stage, "precision": "bf16"}, model={"depth": 1})
    assert two_ranks(skipped_run, cfg) == [(True, False, True)] * 2


@contextmanager
def fp16_on_a_cpu() -> Iterator[None]:
    """PyTorch can, however slowly."""
    from deepspeed.accelerator import get_accelerator

    known = type(get_accelerator()).is_fp16_supported
    type(get_accelerator()).is_fp16_supported = lambda self: True
    try:
        yield
    finally:
        type(get_accelerator()).is_fp16_supported = known


def norms_while_the_scale_grows(cfg: Config) -> list[float]:
    """Of the gradients that the optimizer gets in steps on one batch, of which none moves a weight."""
    batch = next(build_stream(cfg))
    with fp16_on_a_cpu():
        torch.manual_seed(0)
        optimizer = (engine := build_engine(build_model(cfg.model), cfg, distributed.local_device(), 1)).optimizer
        optimizer.loss_scale_config.cur_scale, optimizer.loss_scale_config.scale_window = 256.0, 1
        norms, step = [], optimizer.optimizer.step
        masters = [weight for group in optimizer.fp32_groups for weight in group]
        optimizer.optimizer.step = lambda: (
            norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in masters]).item()),
            step(),
        )
        for _ in range(4):
            assert train_step(engine, iter([batch]), 0.0).applied
        assert optimizer.loss_scale > 256
    return norms


def test_a_growing_loss_scale_changes_no_gradient(one_rank: Callable, vit: Callable[..., Config]) -> None:
    (norms,) = one_rank(norms_while_the_scale_grows, vit(train={"precision": "fp16", "clip_norm": 0.0}))
    assert norms[0] > 0.1 and norms == pytest.approx([norms[0]] * 4, rel=0.01)


def test_the_norm_of_many_numbers() -> None:
    """PyTorch's own, in fp32 on a CPU, is off by 6e-5 here."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in ((3000, 1001), (1024,), (7, 2, 2), ())]
    exact = sum(gradient.double().square().sum().item() for gradient in gradients)
    assert foreach.squares(gradients).item() == pytest.approx(exact, rel=1e-6)


def fp16_norms(cfg: Config) -> tuple[float, float]:
    """The gradient norm of the first update in fp16, where the loss is scaled, and in fp32, of the same batch."""
    batch = next(build_stream(cfg, distributed.rank(), distributed.world_size()))
    with fp16_on_a_cpu():
        norms = []
        for precision in ("fp16", "fp32"):
            torch.manual_seed(0)
            precise = cfg.model_copy(update={"train": cfg.train.model_copy(update={"precision": precision})})
            engine = build_engine(build_model(cfg.model), precise, distributed.local_device(), distributed.world_size())
            step = Step(stop=False)
            while not step.applied:  # the scale begins too high
                step = train_step(engine, iter([batch]), 1e-3, measure_gradients=True)
            norms.append(step.gradient_norms["all"])
        return tuple(norms)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gradient_norms_are_without_loss_scale(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    for scaled, plain in two_ranks(fp16_norms, vit(train={"zero_stage": stage}, model={"depth": 1})):
        assert scaled == pytest.approx(plain, rel=0.02)


def test_deepspeed_config_writes_out_what_has_a_default_elsewhere(vit: Callable[..., Config]) -> None:
    values = deepspeed_config(vit(train={"clip_norm": 0.0, "micro_batch_size": 2}), world_size=2, parameters=100)
    assert values["gradient_clipping"] == 0.0
    assert values["gradient_accumulation_steps"] == 4
    assert "train_batch_size" not in values
    for stage, early, size in ((1, False, 100), (1, True, 13), (2, False, 100), (2, True, 13)):
        cfg = vit(train={"zero_stage": stage, "overlap_comm": early})
        zero = deepspeed_config(cfg, world_size=2, parameters=100)["zero_optimization"]
        assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (early, size)
