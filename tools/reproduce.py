"""Reproduce a figure or table of the paper: its runs, then a table, a picture and what differs, in report/.

    python tools/reproduce.py depth-vit --seeds 3

The same command goes on where it was stopped; a run that is finished is never run again. A run takes one process: one
GPU, or one core. launchers/study.py submits the runs to Slurm, over as many processes as you like, and the report.
"""

from acn_scale.cli import exit_on_user_error, positive


def main() -> None:
    from acn_scale.studies import STUDIES
    from acn_scale.studies.arguments import parser_of, setting_of
    from acn_scale.studies.runner import reproduce
    from acn_scale.studies.workers import usual_workers

    parser = parser_of(__doc__)
    parser.add_argument("--workers", type=positive, help="runs at a time (default: one a GPU, or one a core where "
        "there is no GPU)")  # fmt: skip
    args = parser.parse_args()
    print(reproduce(args.study, STUDIES[args.study], setting_of(args), args.workers or usual_workers()))


if __name__ == "__main__":
    exit_on_user_error(main)
