"""Checkpoints are whole or not there, are chosen and kept as they should be, and fit any number of ranks and stage."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from test_pretrain import measured, named, refused, run, run_until
from torch._subclasses.fake_tensor import FakeTensorMode

from acn_scale import checkpoint, distributed, reshape, saving
from acn_scale.checkpoint import complete, damage, load, read_state
from acn_scale.config import Config
from acn_scale.convert import read_model
from acn_scale.data import build_stream
from acn_scale.engine import build_engine
from acn_scale.errors import RunFailed
from acn_scale.models import build_model
from acn_scale.runs import read_metrics, run_folder, write_json
from acn_scale.saving import Checkpoints
from acn_scale.zero import kept


def steps(cfg: Config) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete(run_folder(cfg))]


def said(cfg: Config) -> str:
    return (run_folder(cfg) / "train.log").read_text()


def test_keep(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """The newest two, and for good the first one of each tenth step or later."""
    cfg = vit(train={"length": "40step"}, checkpoint={"every": "4step", "keep": 2, "keep_every": "10step"})
    two_ranks(run, cfg)
    assert steps(cfg) == [12, 20, 32, 36, 40]
    state = json.loads((complete(run_folder(cfg))[0] / "state.json").read_text())
    files = {path.name for path in complete(run_folder(cfg))[0].iterdir()}
    assert set(state["files"]) | {"state.json"} == files


def test_keep_all(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """What comes to less than a step is a step."""
    cfg = vit(model={"depth": 1}, checkpoint={"every": "5step", "keep": 1, "keep_every": "0.001ep"})
    one_rank(run, cfg)
    assert steps(cfg) == [5, 10, 15, 20]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def not_json(path: Path) -> None:
    (path.parent / "state.json").write_text("{")


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, not_json])
def test_a_damaged_one_is_skipped(two_ranks: Callable, vit: Callable[..., Config], harm: Callable) -> None:
    """With a warning that names the file; the run is then the one it would have been."""
    whole = vit(run={"name": "whole"}, train={"zero_stage": 1})
    broken = named(whole, "broken")
    two_ranks(run, whole)
    two_ranks(run_until, broken, 14)
    newest = complete(run_folder(broken))[-1]
    assert damage(newest) == []
    victim = sorted(newest.glob("*.pt"))[-1]
    harm(victim)
    assert len(damage(newest)) == 1
    two_ranks(run, broken)
    log = (run_folder(broken) / "train.log").read_text()
    assert log.count(f"{newest.name} is damaged and passed over: {newest}/") == 1
    assert "resumed at step 5 from" in log
    assert measured(broken) == measured(whole)


def made(run: Path, step: int) -> Path:
    """A checkpoint of one file."""
    path = Checkpoints(run, keep=1, keep_every=None).path(step)
    path.mkdir(parents=True)
    (path / "a.pt").write_bytes(bytes(100))
    write_json(
        path / "state.json", {"files": {"a.pt": {"bytes": 100, "sha256": hashlib.sha256(bytes(100)).hexdigest()}}}
    )
    return path


def chosen_where_listings_lag(run: Path, looks: int) -> Path | str:
    """By rank 1 too, which does not see the newest checkpoint in the first `looks`."""
    blind = iter(range(looks if distributed.rank() == 1 else 0))

    def lagging(folder: Path) -> list[Path]:
        return complete(folder)[: -1 if next(blind, None) is not None else None]

    with patch.object(saving, "complete", lagging), patch.object(saving, "SIGHT", 1.0):
        try:
            return Checkpoints(run, keep=1, keep_every=None).newest()
        except RunFailed as error:
            return str(error)


def test_all_ranks_choose_the_same(two_ranks: Callable, tmp_path: Path) -> None:
    """Also where a network file system shows one of them an older listing; for ever, the run ends."""
    newest = [made(tmp_path, step) for step in (5, 10)][-1]
    assert two_ranks(chosen_where_listings_lag, tmp_path, 3) == [newest] * 2
    first, second = two_ranks(chosen_where_listings_lag, tmp_path, 10**6)
    assert first == second
    assert re.match(rf"rank 1 \(.*\) does not see {newest}, as rank 0 does", first)


def progress_while_read(run: Path) -> int:
    calls = []
    with patch.object(checkpoint, "CHUNK", 9):
        Checkpoints(run, keep=1, keep_every=None, progress=lambda: calls.append(None)).newest()
    return len(calls)


def test_reading_makes_progress(one_rank: Callable, tmp_path: Path) -> None:
    """Of which the watchdog hears: a large checkpoint is no hang."""
    made(tmp_path, 5)
    assert one_rank(progress_while_read, tmp_path) == [12]


def test_damaged_ones_are_not_kept_in_the_place_of_new_ones(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """Though their steps are higher; what is left of them stays."""
    cfg, later = (
        vit(model={"depth": 1}, train={"length": "40step"}, checkpoint={"every": "5step", "keep": keep})
        for keep in (3, 1)
    )
    one_rank(run_until, cfg, 33)
    for path in complete(run_folder(cfg))[1:]:
        flip(next(path.glob("*.pt")))
    one_rank(run_until, later, 28)
    assert "resumed at step 20" in said(cfg)
    assert steps(cfg) == [25]
    aside = sorted((run_folder(cfg) / "checkpoints").glob("damaged_*"))
    assert [path.name for path in aside] == ["damaged_step_00000025", "damaged_step_00000030"]
    assert all(list(path.glob("*.pt")) for path in aside)


def test_nothing_undamaged_is_the_end(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """Nothing that the run has is lost: one of them may come back."""
    cfg = vit(checkpoint={"every": "5step"})
    one_rank(run_until, cfg, 13)
    before = read_metrics(run_folder(cfg))
    for path in complete(run_folder(cfg)):
        flip(next(path.glob("*.pt")))
    (message,) = one_rank(refused, cfg)
    assert message.startswith(f"{run_folder(cfg)}/checkpoints: step_00000005, step_00000010: damaged or unreadable")
    assert steps(cfg) == [5, 10]
    assert read_metrics(run_folder(cfg)) == before


PAIRS = [((2, a), (1, b)) for a, b in ((0, 0), (1, 3), (3, 2))]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda pair: f"{pair[0]} ranks ZeRO-{pair[1]}")
def test_other_ranks_and_stages(
    one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config], first: tuple, second: tuple
) -> None:
    """There and back: the same batches, and in fp32 losses within 1e-4 of the unbroken run's, on one rank."""
    ranks = {1: one_rank, 2: two_ranks}
    sections = {"model": {"depth": 2}, "eval": {"every": "7step"}}
    train = {"length": "14step", "log_every": "1step"}
    whole = vit(run={"name": "whole"}, train=train, **sections)
    broken = vit(run={"name": "broken"}, train=train | {"zero_stage": first[1]}, **sections)
    other = named(vit(train=train | {"zero_stage": second[1], "micro_batch_size": 8}, **sections), "broken")
    one_rank(run, whole)
    ranks[first[0]](run_until, broken, 8)
    ranks[second[0]](run_until, other, 13)
    ranks[first[0]](run, broken)
    expected, got = measured(whole), measured(broken)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        values = [[line[name] for line in lines if name in line] for lines in (expected, got)]
        assert values[1] == pytest.approx(values[0], abs=1e-4)
    log = (run_folder(broken) / "train.log").read_text()
    if first[1] or second[1]:
        assert (
            f"step_00000005 from 2 blocks on 2 ranks at ZeRO-{first[1]} to 2 blocks on 1 rank at ZeRO-{second[1]}"
            in log
        )
    else:
        assert "reshaped" not in log


