"""Print accuracy under noise as in the ACN paper's table 2, networks beside the published ones.

    python tools/noise_table.py runs/vit/ac_vit_b16 runs/vit/residual_vit_b16

after tools/evaluate_images.py SOURCE --noise paper for each of them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, points


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="runs, exports, or --out of evaluations"
    )
    parser.add_argument("--tolerance", type=points, default=0.5, metavar="POINTS", help="what the cut-off may lose "
                        "(default: 0.5)")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.downstream.noise_table import noise_table

    print(noise_table(args.folders, tolerance=args.tolerance))


if __name__ == "__main__":
    exit_on_user_error(main)
