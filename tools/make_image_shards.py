"""Write the images of a source as webdataset shards with an index."""

import argparse
from pathlib import Path

from acn_scale.cli import exit_on_user_error
from acn_scale.data.make import IMAGE_SOURCES, make_image_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", required=True, choices=sorted(IMAGE_SOURCES), help="where the images come from")
    parser.add_argument("--split", required=True, choices=("train", "eval"), help="which part of them")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard")
    args = parser.parse_args()
    index = make_image_shards(args.source, args.split, args.out, shard_size=args.shard_size)
    print(f"{args.out}: {index.num_samples} images in {len(index.shards)} shards")


if __name__ == "__main__":
    exit_on_user_error(main)
