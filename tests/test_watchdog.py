"""When ranks go wrong, the job ends on all of them and says which rank it was and where; signals stop a run safely."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import forked
import pytest
from killable import Start, pretrain, said, trained
from made import numbered_images
from test_pretrain import command_line, measured, refused

from acn_scale import distributed, saving
from acn_scale.checkpoint import complete
from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.runs import FAILURE, health_folder, run_folder
from acn_scale.stopping import EXIT_STOPPED
from acn_scale.watchdog import EXIT_ABORTED, Watchdog

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run of 120 steps on samples that can be told apart."""
    data = numbered_images(tmp_path / "data", [17] * 15)
    return command_line(tmp_path, data, data, "data.shuffle_window=30", "health.hang_timeout=3")


def failure(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "runs/tiny/health/failure.json").read_text())


@pytest.mark.parametrize("phase", ["data", "backward"])
def test_a_rank_that_hangs_is_named(tmp_path: Path, arguments: list[str], phase: str) -> None:
    """And the other one waits for it, in the backward pass for its gradients."""
    start = Start(arguments, tmp_path / "record", 2, hang=(1, 25, phase))
    start.after(25)
    begin = time.monotonic()
    assert start.wait() == [EXIT_ABORTED] * 2
    assert time.monotonic() - begin < 3 + 20
    reason = failure(tmp_path)["reason"]
    place = rf"rank 1 \(.*, process \d+\), step 26, {phase}, hangs for \d+ s \(health.hang_timeout = 3\)"
    assert re.match(place, reason)
    for rank in range(2):
        assert "rank 1 (" in said(tmp_path / "record", rank)


def test_an_error_ends_all_ranks_and_is_shown(tmp_path: Path, arguments: list[str]) -> None:
    """Whole where it happened, by its name on the other rank, which waits in its backward pass."""
    start = Start(arguments, tmp_path / "record", 2, hang=(1, 25, "error"))
    assert start.wait() == [EXIT_ABORTED] * 2
    assert re.match(r"rank 1 \(.*\), step 26, backward, ZeroDivisionError: ", failure(tmp_path)["reason"])
    assert "Traceback" in said(tmp_path / "record", 1) and "killable.py" in said(tmp_path / "record", 1)
    for rank in range(2):
        last = said(tmp_path / "record", rank).strip().splitlines()[-1]
        assert re.search(rf"rank {rank} ends at step 2\d, backward: rank 1 \(.*ZeroDivisionError", last)


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, arguments: list[str]) -> None:
    """Stopped, it holds its connections, and nothing but its heartbeat tells."""
    start = Start(arguments, tmp_path / "record", 2)
    start.after(25)
    start.send(signal.SIGSTOP, 0)
    start.processes[1].join(30)
    assert start.processes[1].exitcode == EXIT_ABORTED
    assert re.match(r"rank 0 \(.*\), step \d+, \w+, does not answer any more", failure(tmp_path)["reason"])
    start.send(signal.SIGCONT, 0)
    assert start.wait() == [EXIT_ABORTED] * 2


def fail_after_another(run: Path, errors: Path) -> None:
    with errors.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    with Watchdog(run, 0, 2, timeout=60):
        (health_folder(run) / FAILURE).write_text('{"rank": 1, "reason": "rank 1 hangs"}')
        raise ConnectionError("reset by peer")


def test_a_rank_that_others_left_ends_as_they_do(tmp_path: Path) -> None:
    """What their end does to it is no error of its own: the last line says why they left."""
    health_folder(tmp_path).mkdir()
    process = forked.process(fail_after_another, tmp_path, tmp_path / "errors")
    process.join(60)
    assert process.exitcode == EXIT_ABORTED
    *_, error, reason = (tmp_path / "errors").read_text().splitlines()
    assert (error, reason) == ("ConnectionError: reset by peer", "rank 0 ends at step 0, setup: rank 1 hangs")


