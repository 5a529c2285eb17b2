"""Evaluate networks at every depth: accuracy, cut-offs, and what a cut saves; as tables here, as a page and a picture.

python tools/depth_report.py runs/quickstart/ac_vit runs/quickstart/residual_vit
python tools/depth_report.py exports/ac_vit --data data/digits/eval
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, points


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="+", type=Path, help="folders of runs (their newest checkpoint), of checkpoints or of exports")
    add("--data", metavar="DIR", help="evaluation shards (default: each run's own; an export has none)")
    add("--tolerance", type=points, default=0.5, metavar="POINTS", help="points of accuracy that the cut-off in the "
        "tables may lose; the page has 0.1, 0.5 and 1.0 too (default: 0.5)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder for report.html, depth.json and depth_curve.png (default: "
        "report/ in the first source)")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.report import depth_report

    print(depth_report(args.source, args.out, tolerance=args.tolerance, data=args.data))


if __name__ == "__main__":
    exit_on_user_error(main)
