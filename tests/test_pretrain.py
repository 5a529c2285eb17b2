"""Whole runs on real ranks: what they leave behind, and that stopping changes nothing."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpus
import pytest
from killable import Start, said, trained
from made import image_folder, numbered_images, png
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acn_scale import distributed, pretrain
from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.errors import RunFailed, UserError
from acn_scale.models import build_model
from acn_scale.runs import check_run_folder, read_metrics, run_folder

SCRIPT = Path(pretrain.__file__)


def run(cfg: Config) -> None:
    pretrain.train(cfg, distributed.local_device())


def run_until(cfg: Config, step: int) -> None:
    """As if the process had died in this step."""
    with dying(step):
        run(cfg)


@contextmanager
def dying(step: int) -> Iterator[None]:
    """What runs in this dies in this step."""

    class Died(BaseException):
        """No error, which would end the test's own processes."""

    def dying_step(engine, *args, **keywords):
        if engine.global_steps == step - 1:
            raise Died
        return whole_step(engine, *args, **keywords)

    whole_step, pretrain.train_step = pretrain.train_step, dying_step
    try:
        yield
    except Died:
        pass
    finally:
        pretrain.train_step = whole_step


SLOW = 3.0  # seconds


def run_slowly_built(cfg: Config) -> None:
    def slow_build(*args: Any, **keywords: Any) -> Any:
        time.sleep(SLOW)
        return build_model(*args, **keywords)

    with patch.object(pretrain, "build_model", slow_build):
        run(cfg)


def refused(cfg: Config) -> str:
    try:
        run(cfg)
    except (UserError, RunFailed) as error:
        return str(error)
    return ""


def measured(cfg: Config) -> list[dict]:
    """What a run measured, without its speeds."""
    lines = [json.loads(line) for line in (run_folder(cfg) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name[:5] not in ("speed", "memor")} for line in lines]


def named(cfg: Config, name: str) -> Config:
    return cfg.model_copy(update={"run": cfg.run.model_copy(update={"name": name})})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_equals_never_stopping(two_ranks: Callable, vit: Callable[..., Config], stage: int) -> None:
    """Bit for bit, with dropout, augmentation and accumulation, across the end of an epoch; twice, at other places."""
    train = {"zero_stage": stage, "global_batch_size": 96, "micro_batch_size": 16, "log_every": "1step"}
    data = {"augment": "cifar", "workers": int(stage == 2)}
    unbroken = vit(train=train, model={"dropout": 0.1}, data=data, optim={"schedule": "wsd"})
    broken = named(unbroken, "broken")
    two_ranks(run, unbroken)
    for step in (8, 14):
        two_ranks(run_until, broken, step)
    two_ranks(run, broken)
    assert measured(broken) == measured(unbroken)
    assert [line["step"] for line in measured(broken) if "train/loss" in line] == list(range(1, 21))


def test_a_run_goes_on_in_another_place(
    one_rank: Callable, vit: Callable[..., Config], digits: Path, tmp_path: Path
) -> None:
    """With its folder and its shards moved; other shards are refused."""
    unbroken, broken = vit(run={"name": "unbroken"}), vit(run={"name": "broken"})
    one_rank(run, unbroken)
    one_rank(run_until, broken, 8)
    shutil.copytree(run_folder(broken), tmp_path / "elsewhere/broken")
    shutil.copytree(digits, tmp_path / "shards")
    moved = {"run": {"name": "broken", "dir": str(tmp_path / "elsewhere")}}
    (refusal,) = one_rank(refused, vit(**moved, data={"train": f"{digits}/eval"}))
    assert "other shards" in refusal
    cfg = vit(**moved, data={split: f"{tmp_path}/shards/{split}" for split in ("train", "eval")})
    check_run_folder(cfg)
    one_rank(run, cfg)
    assert measured(cfg) == measured(unbroken)


