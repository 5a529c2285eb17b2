"""Reproduce a figure or table of the paper: its runs, then a table, a picture and what differs, in report/.

    python tools/reproduce.py depth-vit --seeds 3

The same command goes on where it was stopped; a run that is finished is never run again. A run takes one process: one
GPU, or one core. launchers/study.py submits the runs to Slurm, over as many processes as you like, and the report.
"""

import argparse
from collections.abc import Sequence

from acn_scale.cli import exit_on_user_error, positive


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    from acn_scale.studies.arguments import parser_of

    parser = parser_of(__doc__)
    parser.add_argument("--workers", type=positive, help="runs at a time (default: one a GPU, or one a core where "
        "there is no GPU)")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.studies import STUDIES
    from acn_scale.studies.arguments import setting_of
    from acn_scale.studies.runner import reproduce
    from acn_scale.studies.workers import usual_workers

    print(reproduce(args.study, STUDIES[args.study], setting_of(args), args.workers or usual_workers()))


if __name__ == "__main__":
    exit_on_user_error(main)
