"""Measure our work beside what people would use instead, in turns on this machine, and show the ratios.

data: timm, torchvision and webdataset; model: Transformers' BERT, timm's ViT and Mixer; loop and checkpoint:
Transformers' Trainer; inference: the residual twin. The peers come with requirements-test.txt. Each side has one GPU,
where there are any, but for model with --ranks.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive
from acn_scale.errors import UserError

WHAT = ("data", "model", "loop", "inference", "checkpoint")
RUNS = [Path("runs/quickstart/ac_vit"), Path("runs/quickstart/residual_vit")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WHAT, "all"], help="what to measure")
    parser.add_argument("--images", type=Path, help="class folders of JPEGs for data; default: some are made")
    parser.add_argument("--text", type=Path, help="text shards, train and eval; default: pydoc's text")
    parser.add_argument(
        "--glue", type=Path, help="official GLUE files, of which loop takes SST-2; default: pydoc's text"
    )
    parser.add_argument("--mosaicml", type=Path, metavar="PYTHON", help="a Python with mosaicml-streaming, which takes "
                        "older packages than this one has; without it that row of data is left out")  # fmt: skip
    parser.add_argument("--runs", type=Path, nargs=2, metavar=("ACN", "TWIN"), default=RUNS,
                        help="for inference; default: those of `make quickstart`")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=5, help="rounds that count (default: 5)")
    parser.add_argument(
        "--threads", type=positive, help="of each side, for all its ranks (default: PyTorch's; data always has one)"
    )
    parser.add_argument("--compile", action="store_true", help="the blocks of both sides (model, loop)")
    parser.add_argument("--ranks", type=positive, default=1, help="of each side of model, as many processes with a GPU "
                        "of their own, or on the CPU, each with a whole batch (default: 1)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="file to write the rows to, an object a line")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: {args.json.parent} is not a folder")
    if args.images and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")

    from acn_scale.benchmark.groups import Inputs, measure
    from acn_scale.benchmark.rows import save, table

    what = WHAT if args.what == "all" else [args.what]
    inputs = Inputs(args.images, args.text, args.glue, args.runs, args.mosaicml, args.compile, args.ranks)
    rows, mistakes = [], []
    for group, (more, mistake) in zip(what, measure(what, inputs, args.rounds, args.threads), strict=True):
        rows += more
        if args.json:
            save(rows, args.json)
        if more:
            print(table(more), flush=True)
        if mistake:
            mistakes.append(f"{group}: {mistake}")
    if mistakes:
        raise UserError("; ".join(mistakes))


if __name__ == "__main__":
    exit_on_user_error(main)