def test_ranks_do_not_change_the_run(one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config]) -> None:
    one, two = vit(run={"name": "one"}), vit(run={"name": "two"}, train={"zero_stage": 2, "micro_batch_size": 4})
    one_rank(run, one)
    two_ranks(run, two)
    for a, b in zip(measured(one), measured(two), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_run_folder(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """Everything a run leaves behind; TensorBoard shows what metrics.jsonl holds, once a step, also after a resume."""
    cfg = vit(checkpoint={"keep": 1}, train={"log_every": "2step"})
    one_rank(run_until, cfg, 4)  # before its first checkpoint
    one_rank(run_until, cfg, 14)
    one_rank(run, cfg)
    folder = run_folder(cfg)
    names = {"config.json", "environment.json", "train.log", "metrics.jsonl", "tensorboard", "checkpoints", "health"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000020"]
    assert Config.model_validate(json.loads((folder / "config.json").read_text())) == cfg

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/skipped_steps", "grad_norm/block_03"} <= lines[0].keys()
    assert {"eval/loss", "eval/accuracy", "eval/depth_00/accuracy", "eval/depth_03/accuracy"} <= lines[-1].keys()
    assert lines[-1]["eval/depth_03/accuracy"] == lines[-1]["eval/accuracy"]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    written = {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}
    shown = [((event.step, tag), event.value) for tag in board.Tags()["scalars"] for event in board.Scalars(tag)]
    assert len(shown) == len(written)
    assert dict(shown) == pytest.approx(written, rel=1e-6)
    assert board.Tags()["images"] == ["depth/curve"]


def test_profile(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """A trace of each rank, of the steps asked for and what they are at, also where a run goes on to them."""
    cfg = vit(train={"length": "8step", "micro_batch_size": 4})
    two_ranks(run_until, cfg, 7)
    two_ranks(run, vit(train={"length": "8step", "micro_batch_size": 4}, profile={"steps": [6, 7]}))
    for rank in range(2):
        path = run_folder(cfg) / f"profile/steps_00000006_00000007_rank_{rank:05d}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert [names.count(phase) for phase in ("data", "forward", "exchange", "update")] == [4, 4, 2, 2]
        assert any(event.get("cat") == "cpu_op" for event in events)


def test_finished_run_stays_as_it_is(one_rank: Callable, vit: Callable[..., Config]) -> None:
    cfg = vit()
    one_rank(run, cfg)
    before = (run_folder(cfg) / "metrics.jsonl").read_text()
    one_rank(run, cfg)
    assert (run_folder(cfg) / "metrics.jsonl").read_text() == before


def test_half_written_checkpoint_is_never_chosen(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """Not a temporary folder, and not one whose last file is missing."""
    cfg = vit()
    one_rank(run_until, cfg, 14)
    checkpoints = run_folder(cfg) / "checkpoints"
    whole = checkpoints / "step_00000010"
    for name in ("step_00000012", ".step_00000015.tmp"):
        shutil.copytree(whole, checkpoints / name)
    (checkpoints / "step_00000012" / "state.json").unlink()
    one_rank(run, cfg)
    assert "resumed at step 10" in (run_folder(cfg) / "train.log").read_text()
    assert not (checkpoints / ".step_00000015.tmp").exists()


def test_refusals(one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """Each in one line that names the key or the file."""
    cfg = vit()
    two_ranks(run, cfg)
    with pytest.raises(UserError, match=r"config.json: optim.lr = 0.001 there, 0.002 now; "):
        check_run_folder(vit(optim={"lr": 2e-3}))
    assert two_ranks(refused, vit(train={"global_batch_size": 15}))[1].startswith("train.global_batch_size = 15: ")
    assert one_rank(refused, vit(model={"image_size": 16}))[0].endswith("model.image_size = 16, and nothing crops it")
    assert "no such file" in one_rank(refused, vit(data={"train": "nowhere"}))[0].lower()


def test_too_many_skipped_updates_end_the_run(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    cfg = vit(
        train={"precision": "bf16", "zero_stage": 1},
        data={"mean": [-1e2], "std": [1e-37]},
        health={"max_skipped_steps": 2},
    )
    first, second = two_ranks(refused, cfg)
    assert first == second
    assert first.startswith("step 2: ")
    assert "health.max_skipped_steps = 2" in first


def damaged_images(folder: Path) -> Path:
    """120 samples in six shards; the fourth of each cannot be decoded."""
    good, bad = (png(), "1"), (b"", "1")
    return image_folder(folder, [[good] * 3 + [bad] + [good] * 16] * 6)


def test_skipped_samples_are_logged_and_counted(
    two_ranks: Callable, vit: Callable[..., Config], tmp_path: Path
) -> None:
    """Each in one line, by the rank that met it; a resumed run goes on counting."""
    folder = damaged_images(tmp_path / "data")
    data = {"train": str(folder), "on_bad_sample": "skip", "max_bad_samples": 6, "streams": 2, "shuffle_window": 10}
    cfg = vit(data=data, train={"log_every": "1step"})
    two_ranks(run_until, cfg, 6)
    two_ranks(run, cfg)  # from step 5 on, which is within the first epoch
    counts = [line["data/bad_samples"] for line in measured(cfg) if "data/bad_samples" in line]
    assert len(counts) == 20
    assert counts == sorted(counts)
    assert 0 < counts[4] < counts[-1] == 6
    log = (run_folder(cfg) / "train.log").read_text()
    lines = [
        f"skipped {folder}/shard-{shard:06d}.tar: sample 3 (key {20 * shard + 3:06d}): an image" for shard in range(6)
    ]
    assert [log.count(line) for line in lines] == [1] * 6


def test_a_bad_sample_ends_the_run_on_all_ranks(tmp_path: Path, digits: Path) -> None:
    """At once, with one line on rank 0 alone."""
    arguments = command_line(tmp_path, damaged_images(tmp_path / "data"), digits / "eval")
    start = Start(arguments, tmp_path / "record", ranks=2)
    assert start.wait() == [2, 2]
    first, second = (said(tmp_path / "record", rank) for rank in range(2))
    assert len(re.findall(r"^error: .*/shard-00000\d.tar: sample 3 \(key 0000\d3\): an image that", first, re.M)) == 1
    for text in (first, second):
        assert "Traceback" not in text
    assert "error: " not in second


def test_the_first_steps_do_not_take_the_time_to_build(one_rank: Callable, vit: Callable[..., Config]) -> None:
    cfg = vit()
    one_rank(run_slowly_built, cfg)
    first = read_metrics(run_folder(cfg))[0]
    assert first["speed/samples_per_second"] > first["step"] * 16 / SLOW


def command_line(tmp_path: Path, train: Path, evaluation: Path, *overrides: str) -> list[str]:
    """Arguments of a small run of 120 steps, with a checkpoint every 10."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'run = {{name = "tiny", dir = "{tmp_path}/runs"}}\n'
        'model = {name = "vit", connectivity = "acn", depth = 2, dim = 16, num_heads = 2, image_size = 8, '
        "patch_size = 4, channels = 1, num_classes = 10}\n"
        f'data = {{kind = "images", train = "{train}", eval = "{evaluation}", streams = 4}}\n'
        "optim = {lr = 1e-3}\n"
        'train = {length = "120step", global_batch_size = 16, log_every = "1step"}\n'
        'eval = {every = "50step"}\n'
        'checkpoint = {every = "10step"}\n'
    )
    return ["--config", str(path), *overrides]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0)])
def test_sigkill_loses_nothing(tmp_path: Path, ranks: int, workers: int, kills: int = 3) -> None:
    """Killed at random moments and started again, a run takes the samples that the unbroken one takes and measures the
    same: it begins again after its last checkpoint, and no sample is left out."""
    data = numbered_images(tmp_path / "data", [17] * 15)
    arguments = command_line(tmp_path, data, data, "data.shuffle_window=30", f"data.workers={workers}")
    arguments += ["train.length=60step", "train.micro_batch_size=4", f"train.zero_stage={ranks}"]
    micro_steps = 4 // ranks
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert Start([*arguments, "run.name=unbroken"], unbroken, ranks).wait() == [0] * ranks
    for _ in range(kills):
        batches = random.randint(1, 100 * micro_steps // kills)
        Start(arguments, broken, ranks).kill(batches)
    assert Start(arguments, broken, ranks).wait() == [0] * ranks

    for rank in range(ranks):
        expected = [numbers for _, numbers in trained(unbroken, rank)]
        assert len(expected) == 60 * micro_steps
        after = 0  # the micro batch that comes next
        for place, numbers in trained(broken, rank):
            assert numbers == expected[place]
            assert place == after or (place < after and place % (10 * micro_steps) == 0)
            after = place + 1
        assert after == len(expected)
    board = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 61))
    cfg = load_config(Path(arguments[1]), arguments[2:])
    assert measured(cfg) == measured(named(cfg, "unbroken"))


def test_a_second_start_leaves_a_running_one_alone(tmp_path: Path) -> None:
    """By chance the same command twice, in a terminal and in the queue. When the first is killed, the next goes on."""
    data = numbered_images(tmp_path / "data", [17] * 15)
    arguments = [*command_line(tmp_path, data, data), "train.length=60step", "data.workers=1"]
    first = Start(arguments, tmp_path / "first", 1)
    first.after(3)
    second = Start(arguments, tmp_path / "second", 1)
    assert second.wait() == [1]
    assert "runs/tiny: process " in said(tmp_path / "second")
    assert "trains there" in said(tmp_path / "second")
    first.kill(11)
    assert Start(arguments, tmp_path / "second", 1).wait() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["deepspeed", "--num_gpus", "2"], ["torchrun", "--nproc-per-node", "2"]])
@pytest.mark.skipif(bool(gpus.FOUND), reason="DeepSpeed's launcher shows its processes the GPUs that are hidden here")
def test_launchers(tmp_path: Path, digits: Path, launcher: list[str]) -> None:
    """The same file under deepspeed and torchrun; a user's mistake gives one line and leaves nothing behind."""
    binary = Path(sys.executable).with_name(launcher[0])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{binary.parent}:{os.environ['PATH']}"}

    def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
        line = command_line(tmp_path, digits / "train", digits / "eval", "train.length=20step", *overrides)
        arguments = [binary, *launcher[1:], SCRIPT, *line]
        return subprocess.run(arguments, capture_output=True, text=True, env=environment)

    bad = launch("data.train=nowhere")
    assert bad.stderr.count("error: nowhere/index.json: No such file or directory") == 1
    assert "Traceback" not in bad.stderr.split("torch/distributed")[0]
    assert not (tmp_path / "runs").exists()
    if launcher[0] == "deepspeed":
        assert bad.returncode == 2
    good = launch("train.zero_stage=2")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "runs/tiny/checkpoints/step_00000020/state.json").exists()
