"""Train a SentencePiece tokenizer with [PAD] [UNK] [CLS] [SEP] [MASK] on a sample of the training documents."""

import argparse
from collections.abc import Sequence

from acn_scale.cli import exit_on_user_error, positive, share, text_parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = text_parser(__doc__)
    add = parser.add_argument
    add("--vocab-size", type=positive, default=32768, help="pieces, the special ones included (default: 32768)")
    add("--model", choices=("unigram", "bpe"), default="unigram", help="kind of tokenizer (default: unigram)")
    add("--sample-mb", type=positive, default=200, help="million characters to train on at most, drawn from all "
        "documents (default: 200); it takes about 0.7 GB and 21 bytes a "
        "character, 5 GB for 200")  # fmt: skip
    add("--character-coverage", type=share, default=0.9995, help="share of the text's characters that get a piece of "
        "their own, the rarest ones become [UNK]; default: 0.9995")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.data.make_text import EVAL_SHARE, describe_text, train_source_tokenizer
    from acn_scale.data.text_sources import TextSources

    sources = TextSources(args.source, args.weights, args.column, args.streaming)
    eval_share = EVAL_SHARE if args.eval_share is None else args.eval_share
    if args.dry_run:
        print(describe_text(sources, eval_share))
        return
    path = train_source_tokenizer(
        sources,
        args.vocab_size,
        args.out,
        model=args.model,
        sample_mb=args.sample_mb,
        character_coverage=args.character_coverage,
        eval_share=eval_share,
    )
    print(path)


if __name__ == "__main__":
    exit_on_user_error(main)
