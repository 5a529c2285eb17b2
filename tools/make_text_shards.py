"""Tokenize documents, pack them into full sequences and write these as webdataset shards with an index: OUT/train and
OUT/eval. A run that was killed goes on where it stopped."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error, positive, text_parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = text_parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", required=True, type=Path, help="folder that train_tokenizer.py wrote")
    add("--tokens", type=positive, default=128, help="length of a sequence with [CLS] and [SEP] (default: 128)")
    add("--shard-size", type=positive, default=8192, help="sequences in a shard, in 64s (default: 8192)")
    add("--workers", type=positive, default=os.cpu_count(), help="processes (default: one a core)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.data.make_text import describe_text, make_text_shards
    from acn_scale.data.text_sources import TextSources

    sources = TextSources(args.source, args.weights, args.column, args.streaming)
    if args.dry_run:
        print(describe_text(sources, args.eval_share, args.tokenizer, args.tokens))
        return
    indexes = make_text_shards(
        sources,
        args.tokenizer,
        args.out,
        tokens=args.tokens,
        shard_size=args.shard_size,
        eval_share=args.eval_share,
        workers=args.workers,
    )
    for index in indexes.values():
        print(index.summary())


if __name__ == "__main__":
    exit_on_user_error(main)
