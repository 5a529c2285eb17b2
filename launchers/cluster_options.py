"""The options of the launchers: where to run, and on what."""

import argparse
import re

import requeue

from acn_scale.cli import not_negative, positive


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that say where and on what to run."""
    add = parser.add_argument_group("where to run").add_argument
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="slurm: submit a job. local: "
        "processes on this machine, started again when they fail. debug: one process, in this terminal "
        "(default: slurm)")  # fmt: skip
    add("--nodes", type=positive, default=1, help="machines (default: 1)")
    add("--gpus-per-node", type=not_negative, default=0, help="GPUs of each, with a process for each (default: 0)")
    add("--tasks-per-node", type=positive, help="processes of each machine (default: its GPUs, or 1)")
    add("--cpus-per-task", type=positive, help="CPU cores of each process, its loader processes included")
    add("--mem", type=float, metavar="GB", help="main memory of each machine")
    add("--time", type=duration, default=24 * 60, metavar="[DAYS-]HOURS:MINUTES", help="time limit of one start; the "
        "job saves before it, and is queued again (default: 24:00)")  # fmt: skip
    add("--signal-delay", type=positive, default=120, metavar="SECONDS", help="time before the limit at which the run "
        "is asked to save and stop (default: 120)")  # fmt: skip
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        add(f"--{name}", help="as sbatch's")
    add("--extra", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; may be repeated")
    add("--tries", type=positive, default=requeue.TRIES, help="starts without a new checkpoint after which a job that "
        f"fails is given up (default: {requeue.TRIES})")  # fmt: skip
    add("--dry-run", action="store_true", help="print the sbatch file and submit nothing")


def duration(text: str) -> int:
    """[DAYS-]HOURS:MINUTES, or minutes, as minutes; for argparse."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+)", text)
    days, hours, minutes = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = (days * 24 + hours) * 60 + minutes
    if total < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be [DAYS-]HOURS:MINUTES, or minutes")
    return total


def tasks_per_node(args: argparse.Namespace) -> int:
    return args.tasks_per_node or max(1, args.gpus_per_node)
