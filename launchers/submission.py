"""Jobs: what Slurm is told of them, and their submission through submitit."""

import argparse
import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import job
import submitit
from cluster_options import tasks_per_node
from local import run_here, worst
from snapshots import PRETRAIN, snapshot_path, take_snapshot
from submitit.slurm.slurm import _make_sbatch_string

from acn_scale.config import Config
from acn_scale.convert.start import check_start
from acn_scale.data import build_stream
from acn_scale.errors import UserError
from acn_scale.runs import check_run_folder, run_folder, write_json
from acn_scale.stopping import EXIT_STOPPED

cloudpickle.register_pickle_by_value(job)


def check(cfg: Config, args: argparse.Namespace) -> None:
    """Raises UserError for what would end the job as soon as it starts."""
    check_run_folder(cfg)
    check_start(cfg)
    cfg.micro_batch_size(1 if args.cluster == "debug" else args.nodes * tasks_per_node(args))
    build_stream(cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": None})}))
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: --cluster {args.cluster} is this machine alone")


def parameters(
    args: argparse.Namespace, name: str, snapshots: Sequence[Path], after: Sequence[str] = ()
) -> dict[str, Any]:
    """What submitit is told of a Slurm job. `after`: the jobs that must have ended well before."""
    given = {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    extra: dict[str, Any] = {"requeue": True}
    for item in args.extra:
        key, sign, value = item.removeprefix("--").partition("=")
        extra[key] = value if sign else True
    again = [
        "env",
        f"PYTHONPATH={snapshots[0]}",
        sys.executable,
        str(snapshots[0] / "launchers" / "requeue.py"),
        "--tries",
        str(args.tries),
    ]
    folders = [str(snapshot.parents[1]) for snapshot in snapshots]
    cores = args.cpus_per_task
    values = given | {
        "job_name": name,
        "nodes": args.nodes,
        "ntasks_per_node": tasks_per_node(args),
        "gpus_per_node": args.gpus_per_node or None,
        "cpus_per_task": cores,
        "mem": f"{args.mem:g}G" if args.mem else None,
        "time": args.time,
        "signal_delay_s": args.signal_delay,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "additional_parameters": extra,
        # A rank that dies ends the job. Slurm hands the cores of a task on by itself up to 22.04 only.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cores}"] if cores else [])],
        "teardown": ["code=$?", f"{shlex.join(again)} $code {shlex.join(folders)}", "exit $code"],
    }
    return {name: value for name, value in values.items() if value is not None}


def launch_all(
    args: argparse.Namespace,
    name: str,
    configs: Sequence[Config],
    program: str = PRETRAIN,
    *,
    parallel: int | None = None,
    after: Sequence[str] = (),
) -> tuple[int, list[str]]:
    """Run these on this machine, one after the other, or submit them to Slurm as one array that begins when the jobs
    `after` have ended well. One that fails does not stop the others, Ctrl-C does. With --dry-run, print instead.

    Returns the worst exit code of what ran here, and the ids of what was submitted.
    """
    folders = [run_folder(cfg) for cfg in configs]
    for place, (cfg, folder) in enumerate(zip(configs, folders, strict=True)):
        if folder in folders[:place]:
            raise UserError(f"{folder}: of two of these runs; the same seed or value may be named twice")
        check(cfg, args)
    text = sbatch_file(
        args, name, [snapshot_path(*each) for each in zip(folders, configs, strict=True)], parallel, after
    )
    if args.dry_run:
        print(text, end="")
        return 0, []
    if args.cluster == "slurm":
        check_with_slurm(text)
    snapshots = [take_snapshot(run_folder(cfg), cfg) for cfg in configs]
    if args.cluster == "local":
        codes = []
        for snapshot in snapshots:
            codes.append(run_here(args, snapshot, program))
            if codes[-1] == EXIT_STOPPED:
                break
        return worst(codes), []
    jobs = submit(args, name, snapshots, program, parallel, after)
    for job_id, cfg in zip(jobs, configs, strict=True):
        print(f"job {job_id}: {run_folder(cfg)}")
    return 0, jobs


def submit(
    args: argparse.Namespace,
    name: str,
    snapshots: Sequence[Path],
    program: str = PRETRAIN,
    parallel: int | None = None,
    after: Sequence[str] = (),
) -> list[str]:
    """Submit a job, or an array of jobs, on Slurm; return their ids."""
    executor = submitit.SlurmExecutor(folder=_logs(snapshots))
    executor.update_parameters(**parameters(args, name, snapshots, after))
    if parallel:
        executor.update_parameters(array_parallelism=parallel)
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns that sacct is off, and works all the same
    with executor.batch():
        jobs = [executor.submit(job.run, str(snapshot), program) for snapshot in snapshots]
    for submitted, snapshot in zip(jobs, snapshots, strict=True):
        write_json(snapshot.parent / "job.json", {"id": submitted.job_id, "log": str(submitted.paths.stderr)})
    return [submitted.job_id for submitted in jobs]


def submit_tool(
    args: argparse.Namespace,
    name: str,
    snapshot: Path,
    command: Sequence[str],
    marker: Path,
    after: Sequence[str],
    *,
    processes: int = 1,
    anyway: bool = False,
) -> str:
    """Submit job.run_tool, for a tool of so many processes, that begins when the jobs `after` have ended, well if not
    `anyway`; return the job's id.
    """
    executor = submitit.SlurmExecutor(folder=snapshot.parent, max_num_timeout=args.tries - 1)
    values = _tool_parameters(args, name, snapshot, after)
    if after and anyway:
        values["dependency"] = f"afterany:{':'.join(after)}"
    executor.update_parameters(**values)
    logging.getLogger("submitit").setLevel(logging.ERROR)
    return executor.submit(job.Tool(), list(command), str(marker), str(snapshot), processes).job_id


def _tool_parameters(args: argparse.Namespace, name: str, snapshot: Path, after: Sequence[str] = ()) -> dict[str, Any]:
    """One task, with the cores of all the processes that the tool starts itself, one a GPU."""
    cores = args.cpus_per_task and args.cpus_per_task * tasks_per_node(args)
    one = argparse.Namespace(**vars(args) | {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": cores})
    values = parameters(one, name, [snapshot], after)
    return {key: value for key, value in values.items() if key != "teardown"}


def check_tool(args: argparse.Namespace, name: str, folder: Path) -> None:
    """Have Slurm look at the job of a tool whose results go to a folder. Raises UserError."""
    snapshot = (folder / "jobs" / "snapshot").resolve()
    check_with_slurm(_sbatch_text(_tool_parameters(args, name, snapshot), snapshot.parent))


def check_with_slurm(text: str) -> None:
    """Have sbatch look at its file without submitting it. Raises UserError with what it says."""
    if shutil.which("sbatch") is None:
        raise UserError("--cluster slurm: there is no sbatch on this machine; --cluster local needs no Slurm")
    done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.strip().splitlines()]
        raise UserError(f"sbatch: {'; '.join(lines)}")


def _logs(snapshots: Sequence[Path]) -> Path:
    """Of a run, in its folder; of the runs of an array, in the folder that they have in common."""
    return snapshots[0].parent if len(snapshots) == 1 else snapshots[0].parents[2] / "jobs"


def sbatch_file(
    args: argparse.Namespace,
    name: str,
    snapshots: Sequence[Path],
    parallel: int | None = None,
    after: Sequence[str] = (),
) -> str:
    """What would be given to sbatch."""
    logs = _logs(snapshots)
    values = parameters(args, name, snapshots, after)
    if len(snapshots) > 1:
        values |= {"map_count": len(snapshots), "array_parallelism": parallel or len(snapshots)}
    return _sbatch_text(values, logs)


def _sbatch_text(values: Mapping[str, Any], logs: Path) -> str:
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return _make_sbatch_string(command=command, folder=logs, **values) + "\n"
