"""The launchers without Slurm: what they would submit, what a job is made of, and runs on this machine."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from test_pretrain import command_line, measured, run

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.downstream.table import results_table
from acn_scale.runs import run_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launchers"))

import chain as chain_module  # noqa: E402
import requeue  # noqa: E402
import status  # noqa: E402
import submission  # noqa: E402
import sweep  # noqa: E402
from cluster_options import add_options, duration  # noqa: E402


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


def test_without_slurm_nothing_is_begun(
    tmp_path: Path, small: list[str], chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it a traceback, whatever is submitted."""
    monkeypatch.setenv("PATH", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["pretrain.py", *small],
        ["chain.py", "--config", chain],
        ["study.py", "depth-vit", "--out", tmp_path / "studies"],
    ):
        done = launch(*command)
        assert (done.returncode, "error: --cluster slurm: there is no sbatch" in done.stderr) == (2, True), done.stderr
        assert sorted(tmp_path.rglob("*")) == before


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
    first = submission.prepare(run_folder(vit()), vit())
    assert submission.prepare(run_folder(vit()), vit()) == first
    assert load_config(first / "config.json") == vit()
    assert (first / "acn_scale/pretrain.py").read_bytes() == (ROOT / "acn_scale/pretrain.py").read_bytes()
    assert (first / "COMMIT").read_text().strip()
    other = submission.prepare(run_folder(vit()), vit(health={"hang_timeout": 60.0}))
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
    assert submission.worst([1, 0, -9, 0]) == -9


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


GRID = """
[[stage]]
name = "grid"
after = []
tool = "sweep"
arguments = ["--config", "{config}", "--cluster", "local", "run.name=grid", "train.length=2step", "--tries", "1"]
[[stage]]
name = "states"
tool = "status"
arguments = ["{folder}/runs"]
even_after_failure = true
[[stage]]
name = "last"
tool = "status"
arguments = ["{folder}/runs"]
"""

CHAIN = """
name = "chain/tiny"
dir = "{folder}"
[[stage]]
name = "shards"
tool = "make_image_shards"
arguments = ["--source", "digits", "--split", "train", "--out", "{folder}/more", "--workers", "1"]
[[stage]]
name = "train"
after = []
config = "{config}"
overrides = ["train.length=4step"]
[[stage]]
name = "convert"
tool = "convert_checkpoint"
arguments = ["{{train}}", "--to", "safetensors", "--out", "{folder}/export"]
"""


@pytest.fixture
def chain(tmp_path: Path, small: list[str]) -> Path:
    """Of a tool, a run and a tool that takes the run."""
    path = tmp_path / "chain.toml"
    config = tmp_path / "small.json"
    config.write_text(load_config(Path(small[1]), small[2:]).model_dump_json())
    path.write_text(CHAIN.format(folder=tmp_path, config=config))
    return path


def test_a_chain_goes_on_after_a_stage_that_failed(tmp_path: Path, chain: Path) -> None:
    """What is done is not done again; what could be wrong is found before anything runs."""
    (tmp_path / "export/in_the_way").mkdir(parents=True)
    failed = launch("chain.py", "--config", chain, "--cluster", "local")
    assert failed.returncode == 2
    assert f"--out {tmp_path}/export: is there already" in failed.stderr
    (tmp_path / "export/in_the_way").rmdir()
    states = [line.split()[:2] for line in launch("chain.py", "--config", chain, "--dry-run").stdout.splitlines()]
    assert [(name, state) for name, state, *_ in states] == [("shards", "done"), ("train", "done"), ("convert", "to")]
    made = (tmp_path / "more/index.json").stat().st_mtime_ns
    done = launch("chain.py", "--config", chain, "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "export/model.safetensors").exists()
    assert (tmp_path / "more/index.json").stat().st_mtime_ns == made
    other = chain.read_text().replace('"1"]', '"2"]')  # a stage that nothing waits for
    chain.write_text(other)
    lines = launch("chain.py", "--config", chain, "--dry-run").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["to", "done", "done"]


def states(chain: Path) -> dict[str, str]:
    """Of each stage, "done" or "to"."""
    done = launch("chain.py", "--config", chain, "--dry-run")
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}


def test_a_run_that_began_from_other_stages_is_not_done(tmp_path: Path, chain: Path) -> None:
    """Its folder has to go, or the note of what it began from; other workers of a stage count as another stage."""
    chain.write_text(chain.read_text().replace("after = []\n", ""))
    assert launch("chain.py", "--config", chain, "--cluster", "local").returncode == 0
    assert set(states(chain).values()) == {"done"}
    chain.write_text(chain.read_text().replace('"--workers", "1"', '"--workers", "2"'))
    refused = launch("chain.py", "--config", chain, "--cluster", "local")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    run = tmp_path / "runs/tiny"
    assert (
        f"stage train: {run} began after other stages than shards as they are now; remove or rename" in refused.stderr
    )
    (marker,) = (tmp_path / "chain/tiny/done").glob("train-*")
    assert f"or remove {marker} to keep it" in refused.stderr
    marker.rename(tmp_path / "marker")
    assert states(chain) == {"shards": "to", "train": "done", "convert": "to"}
    (tmp_path / "marker").rename(marker)
    run.rename(tmp_path / "runs/before")
    assert states(chain) == {"shards": "to", "train": "to", "convert": "to"}
    failed = launch("chain.py", "--config", chain, "--cluster", "local")
    assert f"{tmp_path}/export: is there already" in failed.stderr
    assert states(chain) == {"shards": "done", "train": "done", "convert": "to"}


