"""The folder of a run: which config made it, in which environment, and what it measured."""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acn_scale import distributed
from acn_scale.config import Config
from acn_scale.errors import RunFailed, UserError
from acn_scale.files import whole_lines, write_file

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "sentencepiece", "numpy", "pydantic")


def run_folder(cfg: Config) -> Path:
    return Path(cfg.run.dir) / cfg.run.name


# Keys that may change between two starts: what the run computes does not depend on them but by rounding. Shards are
# known by what they hold, wherever they lie.
FREE = ("run.dir", "train.zero_stage", "train.micro_batch_size", "train.bucket_size", "train.overlap_comm",
        "train.offload", "train.compile", "model.recompute", "data.train", "data.eval", "data.workers",
        "data.verify_checksums", "data.max_bad_samples", "data.remote.", "eval.batch_size", "checkpoint.", "health.",
        "profile.")  # fmt: skip


COMMIT = "COMMIT"  # beside the package in a snapshot: what it is a snapshot of
FAILURE = "failure.json"  # in the health folder: what ended the last start of the run, if it failed


def health_folder(folder: Path) -> Path:
    """Where a run's heartbeats, its bad steps, stacks and its failure are."""
    return folder / "health"


def check_run_folder(cfg: Config) -> None:
    """Raises UserError for a folder that another config made: its checkpoints and metrics would not fit this run."""
    path = run_folder(cfg) / "config.json"
    if not path.exists():
        return
    old, new = settings(read_json(path)), settings(cfg.model_dump(mode="json"))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{path}: {key} = {old.get(key)!r} there, {new.get(key)!r} now"
            + (f", and {len(changed) - 1} more keys differ" if len(changed) > 1 else "")
            + "; give this run another run.name, or remove that folder"
        )


@contextlib.contextmanager
def open_run_folder(cfg: Config, steps: int) -> Iterator[Path]:
    """Make the folder and keep it to this run; rank 0 writes down what makes the run: config.json, and environment.json
    of its last start.

    Raises RunFailed where another process trains in the folder: one that is just being killed will not for long.
    """
    folder = run_folder(cfg)
    with contextlib.ExitStack() as claim:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if distributed.rank() == 0:
                health_folder(folder).mkdir(exist_ok=True)
                claim.enter_context(_claimed(folder))
                for leftover in (FAILURE, "rank_*.json"):
                    for path in health_folder(folder).glob(leftover):
                        path.unlink()
                write_json(folder / "config.json", cfg.model_dump(mode="json"))
                path = folder / "environment.json"
                restarts = read_json(path).get("restarts", -1) + 1 if path.exists() else 0
                write_json(
                    path, environment() | {"world_size": distributed.world_size(), "restarts": restarts, "steps": steps}
                )
        except OSError as error:
            raise UserError(f"run.dir = {cfg.run.dir}: {folder}: {error.strerror}") from None
        yield folder


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Two that train in a folder would write over each other's metrics and checkpoints.

    The lock ends with its process, and processes forked from it do not keep it: a killed run can go on at once.
    """
    with (health_folder(folder) / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RunFailed(f"{folder}: {file.read().strip()} trains there; wait for it, or stop it") from None
        except OSError as error:  # a file system without locks
            log.warning("%s: %s; take care that one run alone trains there", file.name, error.strerror)
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def restarts(folder: Path) -> int:
    """How often the run has been started again."""
    return read_json(folder / "environment.json")["restarts"]


def append_bad_step(folder: Path, values: dict[str, Any]) -> Path:
    """Add a line to bad_steps.jsonl: what was wrong at a step, and which samples it was made of."""
    path = health_folder(folder) / "bad_steps.jsonl"
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(json.dumps(values) + "\n")
    return path


def environment() -> dict[str, Any]:
    """What a result may depend on besides its config."""
    return {
        "command": sys.argv,
        "git_commit": git_commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """Of this package's checkout, with "-dirty" where files differ from it; of a snapshot, the one it was taken from.
    None where there is none.
    """
    noted = Path(__file__).parents[1] / COMMIT
    if noted.exists():
        return noted.read_text().strip()
    if shutil.which("git") is None:
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises UserError where there are none."""
    path = folder / "metrics.jsonl"
    try:
        lines = whole_lines(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is {folder} a run?") from None
    return [json.loads(line) for line in lines]


def read_config(folder: Path) -> Config:
    """The config that made the run. Raises UserError where the folder holds none."""
    values = read_json(folder / "config.json")
    try:
        return Config.model_validate(values)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: not a config of this version: {error.errors()[0]['loc']}") from None


@dataclass(frozen=True)
class Result:
    """The last evaluation of a run; accuracies are shares (0..1) at depth 0, 1, ..."""

    name: str
    cfg: Config
    step: int
    loss: float
    accuracy: list[float]


def read_result(folder: Path) -> Result:
    """Raises UserError for a folder that is no run, or one of a run that has not been evaluated yet."""
    cfg = read_config(folder)
    evaluations = [line for line in read_metrics(folder) if "eval/loss" in line]
    if not evaluations:
        raise UserError(f"{folder}: has no evaluation in its metrics.jsonl yet")
    last = evaluations[-1]
    accuracy = [last[f"eval/depth_{depth:02d}/accuracy"] for depth in range(last["depth/blocks"] + 1)]
    return Result(folder.name, cfg, last["step"], last["eval/loss"], accuracy)


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def write_json(path: Path, values: Any) -> None:
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())


def settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Of a config: the values of all keys, such as "optim.lr", that what the run computes depends on."""
    flat = {}
    for key, value in values.items():
        flat |= settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return {key: value for key, value in flat.items() if not key.startswith(FREE)}
