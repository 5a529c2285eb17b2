"""After a start of a run: queue the job again, or give it up. A batch script calls it with the trainer's exit code."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from acn_scale.checkpoint import complete
from acn_scale.files import read_lines, write_file
from acn_scale.stopping import EXIT_STOPPED
from acn_scale.watchdog import read_failure

TRIES = 3
FINISHED, MISTAKE = 0, 2


def worth_another(run: Path, code: int, tries: int) -> bool:
    """Whether to start the run again, said and why on one line, and noted in jobs/ends.jsonl.

    Not when it is finished, for a mistake of the user's, or when as many starts as `tries` in a row have come to
    their end without a new checkpoint.
    """
    path = run / "jobs" / "ends.jsonl"
    ends = read_lines(path)
    checkpoints = complete(run)
    step = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
    failure = read_failure(run)
    reason = "asked to stop" if code == EXIT_STOPPED else failure["reason"] if failure else f"exit code {code}"
    if code == MISTAKE:
        reason = _mistake(run) or reason
    ends.append({"time": time.time(), "code": code, "step": step, "reason": reason})
    write_file(path, "".join(json.dumps(end) + "\n" for end in ends).encode())
    in_a_row = 0
    for end in reversed(ends):
        if end["step"] != step or end["code"] in (FINISHED, MISTAKE):
            break
        in_a_row += 1
    if code in (FINISHED, MISTAKE):
        print(f"{run}: {'finished' if code == FINISHED else f'not started again: {reason}'}", file=sys.stderr)
        return False
    if in_a_row >= tries:
        print(f"{run}: given up after {tries} starts without a checkpoint after step {step}: {reason}", file=sys.stderr)
        return False
    print(f"{run}: to be started again from step {step} ({in_a_row} of {tries} without a new checkpoint): {reason}",
          file=sys.stderr)  # fmt: skip
    return True


def _mistake(run: Path) -> str | None:
    """What the trainer said of it, in the log of the last start: it may have had no folder yet to note it in."""
    try:
        log = Path(json.loads((run / "jobs" / "job.json").read_text())["log"])
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("code", type=int, help="exit code of the trainer")
    parser.add_argument("runs", type=Path, nargs="+", help="folder of the run; of an array job, one for each task")
    parser.add_argument("--tries", type=int, default=TRIES, help=f"(default: {TRIES})")
    args = parser.parse_args(arguments)
    run = args.runs[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)) if len(args.runs) > 1 else 0]
    if worth_another(run, args.code, args.tries):
        # Of an array, this task alone.
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        job = os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
        subprocess.run(["scontrol", "requeue", job], check=True)


if __name__ == "__main__":
    main()
