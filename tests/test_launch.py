"""The launchers without Slurm: what they would submit, what a job is made of, and runs on this machine."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from submitit.core.utils import DelayedSubmission
from test_pretrain import command_line, measured, run

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.downstream.table import results_table
from acn_scale.runs import run_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launchers"))

import job  # noqa: E402
import local  # noqa: E402
import requeue  # noqa: E402
import status  # noqa: E402
import submission  # noqa: E402
import sweep  # noqa: E402
from cluster_options import add_options, duration  # noqa: E402
from snapshots import take_snapshot  # noqa: E402


def launch(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.command(ROOT / "launchers" / launcher, *arguments)


@pytest.fixture
def small(tmp_path: Path, digits: Path) -> list[str]:
    """Arguments of a run of 120 steps."""
    return command_line(tmp_path, digits / "train", digits / "eval")


def test_dry_run_prints_the_sbatch_file(tmp_path: Path, small: list[str]) -> None:
    """With every option where Slurm looks for it, and nothing written."""
    options = "--nodes 2 --gpus-per-node 4 --cpus-per-task 8 --mem 100 --time 1-02:30 --partition p --account a --qos q"
    extra = "--constraint c --exclude n7 --extra reservation=r --extra exclusive --signal-delay 300 --tries 5"
    done = launch("pretrain.py", *small, *options.split(), *extra.split(), "--dry-run", "train.global_batch_size=64")
    assert done.returncode == 0, done.stderr
    lines = set(done.stdout.splitlines())
    expected = (
        "nodes=2 ntasks-per-node=4 gpus-per-node=4 cpus-per-task=8 mem=100G time=1590 partition=p account=a qos=q"
    )
    expected += " constraint=c exclude=n7 reservation=r exclusive requeue signal=USR2@300 job-name=tiny"
    assert {f"#SBATCH --{option}" for option in expected.split()} <= lines
    assert "--kill-on-bad-exit=1 --cpus-per-task=8" in done.stdout
    assert f"requeue.py --tries 5 $code {tmp_path}/runs/tiny" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_mistakes_are_found_before_anything_is_submitted(tmp_path: Path, small: list[str]) -> None:
    """In one line, with exit code 2."""
    for arguments, message in (
        (["--nodes", 3], "train.global_batch_size = 16: must be a multiple of 3 (3 ranks)"),
        (["data.train=nowhere"], "nowhere/index.json: No such file or directory"),
        (["--cluster", "local", "--nodes", 2], "--nodes 2: --cluster local is this machine alone"),
        (["optim.rl=1"], "optim.rl: no such key; the nearest is optim.lr"),
    ):
        done = launch("pretrain.py", *small, *arguments, "--dry-run")
        assert done.returncode == 2
        assert f"error: {message}" in done.stderr or f": {message}" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    for arguments in (["--time", "soon"], ["--nodes", "0"]):
        assert launch("pretrain.py", *small, *arguments).returncode == 2


def test_no_run_is_submitted_twice(tmp_path: Path, small: list[str]) -> None:
    """Two jobs would train in one folder."""
    for values in (["--seeds", 0, 0], ["--grid", "optim.lr=1e-3,1e-3"]):
        done = launch("sweep.py", *small, *values, "--dry-run")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "of two of these runs; the same seed or value may be named twice" in done.stderr


@pytest.mark.parametrize(("text", "minutes"), [("90", 90), ("1:30", 90), ("2-00:10", 2890), ("0:01", 1)])
def test_durations(text: str, minutes: int) -> None:
    assert duration(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "x", "1:2:3", "-1", "1-30", "0:00"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        duration(text)


def test_a_snapshot_does_not_change(
    vit: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code and config are the same folder; others are another one, and the first one stays as it is."""
    first = take_snapshot(run_folder(vit()), vit())
    assert take_snapshot(run_folder(vit()), vit()) == first
    assert load_config(first / "config.json") == vit()
    assert (first / "acn_scale/pretrain.py").read_bytes() == (ROOT / "acn_scale/pretrain.py").read_bytes()
    assert (first / "COMMIT").read_text().strip()
    other = take_snapshot(run_folder(vit()), vit(health={"hang_timeout": 60.0}))
    assert other != first
    assert load_config(first / "config.json") == vit()