def rewritten(cfg: Config, source: Path) -> None:
    """A checkpoint of another layout, loaded and saved again as it is, in a run of this config."""
    if distributed.rank() == 0:
        run_folder(cfg).mkdir(parents=True)
        write_json(run_folder(cfg) / "config.json", cfg.model_dump(mode="json"))
    engine = build_engine(build_model(cfg.model), cfg, distributed.local_device(), distributed.world_size())
    stream = build_stream(cfg, distributed.rank(), distributed.world_size())
    state = load(engine, stream, source)
    checkpoints = Checkpoints(run_folder(cfg), keep=1, keep_every=None)
    checkpoints.save(engine, stream, state["step"], {})
    assert checkpoints.finish()


def everything(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of each weight, flat and without padding: itself and the optimizer's moments; and a counter."""
    sizes = {name: weight.numel() for name, weight in read_model(checkpoint).weights().items()}
    return {
        name: {
            key: torch.cat([piece.flatten() for piece in pieces])[: sizes[name] if pieces[0].dim() else 1]
            for key, pieces in each.items()
        }
        for name, each in kept(checkpoint, read_state(checkpoint)).items()
    }


@pytest.mark.parametrize(("name", "precision"), [("adamw", "bf16"), ("muon", "fp32")])
def test_every_layout_keeps_the_same(
    one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config], name: str, precision: str
) -> None:
    """Bit for bit, from each to the next; some weights do not divide by the ranks."""
    layouts = [(two_ranks, 1), (one_rank, 3), (two_ranks, 3), (two_ranks, 2)]
    layouts += [(one_rank, 0), (two_ranks, 1)] if name == "adamw" else []
    chain = [
        vit(run={"name": f"number_{number}"}, optim={"name": name}, model={"depth": 1, "dim": 6},
            train={"zero_stage": stage, "precision": precision, "length": "3step", "clip_norm": 0.0})
        for number, (_, stage) in enumerate(layouts)
    ]  # fmt: skip
    layouts[0][0](run, chain[0])
    expected = everything(complete(run_folder(chain[0]))[-1])
    moments = {key for each in expected.values() for key in each}
    assert moments >= {"fp32", "exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if name == "muon" else set())
    for (ranks, _), before, after in zip(layouts[1:], chain, chain[1:], strict=False):
        ranks(rewritten, after, complete(run_folder(before))[-1])
        got = everything(complete(run_folder(after))[-1])
        assert got.keys() == expected.keys()
        for weight, values in expected.items():
            assert got[weight].keys() == values.keys()
            assert all(torch.equal(got[weight][key], value) for key, value in values.items())


@pytest.mark.parametrize(("first", "second"), [(0, 1), (2, 0)])
def test_other_stages_in_16_bits(
    one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config], first: int, second: int
) -> None:
    """The weights that bf16 rounds are kept in fp32, and go along: the first loss after the stop is the same."""
    train = {"precision": "bf16", "log_every": "1step", "length": "8step"}
    whole = vit(run={"name": "whole"}, train=train | {"zero_stage": first}, model={"depth": 1})
    broken = named(whole, "broken")
    two_ranks(run, whole)
    two_ranks(run_until, broken, 7)
    one_rank(run, vit(run={"name": "broken"}, train=train | {"zero_stage": second}, model={"depth": 1}))
    expected, got = ([line["train/loss"] for line in measured(cfg) if "train/lr" in line] for cfg in (whole, broken))
    assert got == pytest.approx(expected, abs=0.02)
    assert f"reshaped step_00000005 from 1 block on 2 ranks at ZeRO-{first} to 1 block on 1 rank" in said(broken)


