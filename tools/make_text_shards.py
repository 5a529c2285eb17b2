"""Tokenize the documents of a source, pack them into full sequences and write these as webdataset shards."""

import argparse
from pathlib import Path

from acn_scale.cli import exit_on_user_error
from acn_scale.data.make import TEXT_SOURCES, make_text_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", required=True, choices=sorted(TEXT_SOURCES), help="where the text comes from")
    parser.add_argument("--split", required=True, choices=("train", "eval"), help="which part of the documents")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder that train_tokenizer.py wrote")
    parser.add_argument("--tokens", type=int, default=128, help="length of a sequence, [CLS] and [SEP] included")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--shard-size", type=int, default=8192, help="sequences in a shard")
    args = parser.parse_args()
    index = make_text_shards(
        args.source, args.split, args.tokenizer, args.out, tokens=args.tokens, shard_size=args.shard_size
    )
    print(f"{args.out}: {index.num_samples} sequences of {args.tokens} tokens in {len(index.shards)} shards")


if __name__ == "__main__":
    exit_on_user_error(main)
