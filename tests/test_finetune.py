"""Round the training of a fine-tuning run: what it began from, what fails after it, what is not done twice, grids."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import forked
import pytest
from glue_runs import ROOT, fine_tuning
from ranks import Ranks
from test_launch import launch, status
from test_pretrain import run, run_until

from acn_scale.config import Config
from acn_scale.convert import convert, read_model, start
from acn_scale.data.shards import INDEX_NAME
from acn_scale.downstream.table import results_table
from acn_scale.errors import UserError
from acn_scale.results import read_measurements
from acn_scale.runs import read_json, run_folder
from acn_scale.stopping import EXIT_STOPPED


def test_a_source_that_holds_other_weights_now(
    one_rank: Ranks, vit: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused where a run is finished, whose results would be taken for the new ones'; one that is not goes on."""
    for seed in (1, 2):
        first = vit(run={"name": f"first{seed}", "seed": seed}, train={"length": "1step"})
        one_rank(run, first)
        convert(str(run_folder(first)), "safetensors", tmp_path / f"source{seed}")
    source = tmp_path / "source"
    shutil.copytree(tmp_path / "source1", source)
    cfg = vit(run={"name": "second"}, train={"length": "10step", "init_from": str(source)})
    one_rank(run_until, cfg, 7)
    digest = read_model(source).digest()
    assert read_json(run_folder(cfg) / start.START) | {"data": None} == {
        "source": str(source), "weights": digest, "data": None
    }  # fmt: skip
    start.check_start(cfg)
    assert not caplog.records
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "source2", source)
    start._digest.cache_clear()
    start.check_start(cfg)
    assert f"second: began from other weights than {source} holds now" in caplog.text
    one_rank(run, cfg)
    assert read_json(run_folder(cfg) / start.START)["weights"] == digest
    with pytest.raises(UserError, match=f"{source} holds now; remove that folder to train it anew, or give this run"):
        start.check_start(cfg)
    shutil.rmtree(source)
    start._digest.cache_clear()
    start.check_start(cfg)


