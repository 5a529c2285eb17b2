"""What only a GPU can show: its kernels, its precisions, and what DeepSpeed does there."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpus
import pytest
import torch
from glue_runs import fine_tune, fine_tuning
from networks import bert, mixer, vit
from ranks import Ranks
from test_engine import sums_of_a_run, weights_after
from test_models import batch_for
from test_pretrain import measured, named, run, run_until

from acn_scale.config import Config, ModelConfig
from acn_scale.distributed import local_device
from acn_scale.models import build_model
from acn_scale.runs import read_metrics, run_folder

pytestmark = pytest.mark.skipif(not gpus.FOUND, reason="no GPU")
NETWORKS = [build(connectivity=connectivity) for build in (vit, mixer, bert) for connectivity in ("acn", "residual")]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Ranks]:
    ranks = Ranks(1, gpus)
    assert ranks(local_device) == [torch.device("cuda", 0)]
    yield ranks
    ranks.close()


def losses(cfg: Config) -> list[float | None]:
    """None of steps that fp16's loss scale dropped."""
    found = [line.get("train/loss") for line in measured(cfg) if "train/lr" in line]
    assert any(found)
    return found


def relative_errors(model: ModelConfig, precision: str, compiled: bool) -> dict[str, float]:
    """Of the loss and of each gradient on a GPU, beside a CPU's in fp64: |difference| / |what it should be|."""
    torch.manual_seed(0)
    exact = build_model(model).double()
    batch = batch_for(exact)
    ours = copy.deepcopy(exact).to(local_device(), getattr(torch, precision))
    if compiled:
        for block in ours.trunk.blocks:
            block.compile()

    def taken(net: torch.nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        loss = net(**{name: values.to(device) for name, values in batch.items()})["loss"]
        loss.backward()
        gradients = {name: each.grad for name, each in net.named_parameters() if each.grad is not None}
        return {"loss": loss.detach()} | gradients

    expected, got = taken(exact, torch.device("cpu")), taken(ours, local_device())
    assert expected.keys() == got.keys()
    return {
        name: float((got[name].cpu().double() - value).norm() / value.norm())
        for name, value in expected.items()
        if value.norm() > 1e-6  # attention's keys have no use for a bias
    }


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: f"{model.name}-{model.connectivity}")
def test_it_computes_what_a_cpu_does(gpu: Ranks, model: ModelConfig, precision: str, most: float) -> None:
    (errors,) = gpu(relative_errors, model, precision, False)
    assert max(errors.values()) < most, errors


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: f"{model.name}-{model.connectivity}")
def test_compiled_it_computes_the_same(gpu: Ranks, model: ModelConfig) -> None:
    (errors,) = gpu(relative_errors, model, "float32", True)
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_equals_never_stopping(gpu: Ranks, vit: Callable[..., Config], stage: int, precision: str) -> None:
    """With dropout, accumulation and loader processes."""
    train = {"zero_stage": stage, "precision": precision, "global_batch_size": 96, "micro_batch_size": 16}
    unbroken = vit(
        train=train | {"log_every": "1step"}, model={"dropout": 0.1}, data={"augment": "cifar", "workers": 1}
    )
    broken = named(unbroken, "broken")
    gpu(run, unbroken)
    gpu(run_until, broken, 13)
    gpu(run, broken)
    assert losses(broken) == losses(unbroken)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 1), (1, 2), (2, 0)])
def test_another_stage(gpu: Ranks, vit: Callable[..., Config], first: int, second: int, precision: str) -> None:
    train = {"precision": precision, "log_every": "1step"}
    whole = vit(run={"name": "whole"}, train=train | {"zero_stage": first})
    gpu(run, whole)
    gpu(run_until, named(whole, "broken"), 13)
    gpu(run, vit(run={"name": "broken"}, train=train | {"zero_stage": second}))
    assert losses(named(whole, "broken")) == pytest.approx(losses(whole), abs=1e-4 if precision == "fp32" else 0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_cut_while_training_equals_a_start_from_it(gpu: Ranks, vit: Callable[..., Config], stage: int) -> None:
    sections: dict[str, dict[str, Any]] = {
        "train": {"length": "16step", "zero_stage": stage, "precision": "bf16", "log_every": "1step"},
        "depth": {"cut_while_training": True, "dead_below": 1.0},
        "eval": {"every": "5step", "tolerance": 100.0},
    }
    cfg = vit(**sections)
    gpu(run, cfg)
    assert [line["depth/blocks"] for line in read_metrics(run_folder(cfg)) if "depth/blocks" in line][-1] < 3
    broken = named(cfg, "broken")
    gpu(run_until, broken, 12)
    gpu(run, broken)
    assert losses(broken) == losses(cfg)


@pytest.mark.parametrize(
    ("train", "model"),
    [
        pytest.param({"compile": True}, {}, marks=pytest.mark.slow),
        ({}, {"recompute": True}),
        pytest.param({"compile": True}, {"recompute": True}, marks=pytest.mark.slow),
        ({"zero_stage": 2, "offload": "optimizer"}, {}),
        ({"zero_stage": 3, "offload": "parameters"}, {}),
        ({"zero_stage": 3}, {"recompute": True}),
        ({"zero_stage": 2, "ema_decay": 0.9}, {}),
        ({"zero_stage": 1, "overlap_comm": True, "bucket_size": 1500}, {}),
        ({"zero_stage": 2, "overlap_comm": True, "bucket_size": 1500}, {}),
    ],
    ids=str,
)
def test_what_saves_time_or_memory_changes_nothing(
    gpu: Ranks, vit: Callable[..., Config], train: dict[str, Any], model: dict[str, Any]
) -> None:
    always = {"log_every": "1step"}
    plain, other = vit(train=always), vit(run={"name": "other"}, train=always | train, model=model)
    for cfg in (plain, other):
        gpu(run, cfg)
    assert losses(other) == pytest.approx(losses(plain), abs=1e-4)


@pytest.mark.skipif("," not in gpus.FOUND, reason="one GPU")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sums_while_others_are_computed_change_nothing(vit: Callable[..., Config], stage: int) -> None:
    """Between two GPUs, beside sums when all are there."""
    late, early = {"zero_stage": stage or 1}, {"zero_stage": stage, "overlap_comm": True, "bucket_size": 1500}
    ranks = Ranks(2, gpus)
    try:
        (expected, _), (losses, _) = (ranks(sums_of_a_run, vit(train=train))[0] for train in (late, early))
    finally:
        ranks.close()
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_sentences(gpu: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path, task: str) -> None:
    """Padded batches of any length, from training to what is predicted."""
    cfg = fine_tuning(tmp_path, glue_encoder, glue_shards, task, "train.precision=bf16", "train.zero_stage=1")
    gpu(fine_tune, cfg)
    assert len(list((run_folder(cfg) / "eval").iterdir())) >= 2


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_update_at_once_is_deepspeed_s(gpu: Ranks, vit: Callable[..., Config], stage: int) -> None:
    """Also that it is dropped for a NaN."""
    cfg = vit(train={"zero_stage": stage, "precision": "bf16", "clip_norm": 0.1})
    torch.testing.assert_close(gpu(weights_after, cfg, False), gpu(weights_after, cfg, True), rtol=1e-4, atol=1e-5)
