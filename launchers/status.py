"""The runs of a folder as a table: python launchers/status.py [FOLDER]"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acn_scale.cli import exit_on_user_error
from acn_scale.errors import UserError
from acn_scale.files import read_lines
from acn_scale.runs import read_json, read_metrics
from acn_scale.tables import aligned
from acn_scale.watchdog import read_failure, read_heartbeats

ALIVE = 60  # seconds after its last heartbeat in which a run counts as running
HEADER = ["run", "state", "step", "loss", "samples/s", "time left", "restarts", "last error"]


def status(run: Path, queue: dict[str, str]) -> list[str]:
    """A row of the table. `queue` has the states of the jobs that Slurm knows, by id."""
    environment = _read(run / "environment.json")
    job = _read(run / "jobs" / "job.json").get("id")
    lines = [line for line in _metrics(run) if "train/lr" in line]
    last = lines[-1] if lines else {}
    beats = read_heartbeats(run)
    newest = max((beat["time"] for beat in beats.values()), default=0)
    step = max([beat["step"] for beat in beats.values()] + [last.get("step", 0)])
    steps = environment.get("steps")
    failure = read_failure(run)
    beating = bool(beats) and time.time() - newest < ALIVE and any(beat["phase"] != "end" for beat in beats.values())
    running = beating and not failure
    if steps and last.get("step") == steps and not running and not failure:
        state = "finished"
    elif running:
        state = "running"
    elif job in queue:
        state = queue[job].lower()
    else:
        state = "failed" if failure else "stopped" if environment else "not started"
    speed, left = last.get("speed/samples_per_second"), ""
    batch = _read(run / "config.json").get("train", {}).get("global_batch_size", 0)
    if running and speed and steps:
        left = _readable((steps - step) * batch / speed)
    ends = read_lines(run / "jobs" / "ends.jsonl")
    error = failure["reason"] if failure else ends[-1]["reason"] if ends and ends[-1]["code"] not in (0, 75) else ""
    loss = f"{last['train/loss']:.4f}" if "train/loss" in last else ""
    reached = f"{step}/{steps}" if steps else ""
    restarts = str(environment.get("restarts", ""))
    return [str(run), state, reached, loss, f"{speed:.0f}" if speed else "", left, restarts,
            "" if state == "finished" else error]  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def _metrics(run: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run)
    except UserError:
        return []


def _readable(seconds: float) -> str:
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours} h {minutes:02d} min"


def slurm_queue() -> dict[str, str]:
    """The state of each of the user's jobs, by id as submitit gives it; empty without Slurm."""
    if shutil.which("squeue") is None:
        return {}
    done = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True)
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)


def find_runs(folder: Path) -> list[Path]:
    """The folders below that a run or a launcher has made."""
    marks = ("environment.json", "jobs/job.json")
    found = {path.parents[mark.count("/")] for mark in marks for path in folder.rglob(mark)}
    return sorted(run for run in found if not any("snapshot_" in part for part in run.parts))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="(default: runs)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    runs = find_runs(args.folder)
    if not runs:
        raise UserError(f"{args.folder}: no runs in there")
    queue = slurm_queue()
    print(aligned([HEADER, *(status(run, queue) for run in runs)]))


if __name__ == "__main__":
    exit_on_user_error(main)