def test_a_rank_that_dies_is_named(tmp_path: Path, arguments: list[str]) -> None:
    start = Start(arguments, tmp_path / "record", 2)
    start.after(25)
    start.send(signal.SIGKILL, 1)
    assert start.wait() == [EXIT_ABORTED, -signal.SIGKILL]
    assert re.match(r"rank 1 \(.*\), step \d+, \w+, does not answer any more", failure(tmp_path)["reason"])
    # The next start clears that away and goes on.
    assert Start(arguments, tmp_path / "record", 2).wait() == [0, 0]
    assert not (tmp_path / "runs/tiny/health/failure.json").exists()


def run_that_saves_slowly(cfg: Config) -> tuple[str, float]:
    """On rank 1: in small pieces, each of which is a while on its way to the disk."""
    begin, sync = time.monotonic(), os.fsync

    def slow(file: int) -> None:
        if threading.current_thread().name == "checkpoint":
            time.sleep(0.7)
        sync(file)

    slowly = patch.object(os, "fsync", slow) if distributed.rank() == 1 else contextlib.nullcontext()
    with slowly, patch.object(saving, "CHUNK", 2**11):
        return refused(cfg), time.monotonic() - begin


def test_a_slow_save_is_no_hang(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """Both ranks wait for it, at the end of the run, for longer than health.hang_timeout; and it is saved."""
    train = {"length": "5step", "zero_stage": 1}
    cfg = vit(model={"depth": 1}, train=train, health={"hang_timeout": 3.0})
    for message, seconds in two_ranks(run_that_saves_slowly, cfg):
        assert message == ""
        assert seconds > 3 + 6
    assert [path.name for path in complete(run_folder(cfg))] == ["step_00000005"]


def pretrain_with_a_disk_that_hangs(arguments: list[str], record: Path) -> None:
    def hang(file: int) -> None:
        if threading.current_thread().name == "checkpoint":
            time.sleep(1000)

    os.fsync = hang
    pretrain(arguments, record, 0, 1, 0, None)


def test_a_save_that_hangs_is_a_hang(tmp_path: Path, arguments: list[str]) -> None:
    """The next one waits for it."""
    process = forked.process(pretrain_with_a_disk_that_hangs, arguments, tmp_path / "record")
    process.join(60)
    assert process.exitcode == EXIT_ABORTED
    assert re.match(r"rank 0 \(.*\), step 20, checkpoint, hangs for \d+ s", failure(tmp_path)["reason"])


def test_sigusr1_prints_the_stacks_of_all_ranks(tmp_path: Path, arguments: list[str]) -> None:
    """Sent to one rank that waits; the run goes on."""
    start = Start([*arguments, "health.hang_timeout=60"], tmp_path / "record", 2)
    start.after(25)
    start.send(signal.SIGUSR1, 1)
    assert start.wait() == [0, 0]
    for rank in range(2):
        text = (tmp_path / f"runs/tiny/health/stack_{rank:05d}.txt").read_text()
        assert text.startswith(f"rank {rank}, step ")
        assert 'pretrain.py", line' in text
    assert "pretrain.py" in said(tmp_path / "record", 1)


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, arguments: list[str]) -> None:
    """At the same step, saved, with loader processes that get it too; the run then goes on as if never stopped."""
    arguments = [*arguments, "data.workers=1", "health.hang_timeout=60"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert Start([*arguments, "run.name=unbroken"], unbroken, 2).wait() == [0, 0]
    at = 0
    for number in (signal.SIGTERM, signal.SIGUSR2):
        start = Start(arguments, broken, 2)
        start.after(23)
        for child in Path(f"/proc/{start.processes[1].pid}/task/{start.processes[1].pid}/children").read_text().split():
            os.kill(int(child), number)
        start.send(number, 1)
        assert start.wait() == [EXIT_STOPPED] * 2
        before, at = at, len(trained(broken))
        assert before + 23 <= at < 120
        assert len(trained(broken, 1)) == at
        assert (tmp_path / f"runs/tiny/checkpoints/step_{at:08d}/state.json").exists()
    assert Start(arguments, broken, 2).wait() == [0, 0]
    for rank in range(2):
        assert trained(broken, rank) == trained(unbroken, rank)
    cfg = load_config(Path(arguments[1]), arguments[2:])
    assert measured(cfg) == measured(load_config(Path(arguments[1]), [*arguments[2:], "run.name=unbroken"]))