def test_a_conversion_is_made_anew(tmp_path: Path, chain: Path) -> None:
    """After a kill between folder and marker too; a folder with anything else in it stays as it is."""
    chain.write_text(chain.read_text().replace('"--to"', '"--replace", "--to"'))
    assert launch("chain.py", "--config", chain, "--cluster", "local").returncode == 0
    (marker,) = (tmp_path / "chain/tiny/done").glob("convert-*")
    marker.unlink()
    weights = tmp_path / "export/model.safetensors"
    weights.write_bytes(b"not whole")
    assert launch("chain.py", "--config", chain, "--cluster", "local").returncode == 0
    assert weights.stat().st_size > 1000
    marker.unlink()
    (tmp_path / "export/mine.txt").write_text("mine")
    failed = launch("chain.py", "--config", chain, "--cluster", "local")
    assert failed.returncode == 2
    assert f"--out {tmp_path}/export: is there already, with mine.txt, which would be lost" in failed.stderr
    assert (tmp_path / "export/mine.txt").exists() and weights.exists()


@pytest.fixture
def grid(tmp_path: Path, small: list[str]) -> Path:
    """A chain of a launcher that takes a TOML file, what comes even after its failure, and what does not."""
    path = tmp_path / "grid.toml"
    path.write_text(f'name = "chain/grid"\ndir = "{tmp_path}"\n' + GRID.format(folder=tmp_path, config=small[1]))
    return path


def test_a_config_of_a_stage_is_that_of_the_submission(tmp_path: Path, grid: Path, small: list[str]) -> None:
    """It lies in the snapshot; an edit makes the stage another one."""
    (tmp_path / "chain/grid/done").mkdir(parents=True)
    (step,) = chain_module.steps_of(chain_module.read_chain(grid))[:1]
    snapshot = submission.prepare(tmp_path / "chain/grid", chain_module.read_chain(grid), step.files)
    config = Path(small[1])
    before, edited = config.read_text(), config.read_text().replace("lr = 1e-3", "lr = 2e-3")
    config.write_text(edited)
    command = step.run(snapshot)
    assert load_config(Path(command[command.index("--config") + 1])).optim.lr == 1e-3
    assert chain_module.steps_of(chain_module.read_chain(grid))[0].digest != step.digest
    config.write_text(before)
    assert chain_module.steps_of(chain_module.read_chain(grid))[0].digest == step.digest


def test_what_comes_even_after_a_failure(tmp_path: Path, grid: Path) -> None:
    """Is run, is not done by that, and does not make the chain a success."""
    whole = grid.read_text()
    grid.write_text(whole.replace('"run.name=grid"', '"run.name=grid", "train.init_from=nowhere"'))
    failed = launch("chain.py", "--config", grid, "--cluster", "local")
    assert failed.returncode == 2
    assert "stage 2 of 3, states" in failed.stderr and "stage 3" not in failed.stderr
    assert f"{tmp_path}/runs/grid" in failed.stdout
    assert states(grid) == {"grid": "to", "states": "to", "last": "to"}
    shutil.rmtree(tmp_path / "runs")
    grid.write_text(whole)
    done = launch("chain.py", "--config", grid, "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert states(grid) == {"grid": "done", "states": "done", "last": "done"}


def test_a_stage_runs_where_it_says() -> None:
    """Else where the command line says."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(["--nodes", "4", "--gpus-per-node", "8", "--partition", "gpu", "--extra", "one=1"])
    stage = chain_module.Stage(name="data", tool="status", options=["--gpus-per-node", "0", "--extra", "two=2"])
    own = stage.over(args)
    assert (own.nodes, own.gpus_per_node, own.partition, own.extra) == (4, 0, "gpu", ["one=1", "two=2"])
    assert (args.gpus_per_node, args.extra) == (8, ["one=1"])
    assert vars(chain_module.Stage(name="data", tool="status").over(args)) == vars(args)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('tool = "convert_checkpoint"', 'tool = "nothing"', "tool = nothing: no such file in tools/ or launchers/"),
        ('tool = "convert_checkpoint"', 'tool = "../tools/convert_checkpoint"', "no such file"),
        ("after = []", 'after = ["convert"]', "stage train: after = convert: must be a stage above it"),
        ('name = "convert"', 'name = "train"', "stage train: there are two of this name"),
        ("train.length=4step", "train.length=4", "train.length"),
        ("after = []", 'options = ["--nodes", "two"]', "stage.1: options: argument --nodes: "),
        ("after = []", 'options = ["--cluster=local"]', "stage.1: options: --cluster is of the whole chain"),
        ("after = []", 'options = ["--node-color", "red"]', "stage.1: options: unrecognized arguments: --node-color"),
    ],
)
def test_a_chain_is_read_strictly(chain: Path, old: str, new: str, message: str) -> None:
    chain.write_text(chain.read_text().replace(old, new))
    done = launch("chain.py", "--config", chain, "--dry-run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
