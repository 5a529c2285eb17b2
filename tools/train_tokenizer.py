"""Train a SentencePiece tokenizer with [PAD] [UNK] [CLS] [SEP] [MASK] on the training documents of a source."""

import argparse
from pathlib import Path

from acn_scale.cli import exit_on_user_error
from acn_scale.data.make import TEXT_SOURCES, train_source_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", required=True, choices=sorted(TEXT_SOURCES), help="where the text comes from")
    parser.add_argument("--vocab-size", type=int, default=32768, help="pieces, the special ones included")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    args = parser.parse_args()
    print(train_source_tokenizer(args.source, args.vocab_size, args.out))


if __name__ == "__main__":
    exit_on_user_error(main)
