"""Runs of a study in processes of their own: what fails, dies or is stopped there, and what each takes."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from studied import note, setting, study

from acn_scale import distributed
from acn_scale.config import Config
from acn_scale.errors import RunFailed, UserError
from acn_scale.runs import run_folder
from acn_scale.studies import workers
from acn_scale.studies.runner import reproduce


def test_a_study_takes_the_cores_that_it_is_given() -> None:
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert workers.usual_workers() == (torch.cuda.device_count() or 1)
    finally:
        os.sched_setaffinity(0, cores)


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of residual was finished: step 1"):
        reproduce("twins", study("data.mean=[1e30]", "health.on_bad_step=fail"), setting(tmp_path, 0), workers=1)


def note_unless_killed(cfg: Config) -> None:
    """The residual run of seed 0 is killed each time, the ACN of seed 0 the first time."""
    marker = run_folder(cfg) / "killed"
    if cfg.run.name == "residual/seed=0" or (cfg.run.name == "acn/seed=0" and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    note(cfg)


def test_a_run_whose_process_is_killed_is_tried_again(tmp_path: Path) -> None:
    """Once; one that is killed then too is named. Those beside it are not concerned."""
    here = setting(tmp_path, 0, 1)
    reproduce("twins", replace(study(), measure=note_unless_killed), here, workers=2)
    said = json.loads((here.folder / "report/twins.json").read_text())["sentences"]
    assert said[1:] == ["failed: residual/seed=0: its process died, twice: was memory short?"]
    noted = sorted(str(path.parent.relative_to(here.folder)) for path in here.folder.glob("*/*/noted"))
    assert noted == ["acn/seed=0", "acn/seed=1", "residual/seed=1"]


def stopped_run(values: dict[str, Any], _: object) -> bool:
    """In the place of a run that a signal to its own process stops."""
    run_folder(Config.model_validate(values)).mkdir(parents=True)
    return False


def interrupted_run(values: dict[str, Any], _: object) -> bool:
    """In the place of a run that Ctrl-C to the study finds under way."""
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1)
    run_folder(Config.model_validate(values)).mkdir(parents=True)
    return True


@pytest.mark.parametrize("run", [stopped_run, interrupted_run])
def test_a_signal_stops_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[dict[str, Any], object], bool]
) -> None:
    """What is under way comes to its end, and nothing else is begun."""
    here = setting(tmp_path, 0, 1, 2)
    monkeypatch.setattr(workers, "_train", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(RunFailed, match=r"^twins: stopped, as a signal asked for; the same command goes on$"):
            reproduce("twins", study(), here, workers=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in here.folder.glob("*/*")] == ["seed=0"]


def test_each_worker_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own, as far as there are as many; this machine's workers have the CPU."""
    taken = []
    for number, gpus in enumerate((2, 2, 2, 0)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        workers._take_gpu(number, gpus)
        taken.append(os.environ.get("LOCAL_RANK"))
    assert taken == ["0", "1", "0", None]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed._export_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "1")
