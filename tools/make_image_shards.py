"""Write the images of a source as webdataset shards with an index. A run that was killed goes on where it stopped."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive

SOURCES = """sources:
  folder:PATH     a folder for each class, as ImageNet has it; or train and val folders of such folders
  cifar:PATH      the python version of CIFAR-10 or CIFAR-100 (read without running pickled code)
  parquet:GLOB    Parquet files with a column of image bytes and one of labels
  wds:GLOB        webdataset tars, such as "wds:in1k-{000..146}.tar"
  hf:NAME[:CONFIG]  a data set of the Hugging Face hub, or a local folder
  digits          scikit-learn's scanned digits"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=SOURCES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="where the images come from: see below")
    parser.add_argument("--split", required=True, help="train, eval, or a part by the source's own name for it")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--shard-size", type=positive, default=1000, help="images in a shard (default: 1000)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--resize", type=positive, help="make the shorter side no longer than this (default: as it is)")
    parser.add_argument(
        "--classes",
        type=Path,
        help="file that names the classes in their order, a line each; or an "
        "index.json of other shards; default: sorted names, which is ImageNet's order of wnids",
    )
    parser.add_argument("--first-classes", type=positive, metavar="N", help="only the images of the first N classes")
    parser.add_argument("--skip-classes", type=positive, metavar="N", default=0, help="pass N classes by before those")
    parser.add_argument("--per-class", type=positive, metavar="N", help="only N images of each class, drawn once")
    parser.add_argument("--streaming", action="store_true", help="hf: read from the hub without a copy on disk")
    parser.add_argument("--dry-run", action="store_true", help="look at the source and say what would be written")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.data.classes import read_classes
    from acn_scale.data.make_images import describe_images, make_image_shards

    classes = read_classes(args.classes) if args.classes else None
    options = {"shard_size": args.shard_size, "classes": classes, "streaming": args.streaming}
    options |= {"first_classes": args.first_classes, "per_class": args.per_class, "skip_classes": args.skip_classes}
    if args.dry_run:
        print(describe_images(args.source, args.split, **options))
        return
    index = make_image_shards(args.source, args.split, args.out, workers=args.workers, resize=args.resize, **options)
    print(index.summary())


if __name__ == "__main__":
    exit_on_user_error(main)
