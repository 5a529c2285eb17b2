"""Show the batch of one step as the model saw it: a contact sheet or text with the masks marked, and a table that says
where each sample lies. For whoever looks into a loss spike."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of a run, or a config")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, with a config")
    parser.add_argument("--step", required=True, type=positive, help="optimizer step, counted from 1 as in the metrics")
    parser.add_argument("--out", type=Path, help="file to write (default: batch_STEP in the run's report folder)")
    parser.add_argument("--max", type=positive, default=64, help="samples to show at most (default: 64)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.batches import inspect_batch

    print(inspect_batch(args.source, args.step, overrides=args.overrides, out=args.out, most=args.max))


if __name__ == "__main__":
    exit_on_user_error(main)
