"""Show the accuracy of runs at every depth, their cut-offs and what is saved there; draw the depth curves."""

import argparse
from pathlib import Path

from acn_scale.cli import exit_on_user_error
from acn_scale.report import depth_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, help="folders of runs, such as runs/quickstart/ac_vit")
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of accuracy the cut-off may lose")
    parser.add_argument("--out", type=Path, help="folder for the picture (default: report/ in the first run)")
    args = parser.parse_args()
    print(depth_report(args.run, args.out or args.run[0] / "report", args.tolerance))


if __name__ == "__main__":
    exit_on_user_error(main)