@pytest.mark.parametrize("fused", [True, False])
def test_counters_go_where_the_optimizer_makes_them(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """On a GPU, a made-up one: what the fused AdamW keeps must lie there, or its first step after a reshape fails."""
    monkeypatch.setattr(reshape.distributed, "together", contextlib.nullcontext)
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2, device="cuda")
        fresh, resumed = (torch.optim.AdamW(model.parameters(), fused=fused) for _ in range(2))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        fresh.step()
        kept = {
            name: {key: [torch.zeros(())] if key == "step" else [torch.zeros(weight.shape)]
                   for key in ("fp32", "exp_avg", "exp_avg_sq", "step")}
            for name, weight in model.named_parameters()
        }  # fmt: skip
        monkeypatch.setattr(reshape.zero, "kept", lambda *_: kept)
        engine = SimpleNamespace(
            module=model, optimizer=resumed, zero_optimization_stage=lambda: 0, fp16_enabled=lambda: False
        )
        reshape.load(engine, Path(), {"lamb_step": None})
        devices = [
            {key: value.device for state in optimizer.state.values() for key, value in state.items()}
            for optimizer in (fresh, resumed)
        ]
    assert devices[0] == devices[1]
    assert devices[1]["step"].type == ("cuda" if fused else "cpu")
