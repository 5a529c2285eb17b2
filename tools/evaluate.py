"""Evaluate a run on its evaluation shards: accuracy, depth, FLOPs and time at full depth and with early exit.

    python tools/evaluate.py runs/quickstart/ac_vit --exit-threshold 0.3

Draws accuracy over FLOPs for all thresholds into RUN/report/early_exit.png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, share


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run of a classifier, such as runs/quickstart/ac_vit")
    add("overrides", nargs="*", metavar="key.sub=value", help="keys of its config to change, such as data.eval")
    add("--exit-threshold", type=share, metavar="T", help="0 to 1: leave where the criterion is below it (entropy) or "
        "above it (confidence); default: what saves most within eval.tolerance points of full depth")  # fmt: skip
    add("--criterion", choices=("entropy", "confidence"), default="entropy", help="entropy, as a share of its largest "
        "value, or the likeliest class's probability (default: entropy)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.evaluation import evaluate_run

    print(
        evaluate_run(
            args.run,
            overrides=args.overrides,
            threshold=args.exit_threshold,
            criterion=args.criterion,
            json=args.json,
        )
    )


if __name__ == "__main__":
    exit_on_user_error(main)
