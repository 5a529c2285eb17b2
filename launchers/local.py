"""A run on this machine, until it is finished or given up."""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import job
import requeue
import submitit
from cluster_options import tasks_per_node
from snapshots import PRETRAIN

from acn_scale.runs import write_json
from acn_scale.stopping import EXIT_STOPPED


def run_here(args: argparse.Namespace, snapshot: Path, program: str = PRETRAIN) -> int:
    """Train on this machine until the run is finished or given up; return its exit code. Ctrl-C saves and stops, and
    then, and then alone, it is EXIT_STOPPED.
    """
    executor = submitit.LocalExecutor(folder=snapshot.parent)
    executor.update_parameters(tasks_per_node=tasks_per_node(args), timeout_min=args.time,
                               signal_delay_s=args.signal_delay, gpus_per_node=args.gpus_per_node)  # fmt: skip
    interrupted = False
    while True:
        running = executor.submit(job.run, str(snapshot), program)
        print(f"log of rank 0: {running.paths.stderr}", file=sys.stderr)
        write_json(snapshot.parent / "job.json", {"id": None, "log": str(running.paths.stderr)})
        try:
            codes = _follow(running)
        except KeyboardInterrupt:
            interrupted = True
            running._process.terminate()  # goes on to all ranks
            codes = _follow(running)
        if interrupted:
            return EXIT_STOPPED
        code = worst(codes)
        if not requeue.worth_another(snapshot.parents[1], code, args.tries):
            return 1 if code == EXIT_STOPPED else code  # given up


def worst(codes: Iterable[int]) -> int:
    """That of a signal is negative, and no success either."""
    return max(codes, key=abs)


def _follow(running: submitit.Job) -> list[int]:
    """Show what rank 0 says until the job is over; return the exit codes of its ranks."""
    path, place = Path(running.paths.stderr), 0
    while True:
        over = running.done()
        if path.exists():
            with path.open("rb") as file:
                file.seek(place)
                new = file.read()
            sys.stderr.buffer.write(new)
            sys.stderr.flush()
            place += len(new)
        if over:
            break
        time.sleep(0.5)
    codes = []
    for rank in running._sub_jobs or [running]:
        try:
            codes.append(rank.result())
        except Exception:  # the process that would have told is gone
            codes.append(1)
    return codes