def options(*arguments: str) -> argparse.Namespace:
    """Where to run, as a launcher reads it."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_a_killed_run_is_no_success(tmp_path: Path, small: list[str]) -> None:
    """Whatever comes after it. Of a signal the exit code is negative."""
    config = tmp_path / "small.json"
    config.write_text(load_config(Path(small[1]), small[2:]).model_dump_json())
    (tmp_path / "killed.py").write_text(
        "import json, os, sys\nif json.load(open(sys.argv[2]))['run']['seed'] == 0:\n    os.kill(os.getpid(), 9)\n"
    )
    configs = [load_config(config, [f"run.name=seed{seed}", f"run.seed={seed}"]) for seed in (0, 1)]
    program = "../../../../killed.py"  # from the snapshot in a run's jobs/
    code, _ = submission.launch_all(options("--cluster", "local", "--tries", "1"), "x", configs, program)
    assert code == -9
    assert local.worst([1, 0, -9, 0]) == -9


def test_grid() -> None:
    combinations = sweep.combinations(["optim.lr=1e-3,3e-3", "model.connectivity=acn,residual"], [0, 1])
    assert len(combinations) == 8
    assert combinations[1] == ["optim.lr=1e-3", "model.connectivity=acn", "run.seed=1"]
    assert sweep.run_name(combinations[-1]) == "lr=3e-3-connectivity=residual-seed=1"


def test_sweep_dry_run(tmp_path: Path, small: list[str]) -> None:
    done = launch("sweep.py", *small, "--grid", "optim.lr=1e-3,3e-3", "--seeds", 0, 1, 2, "--parallel", 2, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-5%2" in done.stdout
    assert f"{tmp_path}/runs/tiny/lr=3e-3-seed=2" in done.stdout
    assert not (tmp_path / "runs").exists()
    bad = launch("sweep.py", *small, "--grid", "optim.lr", "--dry-run")
    assert (bad.returncode, bad.stderr) == (2, "error: --grid optim.lr: must be key.sub=value,value,...\n")


def end(run: Path, code: int, step: int, tries: int = 3) -> bool:
    folder = run / f"checkpoints/step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("{}")
    (run / "jobs").mkdir(exist_ok=True)
    return requeue.worth_another(run, code, tries)


def test_what_is_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that gets on, as often as need be; one that does not, so many times; a mistake or an end, never."""
    run = tmp_path / "run"
    assert [end(run, 75, step) for step in (10, 20, 30, 40, 50)] == [True] * 5
    assert [end(run, 1, 50), end(run, 1, 60), end(run, 1, 60), end(run, 1, 60)] == [True, True, True, False]
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{run}: given up after 3 starts without a checkpoint after step 60: exit code 1"
    )
    assert end(run, 1, 70)
    assert not end(run, 2, 80)
    assert not end(run, 0, 90)
    assert end(run, 1, 90), "started by hand after its end"


def test_a_run_that_is_refused_says_why(tmp_path: Path, small: list[str]) -> None:
    """In the table of states and in that of results, though it was never opened."""
    run, reason = tmp_path / "runs/tiny", "gone/index.json: No such file or directory; tools/make_*_shards.py write"
    done = launch("pretrain.py", *small, "--cluster", "local", "data.eval=gone")
    assert done.returncode == 2
    assert not (run / "environment.json").exists()
    assert status.status(run, {})[-1].startswith(reason)
    assert f"failed: {run}: {reason}" in results_table([run.parent])


@pytest.mark.slow
def test_local_starts_again_what_dies(tmp_path: Path, small: list[str], two_ranks: Callable) -> None:
    """Two processes here; one is killed; the run goes on by itself and ends as the unbroken one."""
    small = [*small, "train.zero_stage=1", "checkpoint.every=20step"]
    command = [sys.executable, ROOT / "launchers/pretrain.py", *small, "--cluster", "local", "--tasks-per-node", "2"]
    launcher = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs/tiny"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/step_00000020/state.json").exists():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((folder / "health/rank_00001.json").read_text())["pid"], signal.SIGKILL)
    said = launcher.communicate(timeout=240)[1]
    assert launcher.returncode == 0, said
    assert "to be started again from step" in said
    assert "does not answer any more" in said
    cfg, unbroken = (load_config(Path(small[1]), [*small[2:], f"run.name={name}"]) for name in ("tiny", "unbroken"))
    two_ranks(run, unbroken)
    assert measured(cfg) == measured(unbroken)
    row = status.status(folder, {})
    assert row[1:3] == ["finished", "120/120"]
    assert row[6] == "1"  # restarts


def test_debug_is_this_process(tmp_path: Path, small: list[str]) -> None:
    done = launch("pretrain.py", *small, "--cluster", "debug", "train.length=5step")
    assert done.returncode == 0, done.stderr
    assert "finished at step 5" in done.stderr
    table = launch("status.py", tmp_path / "runs").stdout.splitlines()
    assert table[1].split()[:3] == [f"{tmp_path}/runs/tiny", "finished", "5/5"]
    nothing = launch("status.py", tmp_path / "nowhere")
    assert (nothing.returncode, nothing.stderr) == (2, f"error: {tmp_path}/nowhere: no runs in there\n")


def test_a_stage_has_the_cores_of_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one task, in which a launcher starts a trainer a GPU; each of these takes its share of them."""
    args = options("--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "4")
    values = submission._tool_parameters(args, "glue", tmp_path / "jobs/snapshot")
    assert (values["nodes"], values["ntasks_per_node"], values["gpus_per_node"]) == (1, 1, 8)
    assert values["cpus_per_task"] == 32 and "--cpus-per-task=32" in values["srun_args"]
    assert "cpus_per_task" not in submission._tool_parameters(options(), "glue", tmp_path / "jobs/snapshot")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "32")
    assert job.threads(8) == "4"


def test_a_tool_is_queued_again_when_its_time_is_up(tmp_path: Path) -> None:
    """As submitit does it: what it was is put into the queue."""
    again = DelayedSubmission(job.Tool(), ["tool.py"], "marker", "snapshot", 2)._checkpoint_function()
    assert isinstance(again.function, job.Tool) and again.args == (["tool.py"], "marker", "snapshot", 2)
    (tmp_path / "tool.py").write_text("print('done')")
    DelayedSubmission(job.Tool(), [f"{tmp_path}/tool.py"], f"{tmp_path}/marker", str(tmp_path), 1).result()
    assert (tmp_path / "marker").exists()
