"""train.freeze: the head alone is trained, at every ZeRO stage, and all else stays bit for bit as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import network
from networks import vit as vit_config
from pydantic import ValidationError
from test_pretrain import measured, named, run, run_until

from acn_scale.config import Config
from acn_scale.convert import read_model
from acn_scale.convert.export import write_export
from acn_scale.depth import step_flops
from acn_scale.memory import memory
from acn_scale.plan import traffic
from acn_scale.runs import run_folder

DIGITS = {"channels": 1, "connectivity": "acn"}  # a network of 5 classes, for the 10 of the digits


@pytest.fixture
def frozen_run(vit: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    source = tmp_path / "source"
    source.mkdir()
    write_export(network(vit_config(**DIGITS)), source, "fp32")

    def build(name: str, **train: Any) -> Config:
        train = {
            "init_from": str(source),
            "freeze": True,
            "log_every": "1step",
            "ema_decay": 0.5,
            "length": "10step",
        } | train
        return vit(run={"name": name}, train=train)

    return build


LAYOUTS = [((2, 1), (2, 1)), ((2, 3), (2, 3)), ((2, 0), (1, 3)), ((2, 2), (1, 0))]


@pytest.mark.parametrize(("first", "second"), LAYOUTS, ids=lambda pair: f"{pair[0]} ranks ZeRO-{pair[1]}")
def test_frozen_weights_stay_and_a_stop_changes_nothing(
    one_rank: Callable, two_ranks: Callable, frozen_run: Callable[..., Config], first: tuple, second: tuple
) -> None:
    """Also when the run goes on without its source, on other ranks and another stage."""
    ranks = {1: one_rank, 2: two_ranks}
    whole = frozen_run("whole", zero_stage=first[1])
    ranks[first[0]](run, whole)
    ranks[first[0]](run_until, named(whole, "broken"), 8)
    start = read_model(whole.train.init_from).weights()
    weights = Path(whole.train.init_from) / "model.safetensors"
    weights.rename(weights.with_suffix(".away"))
    broken = frozen_run("broken", zero_stage=second[1], micro_batch_size=8)
    ranks[second[0]](run, broken)
    for average in (False, True):
        one, two = (read_model(run_folder(cfg), average=average).weights() for cfg in (whole, broken))
        for name, weight in one.items():
            if name.startswith("head."):
                torch.testing.assert_close(two[name], weight, rtol=0, atol=0 if first == second else 1e-4)
                assert weight.shape != start[name].shape or not torch.equal(weight, start[name])
            else:
                assert torch.equal(weight, start[name]), name
                assert torch.equal(two[name], start[name]), name
    expected, got = ([line["train/loss"] for line in measured(cfg) if "train/lr" in line] for cfg in (whole, broken))
    assert got == pytest.approx(expected, abs=0 if first == second else 1e-4)
    norms = {name for line in measured(whole) for name in line if name.startswith("grad_norm/")}
    assert norms == {"grad_norm/head"}


def test_in_16_bits_they_are_what_was_rounded(two_ranks: Callable, frozen_run: Callable[..., Config]) -> None:
    cfg = frozen_run("half", zero_stage=2, precision="bf16", length="2step")
    two_ranks(run, cfg)
    start, now = (read_model(source).weights() for source in (cfg.train.init_from, run_folder(cfg)))
    for name, weight in now.items():
        if not name.startswith("head."):
            assert torch.equal(weight, start[name].bfloat16().float()), name


def test_the_plan_counts_the_head_alone(frozen_run: Callable[..., Config]) -> None:
    """Of arithmetic, memory and traffic."""
    cfg = frozen_run("plan")
    whole = cfg.model_copy(update={"train": cfg.train.model_copy(update={"freeze": False})})
    head = 2 * 16 + 16 * 10 + 10
    forward = step_flops(cfg.model, 0.0) / 3
    assert step_flops(cfg.model, 0.0, frozen=True) == pytest.approx(forward, rel=0.1)
    for stage in (0, 1, 2, 3):
        few, all_ = (memory(each, stage=stage, gpus=2, micro_batch_size=8, recompute=False) for each in (cfg, whole))
        assert few.weights == all_.weights
        assert few.gradients == 4 * head / (2 if stage else 1)
        assert few.optimizer < 0.05 * all_.optimizer
        assert few.activations < 0.7 * all_.activations
        sent = [traffic(each, stage=stage, gpus=2, micro_steps=1) for each in (cfg, whole)]
        assert sent[0] < (0.7 if stage == 3 else 0.05) * sent[1]


def test_what_cannot_be_frozen(frozen_run: Callable[..., Config], vit: Callable[..., Config]) -> None:
    source, of_muon = frozen_run("x").train.init_from, {"zero_stage": 1, "clip_norm": 0.0}
    for sections, message in (
        ({"train": {"freeze": True}}, "train.init_from must name"),
        ({"train": {"freeze": True, "init_from": source, **of_muon}, "optim": {"name": "muon"}}, "muon: is about"),
        ({"train": {"freeze": True, "init_from": source}, "depth": {"cut_while_training": True}}, "cut_while_training"),
    ):
        with pytest.raises(ValidationError, match=message):
            vit(**sections)
