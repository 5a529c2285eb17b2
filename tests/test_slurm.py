"""The launchers on a real Slurm of two nodes: whatever happens to a job, the run ends as if nothing had."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm

from acn_scale.cli import load_config
from acn_scale.runs import run_folder

ROOT = Path(__file__).parents[1]
PATIENCE = 180  # seconds for what a job should come to
LACKS = slurm.missing()
if LACKS and os.environ.get("REQUIRE_SLURM"):
    raise RuntimeError(f"REQUIRE_SLURM is set, and this machine lacks {', '.join(LACKS)}")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKS), reason=f"no Slurm to run on this machine, which lacks {', '.join(LACKS)}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    with slurm.running(tmp_path_factory.mktemp("slurm") / "slurm") as running:
        yield running


@pytest.fixture
def config(tmp_path: Path, digits: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'run = {{name = "tiny", dir = "{tmp_path}/runs"}}\n'
        'model = {name = "vit", connectivity = "acn", depth = 2, dim = 16, num_heads = 2, image_size = 8, '
        "patch_size = 4, channels = 1, num_classes = 10, dropout = 0.1}\n"
        f'data = {{kind = "images", train = "{digits}/train", eval = "{digits}/eval", streams = 4}}\n'
        "optim = {lr = 1e-3}\n"
        'train = {length = "400step", global_batch_size = 16, log_every = "1step", zero_stage = 1}\n'
        'eval = {every = "200step"}\n'
        'checkpoint = {every = "20step"}\n'
    )
    return path


def launch(cluster: slurm.Slurm, launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "launchers" / launcher, *arguments]
    environment = cluster.environment | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def reached(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def measured(run: Path) -> list[dict]:
    """Without speeds and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name[:5] not in ("speed", "memor")} for line in lines]


def over(cluster: slurm.Slurm, job: str) -> bool:
    return job not in cluster.run("squeue", "-h", "-o", "%A").split()


