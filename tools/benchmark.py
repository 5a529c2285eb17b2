"""Measure our data path beside its peers (timm, torchvision, webdataset), or our training loop beside a bare one, in
turns, and show the ratios. The peers come with requirements-test.txt."""

import argparse
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["data", "loop"], help="what to measure")
    parser.add_argument(
        "--images", type=Path, help="folder of class folders of JPEGs (data only; default: some are made)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--json", type=Path, help="file to write the rows to, an object a line")
    args = parser.parse_args()

    from acn_scale.benchmark.data import data_rows
    from acn_scale.benchmark.loop import loop_rows
    from acn_scale.benchmark.rows import save, table

    rows = data_rows(args.images, args.rounds) if args.what == "data" else loop_rows(args.rounds)
    if args.json:
        save(rows, args.json)
    print(table(rows))


if __name__ == "__main__":
    exit_on_user_error(main)
