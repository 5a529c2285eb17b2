"""Submit a run: python launchers/pretrain.py --config FILE.toml --nodes 4 --gpus-per-node 8 [key.sub=value ...]

The code and the resolved config are copied into the run's folder: what is edited later does not reach the job. Before
its time limit, and when it is preempted, the job saves, is queued again and goes on.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import submission
from cluster_options import add_options
from local import run_here
from snapshots import snapshot_path, take_snapshot

from acn_scale.cli import exit_on_user_error, load_config
from acn_scale.runs import run_folder


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys of the config to change")
    add_options(parser)
    parser.add_argument("--prepare", action="store_true", help="copy code and config, and print where they are, for "
        "launchers/pretrain.sbatch")  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    cfg = load_config(args.config, args.overrides)
    submission.check(cfg, args)
    name = cfg.run.name.replace("/", "_")
    text = submission.sbatch_file(args, name, [snapshot_path(run_folder(cfg), cfg)])
    if args.dry_run:
        print(text, end="")
        return
    if args.cluster == "slurm" and not args.prepare:
        submission.check_with_slurm(text)
    snapshot = take_snapshot(run_folder(cfg), cfg)
    if args.prepare:
        print(snapshot)
    elif args.cluster == "debug":
        command = [sys.executable, "-u", f"{snapshot}/acn_scale/pretrain.py", "--config", f"{snapshot}/config.json"]
        os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(snapshot)})
    elif args.cluster == "local":
        sys.exit(run_here(args, snapshot))
    else:
        (job,) = submission.submit(args, name, [snapshot])
        print(f"job {job}: {run_folder(cfg)}; logs in {snapshot.parent}; python launchers/status.py {cfg.run.dir}")


if __name__ == "__main__":
    exit_on_user_error(main)
