"""The results of many runs as a table: mean and deviation over seeds, at full depth and at the cut-off.

    python tools/results.py runs/glue/ac_bert runs/glue/residual_bert

Each folder is one network, with all runs below it. Of several settings, such as learning rates, the one with the
highest median counts. The others are tested against the first: a paired t-test over the seeds of which each of
the two has one run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, points


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="FOLDER", help="with the runs of one network below it")
    add("--tolerance", type=points, default=0.5, metavar="POINTS", help="what the cut-off may lose (default: 0.5)")
    add("--csv", type=Path, metavar="FILE", help="write the table to a file as well")
    add("--into", type=Path, metavar="RUN", help="write the means to a run's eval/, where its depth report shows them")
    add("--submission", type=Path, metavar="DIR", help="gather the first network's files for the GLUE server, of each "
        "task's best run, and check them")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.downstream.table import results_table

    print(results_table(args.folders, tolerance=args.tolerance, table=args.csv, into=args.into,
                        submission=args.submission))  # fmt: skip


if __name__ == "__main__":
    exit_on_user_error(main)
