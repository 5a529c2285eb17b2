"""Prune networks and print their accuracy against sparsity, side by side; also as a picture and as numbers.

    python tools/prune.py runs/quickstart/ac_vit runs/quickstart/residual_vit --method magnitude --tolerance 0.5
    python tools/prune.py runs/quickstart/ac_vit runs/quickstart/residual_vit --method movement --tolerance 0.5

magnitude sets the smallest weights to zero, without training. movement trains on by the run's own config, and sets
those to zero after each epoch whose |weight x gradient| is smallest. Both take the linear weights of all blocks
together.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, length, points, share


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="+", type=Path, help="folders of runs (their newest checkpoint), of checkpoints or, for "
        "magnitude, of exports")  # fmt: skip
    add("--method", required=True, choices=("magnitude", "movement"), help="how weights are chosen")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--depth", type=int, help="cut each network after so many blocks before it is pruned")
    cut.add_argument("--tolerance", type=points, metavar="POINTS", help="cut each at the smallest depth whose accuracy "
        "in its last evaluation is within so many points of full depth")  # fmt: skip
    add("--sparsities", nargs="+", type=share, metavar="S", default=[n / 10 for n in range(10)], help="shares of "
        "zeros, 0 to 1; movement prunes until it is at the highest (default: 0 0.1 ... 0.9)")  # fmt: skip
    add("--share", type=share, default=0.2, help="movement: of what is left, to prune each time (default: 0.2)")
    add("--every", type=length, default="1ep", metavar="LENGTH", help="movement: training between two prunings, such as"
        " 500step (default: 1ep)")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="key.sub=value", help="movement: keys of the runs' configs to change, "
        "such as optim.lr")  # fmt: skip
    add("--data", metavar="DIR", help="evaluation shards (default: each run's own; an export has none)")
    add("--out", type=Path, metavar="DIR", help="folder for METHOD_pruning.png, METHOD_pruning.json and, under "
        "movement/, runs (default: report/ in the first source)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all numbers to this file too")
    add(
        "--export",
        type=Path,
        metavar="DIR",
        help="new folder for the networks at the highest sparsity, in our own form",
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.sparsity import Movement, prune_networks

    movement = args.method == "movement"
    print(
        prune_networks(
            args.source,
            Movement(max(args.sparsities), args.share, args.every, args.set) if movement else args.sparsities,
            depth=args.depth,
            tolerance=args.tolerance,
            data=args.data,
            out=args.out,
            export=args.export,
            numbers=args.json,
        )
    )


if __name__ == "__main__":
    exit_on_user_error(main)