def test_a_chain_goes_past_a_failure_where_a_stage_asks_for_it(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """And no stage after it stays in the queue."""
    (tmp_path / "runs/one/jobs").mkdir(parents=True)
    (tmp_path / "runs/one/jobs/job.json").write_text("{}")
    stages = [
        ("bad", "nowhere", ""),
        ("even", "runs", 'even_after_failure = true\noptions = ["--time", "0:07"]'),
        ("after", "runs", 'after = ["bad"]'),
    ]
    lines = [f'name = "chain"\ndir = "{tmp_path}"'] + [
        f'[[stage]]\nname = "{name}"\ntool = "status"\narguments = ["{tmp_path}/{folder}"]\n{more}'
        for name, folder, more in stages
    ]
    (tmp_path / "chain.toml").write_text("\n".join(lines))
    submitted = launch(cluster, "chain.py", "--config", tmp_path / "chain.toml", "--time", "0:05")
    assert submitted.returncode == 0, submitted.stderr
    until(lambda: not cluster.run("squeue", "-h"), "a job stays in the queue")
    scripts = [path.read_text() for path in (tmp_path / "chain/jobs").glob("*_submission.sh")]
    assert sorted(script.split("--time=")[1].split()[0] for script in scripts) == ["5", "5", "7"]
    assert [path.name.partition("-")[0] for path in (tmp_path / "chain/done").iterdir()] == ["even"]
    left = launch(cluster, "chain.py", "--config", tmp_path / "chain.toml", "--dry-run").stdout
    assert left.count("to do") == 3


def test_a_tool_whose_time_is_up_is_queued_again(cluster: slurm.Slurm, tmp_path: Path, digits: Path) -> None:
    """At the signal that comes before the limit; the tool is then at work a second time, and done."""
    names, shards = tmp_path / "names", tmp_path / "shards"
    os.mkfifo(names)  # the tool stands still where it reads the classes
    shutil.copytree(digits / "train", shards, ignore=shutil.ignore_patterns("index.json"))
    (tmp_path / "chain.toml").write_text(
        f'name = "chain"\ndir = "{tmp_path}"\n[[stage]]\nname = "index"\ntool = "index_shards"\n'
        f'arguments = ["{shards}", "--classes", "{names}", "--workers", "1"]\n'
    )
    submitted = launch(cluster, "chain.py", "--config", tmp_path / "chain.toml", "--time", "0:05")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]

    def is_read() -> bool:
        try:
            writers.append(os.open(names, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # by nobody
            return False
        return True

    writers: list[int] = []
    until(is_read, "the tool does not begin")
    names.unlink()
    names.write_text("\n".join(map(str, range(10))))  # for the second time
    cluster.run("scancel", "--signal=USR2", job)
    until(lambda: over(cluster, job), "the job has no end")
    os.close(writers[0])
    assert "JobState=COMPLETED" in (said := cluster.run("scontrol", "show", "job", job)) and "Restarts=1" in said
    assert (shards / "index.json").exists()
    assert len(list((tmp_path / "chain/done").glob("index-*"))) == 1


def test_a_study_is_an_array_and_a_report_after_it(cluster: slurm.Slurm, tmp_path: Path) -> None:
    options = ["depth-vit", "--seeds", 1, "--first-seed", 7, "--out", tmp_path / "studies", "--time", "0:05"]
    submitted = launch(cluster, "study.py", *options, "--extra", "begin=now+1hour")
    assert submitted.returncode == 0, submitted.stderr
    *runs, report = (line.split()[1].rstrip(":") for line in submitted.stdout.splitlines())
    array = runs[0].partition("_")[0]
    assert runs == [f"{array}_0", f"{array}_1"]
    assert f"Dependency=afterany:{array}" in cluster.run("scontrol", "show", "job", report)
    cluster.run("scancel", array, report)
    (snapshot,) = (tmp_path / "studies/depth-vit_laptop/jobs").glob("snapshot_*")
    code = "from acn_scale.studies.study import CONFIGS; print((CONFIGS / 'studies/vit.toml').resolve(strict=True))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(snapshot)},
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.stdout.startswith(str(snapshot)), done.stderr


def test_whatever_happens_to_a_job_the_run_ends_the_same(cluster: slurm.Slurm, config: Path) -> None:
    """Requeued, asked to stop, out of time, a node lost: the metrics are those of the unbroken run, bit for bit."""
    options = ["--config", config, "--nodes", 2, "--cpus-per-task", 1]
    run = run_folder(load_config(config))
    submitted = launch(cluster, "pretrain.py", *options, "--time", "0:30")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[1].rstrip(":")

    def restarted(since: int) -> None:
        """Wait until the run is further than it was."""
        until(lambda: reached(run) >= since or over(cluster, job), f"no step {since}: {cluster.run('squeue')}")

    restarted(30)
    cluster.run("scontrol", "requeue", job)
    restarted(90)
    cluster.run("scancel", "--signal=USR2", job)
    restarted(150)
    cluster.kill_node("n2")
    cluster.start_node("n2")
    restarted(210)
    cluster.run("scancel", "--signal=TERM", job)
    until(lambda: over(cluster, job), "the job has no end")
    assert reached(run) == 400
    log = (run / "train.log").read_text()
    assert log.count("resumed at step") == 4
    assert log.count("as a signal asked for") == 3  # scontrol requeue sends one too
    row = launch(cluster, "status.py", run.parent).stdout.splitlines()[1].split()
    assert row[:3] == [str(run), "finished", "400/400"]
    assert row[5] == "4", row  # restarts

    unbroken = run.with_name("unbroken")
    again = launch(cluster, "pretrain.py", *options, "run.name=unbroken").stdout.split()[1].rstrip(":")
    until(lambda: over(cluster, again), "the unbroken run has no end")
    assert measured(run) == measured(unbroken)