def finetune(cfg: Config, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(cfg.model_dump_json())
    return forked.command(ROOT / "acn_scale/finetune.py", "--config", folder / "config.json")


def test_what_fails_after_training_is_told(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """In the table of results and in that of states. Begun again, the run is evaluated, and then no more."""
    shards = tmp_path / "shards"
    shutil.copytree(glue_shards / "stsb", shards / "stsb")
    index = shards / "stsb/test" / INDEX_NAME
    whole = index.read_bytes()
    index.write_text("[")
    cfg = fine_tuning(tmp_path / "runs", glue_encoder, shards, "stsb", "train.length=2step")
    done = finetune(cfg, tmp_path)
    assert (done.returncode, f"error: {index}: not an index" in done.stderr) == (2, True), done.stderr
    folder = run_folder(cfg)
    reason = read_json(folder / "health/failure.json")["reason"]
    assert reason.startswith(f"rank 0, after training: {index}: not an index")
    assert f"failed: {folder}: {reason}" in results_table([folder.parent])
    assert finetune(cfg, tmp_path).returncode == 2
    row = status.status(folder, {})
    assert (row[1], row[-1]) == ("failed", reason)
    index.write_bytes(whole)
    assert finetune(cfg, tmp_path).returncode == 0
    assert status.status(folder, {})[1] == "finished"
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tsv")}
    assert len(made) == 3  # predictions of two sets, and the server's file
    assert finetune(cfg, tmp_path).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tsv")} == made
    os.utime(index)  # shards that were made anew
    assert finetune(cfg, tmp_path).returncode == 0
    assert all(path.stat().st_mtime_ns > before for path, before in made.items())
    results = folder / "eval/stsb.json"
    digest = read_measurements(folder)[0].checkpoint
    results.write_text(results.read_text().replace(digest, "of a checkpoint on the way"))
    assert finetune(cfg, tmp_path).returncode == 0
    assert {each.checkpoint for each in read_measurements(folder)} == {digest}


def test_results_say_what_task_a_run_began_from(
    one_rank: Ranks, glue_encoder: Path, glue_shards: Path, tmp_path: Path
) -> None:
    """And are no seeds of those that did not."""
    mnli = fine_tuning(tmp_path, glue_encoder, glue_shards, "mnli", "train.length=1step", "run.name=x/mnli")
    assert finetune(mnli, tmp_path).returncode == 0
    for seed, source in ((0, glue_encoder), (1, run_folder(mnli))):
        values = ["train.length=1step", f"run.name=x/mrpc/{seed}", f"run.seed={seed}", f"train.init_from={source}"]
        assert finetune(fine_tuning(tmp_path, glue_encoder, glue_shards, "mrpc", *values), tmp_path).returncode == 0
    shutil.rmtree(run_folder(mnli))  # it is known all the same
    notes = [{each.note for each in read_measurements(tmp_path / f"x/mrpc/{seed}")} for seed in (0, 1)]
    assert all("mnli" not in (note or "") for note in notes[0])
    assert all(note.startswith("from mnli") for note in notes[1])
    assert "(best of 2)" in results_table([tmp_path / "x"])


def local(name: str, encoder: Path, shards: Path, folder: Path, tasks: list[str], *more: str) -> list[object]:
    """Arguments of launchers/glue.py for runs of two steps on this machine."""
    command = ["--from", encoder, "--data", shards, "--cluster", "local", "--tries", "1", "--name", name]
    values = [f"run.dir={folder}", "train.length=2step", "train.global_batch_size=16"]
    return [*command, *values, *more, "--tasks", *tasks]


def test_what_waits_for_a_run_that_fails_is_not_begun(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """From a half-trained network it would be trained for good. What cannot begin at all is found before anything."""
    shards, runs = tmp_path / "shards", tmp_path / "runs"
    for task in ("mnli", "mrpc"):
        shutil.copytree(glue_shards / task, shards / task)
    tasks = ["mnli", "mrpc", "--from-mnli"]
    grid = ["--grid", "mnli:optim.lr=1e30", "mnli:health.on_bad_step=fail"]
    done = launch("glue.py", *local("x", glue_encoder, shards, runs, tasks, "train.length=8step"), *grid)
    assert done.returncode != 0
    (start,) = (runs / "x/mnli").iterdir()
    assert f"{start}: did not come to its end; not begun: {runs}/x/mrpc/seed=0" in done.stderr, done.stderr
    assert not (runs / "x/mrpc").exists()
    grid = ["--grid", "mrpc:train.global_batch_size=15", "--tasks-per-node", "2"]
    again = launch("glue.py", *local("y", glue_encoder, shards, runs, tasks), *grid)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1), again.stderr
    assert "train.global_batch_size = 15: must be a multiple of 2" in again.stderr
    assert not (runs / "y").exists()


@pytest.mark.slow
def test_ctrl_c_stops_a_grid(glue_encoder: Path, glue_shards: Path, tmp_path: Path) -> None:
    """And not the run alone that trains just then."""
    arguments = local("x", glue_encoder, glue_shards, tmp_path, ["cola", "stsb"], "train.length=100000step")
    command = [sys.executable, ROOT / "launchers/glue.py", *arguments]
    heart, pid = tmp_path / "x/cola/seed=0/health/rank_00000.json", 0
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts behind it ignore it
    launcher = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        deadline = time.monotonic() + 120
        while not (heart.exists() and json.loads(heart.read_text())["step"] > 3):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        pid = json.loads(heart.read_text())["pid"]
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=120)[1]
    finally:
        launcher.kill()
        with suppress(ProcessLookupError):
            os.kill(pid or launcher.pid, signal.SIGKILL)
    assert launcher.returncode == EXIT_STOPPED, said
    assert not (tmp_path / "x/stsb/seed=0/environment.json").exists()
