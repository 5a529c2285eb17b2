"""Submit a study to Slurm: its runs as one job array, and after them a job that trains what starts from those,
measures, and writes the report. What is finished is not run again, and the same command goes on.

    python launchers/study.py depth-vit --scale paper --nodes 4 --gpus-per-node 8 --partition gpu

tools/reproduce.py does the same without Slurm.
"""

import argparse
from collections.abc import Sequence

import submission
from cluster_options import add_options
from snapshots import take_snapshot

from acn_scale.cli import exit_on_user_error, positive
from acn_scale.errors import UserError
from acn_scale.studies import STUDIES
from acn_scale.studies.arguments import parser_of, setting_of
from acn_scale.studies.runner import first_runs
from acn_scale.studies.study import CONFIGS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--parallel", type=positive, help="runs at the same time (default: all)")
    add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.cluster != "slurm":
        raise UserError(f"--cluster {args.cluster}: is for one run; tools/reproduce.py runs a study here")
    setting = setting_of(args)
    name = f"{args.study}_{args.scale}"
    if not args.dry_run:
        submission.check_tool(args, f"{name}_report", setting.folder)
    configs = first_runs(args.study, STUDIES[args.study], setting)
    jobs: list[str] = []
    if configs:
        _, jobs = submission.launch_all(args, name, configs, parallel=args.parallel)
    if args.dry_run:
        return
    files = {f"configs/{path.relative_to(CONFIGS)}": path.read_bytes() for path in sorted(CONFIGS.rglob("*.toml"))}
    snapshot = take_snapshot(setting.folder, setting, files)
    keys = ("scale", "seeds", "first_seed", "data", "out")
    options = [text for key in keys for text in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    command = [f"{snapshot}/tools/reproduce.py", args.study, *options]
    marker = snapshot.parent / "reported"
    job = submission.submit_tool(args, f"{name}_report", snapshot, command, marker, jobs, anyway=True)
    print(f"job {job}: {setting.folder}/report/{args.study}.md; log in {snapshot.parent}")


if __name__ == "__main__":
    exit_on_user_error(main)
