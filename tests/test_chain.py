"""Chains of stages without Slurm: what is done and what is left, and what their file may say."""

import argparse
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from networks import GREY, image_export
from networks import vit as vit_config
from test_launch import launch, options
from test_pretrain import command_line

from acn_scale.cli import load_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launchers"))

import chain as chain_module  # noqa: E402
from cluster_options import add_options  # noqa: E402
from snapshots import take_snapshot  # noqa: E402


@pytest.fixture
def small(tmp_path: Path, digits: Path) -> list[str]:
    """Arguments of a run of 120 steps."""
    return command_line(tmp_path, digits / "train", digits / "eval")


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
    snapshot = take_snapshot(tmp_path / "chain/grid", chain_module.read_chain(grid), step.files)
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


def test_a_dry_run_shows_what_waits_for_what(grid: Path) -> None:
    first, second, third = launch("chain.py", "--config", grid, "--dry-run").stdout.splitlines()
    assert "after" not in first
    assert second.endswith("  (afterany:grid)") and third.endswith("  (afterok:states)")


def test_a_stage_without_its_output_is_not_done(tmp_path: Path, chain: Path) -> None:
    shards = chain_module.steps_of(chain_module.read_chain(chain))[0]
    shards.marker.parent.mkdir(parents=True)
    shards.marker.touch()
    assert not shards.done()
    (tmp_path / "more").mkdir()
    assert shards.done()


def test_a_stage_that_evaluates_is_as_many_processes_as_training(tmp_path: Path, chain: Path, digits: Path) -> None:
    """And no other tool is."""
    source = image_export(tmp_path / "export", vit_config(**GREY))
    arguments = f'["{source}", "--data", "{digits}/eval"]'
    noise = f'[[stage]]\nname = "noise"\ntool = "evaluate_images"\narguments = {arguments}\n'
    whole = f"{chain.read_text()}{noise}"
    steps = chain_module.steps_of(chain_module.Chain.model_validate(tomllib.loads(whole)))
    assert [step.processes(options("--gpus-per-node", "8")) for step in steps] == [1, 1, 1, 8]
    chain.write_text(f'name = "noise"\ndir = "{tmp_path}"\n{noise}')
    done = launch("chain.py", "--config", chain, "--cluster", "local", "--tasks-per-node", 2)
    assert done.returncode == 0, done.stderr
    (speed,) = (source / "eval/throughput").iterdir()
    assert json.loads(speed.read_text())["ranks"] == 2
    chain.write_text(chain.read_text().replace(f"{digits}/eval", f"{tmp_path}/nowhere"))
    refused = launch("chain.py", "--config", chain, "--cluster", "local", "--tasks-per-node", 2)
    assert refused.returncode == 2 and f"error: {tmp_path}/nowhere" in refused.stderr


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
        ('tool = "convert_checkpoint"', 'tool = "submission"', "tool = submission: is no tool, but a part of others"),
        ('"--to"', '"--too"', "stage.2: arguments of convert: the following arguments are required: --to"),
        ('"--workers", "1"', '"--workers", "0"', "stage.0: arguments of shards: argument --workers: 0: must be 1 or"),
        ('"{train}"', '"{trian}"', ": stage convert: {trian}: must be a stage above it that has a config"),
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
    assert message in done.stderr and ": :" not in done.stderr


GRID_OF_GLUE = """
[[stage]]
name = "glue"
tool = "glue"
arguments = ["--from", "{train}", "--tasks", "rte", "--cluster", "local", "optim.lr=2e-5"]
"""


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("optim.rl=2e-5", "stage glue: {recipe}: optim.rl: no such key; the nearest is optim.lr"),
        ('--grid", "rte:optim.lr=1e-5,-1', "stage glue: {recipe}: optim.lr = -1: input should be greater than 0"),
        ("--config=nowhere.toml", "stage glue: nowhere.toml: No such file or directory"),
    ],
)
def test_keys_of_a_grid_are_looked_at_before_there_is_a_network(chain: Path, new: str, message: str) -> None:
    whole = f"{chain.read_text()}{GRID_OF_GLUE}"
    chain.write_text(whole)
    assert states(chain)["glue"] == "to"
    chain.write_text(whole.replace("optim.lr=2e-5", new))
    done = launch("chain.py", "--config", chain, "--dry-run")
    assert done.returncode == 2
    assert done.stderr == f"error: {message.format(recipe=ROOT / 'configs/glue/paper.toml')}\n"
