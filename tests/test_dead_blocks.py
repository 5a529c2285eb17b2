"""Blocks that died are cut off while the run goes on, with their part of the optimizer's state, and nothing else."""

import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import everything, rewritten
from test_pretrain import measured, named, run, run_until

from acn_scale import pretrain
from acn_scale.checkpoint import complete, read_state
from acn_scale.config import Config, DepthConfig
from acn_scale.dead_blocks import DeadBlocks
from acn_scale.runs import read_metrics, run_folder


def norms(*blocks: float) -> dict[str, float]:
    return {f"block_{number:02d}": norm for number, norm in enumerate(blocks, 1)} | {"all": 1.0}


def test_what_is_dead() -> None:
    """Small in its gradient and in what it changes, at the top, for long enough, with the accuracy below it."""
    accuracy = [0.1, 0.90, 0.97, 0.97, 0.97]

    def kept(
        gradients: tuple[float, ...], change: list[float], accuracy: list[float] = accuracy, times: int = 2
    ) -> int:
        blocks = DeadBlocks(DepthConfig(dead_below=0.05, evaluations=2), tolerance=0.5)
        for _ in range(times):
            blocks.note_gradients(norms(*gradients))
            depth = blocks.depth_to_keep(accuracy, change)
        return depth

    small, change = (0.5, 0.3, 0.01, 0.01), [0, 0.5, 0.3, 0.01, 0.01]
    assert kept(small, change) == 2
    assert kept(small, change, times=1) == 4, "not for long enough"
    assert kept((0.5, 0.3, 0.01, 0.2), change) == 4, "its gradient lives"
    assert kept(small, [0, 0.5, 0.3, 0.2, 0.01]) == 3, "the block below it makes a difference"
    assert kept(small, change, [0.1, 0.90, 0.90, 0.97, 0.97]) == 3, "the accuracy needs it"
    assert kept((0.0,) * 4, [0.0] * 5, [0.1] * 5) == 1, "one block always stays"


def test_once_alive_is_alive_until_the_next_evaluation() -> None:
    blocks = DeadBlocks(DepthConfig(evaluations=1), tolerance=100.0)
    blocks.note_gradients(norms(0.5, 0.2))
    again = DeadBlocks(DepthConfig(evaluations=1), tolerance=100.0)
    again.load_state_dict(json.loads(json.dumps(blocks.state_dict())))
    for each in (blocks, again):
        each.note_gradients(norms(0.5, 0.01))
        assert each.depth_to_keep([0.9] * 3, [0, 0.5, 0.01]) == 2
        each.note_gradients(norms(0.5, 0.01))
        assert each.depth_to_keep([0.9] * 3, [0, 0.5, 0.01]) == 1


def sections(stage: int, **depth: Any) -> dict[str, dict[str, Any]]:
    """A run in which all blocks but one are called dead at the second evaluation, at step 10."""
    return {
        "train": {
            "length": "16step",
            "zero_stage": stage,
            "log_every": "1step",
            "micro_batch_size": 4,
            "ema_decay": 0.9,
        },
        "depth": {"cut_while_training": True, "dead_below": 1.0} | depth,
        "eval": {"every": "5step", "tolerance": 100.0},
        "model": {"dropout": 0.1},
        "checkpoint": {"every": "4step"},
    }


def run_with_one_engine(cfg: Config) -> None:
    """On every rank: when an engine is built, that before it is gone, with its memory."""
    build, before = pretrain.build_engine, []

    def built(*arguments: Any) -> Any:
        assert not [each for each in before if each() is not None]
        engine = build(*arguments)
        before.append(weakref.ref(engine))
        return engine

    pretrain.build_engine = built
    try:
        run(cfg)
    finally:
        pretrain.build_engine = build
    assert len(before) == 2


@pytest.mark.parametrize("stage", [0, 2])
def test_a_cut_frees_memory_before_it_takes_more(one_rank: Callable, vit: Callable[..., Config], stage: int) -> None:
    """The time that it takes is none of training's."""
    cfg = vit(**sections(stage))
    one_rank(run_with_one_engine, cfg)
    speeds = [line["speed/samples_per_second"] for line in read_metrics(run_folder(cfg)) if "train/lr" in line]
    assert min(speeds) > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_that_cuts(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    """It goes on with fewer blocks; stopped before the cut, at it, or after it, it is the same run bit for bit."""
    whole = vit(run={"name": "whole"}, **sections(stage))
    broken = named(whole, "broken")
    two_ranks(run, whole)
    blocks = [line["depth/blocks"] for line in measured(whole) if "depth/blocks" in line]
    assert blocks[:2] == [3, 3]
    assert blocks[2:] == sorted(blocks[2:], reverse=True)
    assert blocks[-1] < 3
    assert len([name for name in measured(whole)[-2] if name.startswith("grad_norm/block")]) == blocks[-1]
    for step in (9, 11, 14):
        two_ranks(run_until, broken, step)
    two_ranks(run, broken)
    assert measured(broken) == measured(whole)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "lamb"), (2, "adamw"), (3, "adamw")])
def test_what_stays_is_what_it_was(two_ranks: Callable, vit: Callable[..., Config], stage: int, optimizer: str) -> None:
    """The weights of the blocks that stay, and the optimizer's moments of them, bit for bit; and their counter."""
    keys = {"train": {"zero_stage": stage, "length": "5step"}, "optim": {"name": optimizer}}
    whole, cut = vit(**keys), vit(run={"name": "cut"}, model={"depth": 2}, **keys)
    two_ranks(run, whole)
    two_ranks(rewritten, cut, complete(run_folder(whole))[-1])
    first, second = (everything(complete(run_folder(cfg))[-1]) for cfg in (whole, cut))
    assert second.keys() == {name for name in first if not name.startswith("trunk.blocks.2.")} < first.keys()
    for name, values in second.items():
        assert values.keys() == first[name].keys() >= {"fp32", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, first[name][key]) for key, value in values.items())
    assert read_state(complete(run_folder(cut))[-1])["lamb_step"] == (5 if optimizer == "lamb" else None)
