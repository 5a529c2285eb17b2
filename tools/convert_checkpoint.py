"""Turn a checkpoint into a network that others can use, whole or cut at a depth.

python tools/convert_checkpoint.py runs/quickstart/ac_vit --to hf --tolerance 0.5 --out ac_vit_cut
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, points
from acn_scale.convert import TARGETS, convert
from acn_scale.convert.network import DTYPES


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="a run (its newest checkpoint), a checkpoint runs/NAME/checkpoints/step_N, an export, "
        "hf:FOLDER or timm:NAME_OR_FILE")  # fmt: skip
    add("--to", required=True, choices=TARGETS, help="form of the result")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--depth", type=int, help="cut after so many blocks")
    cut.add_argument("--tolerance", type=points, metavar="POINTS", help="cut at the smallest depth whose accuracy in "
        "the run's evaluation at the checkpoint's step is within so many points of full depth")  # fmt: skip
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    add("--ema", action="store_true", help="take the moving average of the weights")
    add("--out", type=Path, required=True, help="folder to write, new or empty")
    add("--replace", action="store_true", help="take the place of what an earlier conversion wrote to --out; a folder "
        "that holds anything else stays as it is")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    print(
        convert(
            args.source,
            args.to,
            args.out,
            depth=args.depth,
            tolerance=args.tolerance,
            dtype=args.dtype,
            average=args.ema,
            replace=args.replace,
        )
    )


if __name__ == "__main__":
    exit_on_user_error(main)
