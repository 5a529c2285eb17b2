"""Write the index.json of a folder of webdataset tars of images that another tool wrote. The tars stay as they are."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of .tar files whose samples have an image and a .cls")
    parser.add_argument("--classes", type=Path, help="file that names the classes in their order (default: numbers)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: one a core)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.data.classes import read_classes
    from acn_scale.data.make_images import index_shards

    classes = read_classes(args.classes) if args.classes else None
    print(index_shards(args.folder, classes=classes, workers=args.workers).summary())


if __name__ == "__main__":
    exit_on_user_error(main)
