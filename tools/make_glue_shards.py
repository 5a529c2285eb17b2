"""Write the tasks of GLUE as webdataset shards: OUT/cola/train, OUT/cola/eval, OUT/cola/test, ...

python tools/make_glue_shards.py --source tsv:glue_data --out data/glue
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error
from acn_scale.data.tasks import TASKS

SOURCES = """sources:
  tsv:FOLDER      the official files, FOLDER/CoLA/train.tsv, ...
  hf:[NAME]       a data set of the Hugging Face hub whose configs are the tasks (nyu-mll/glue), or a local folder"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=SOURCES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", required=True, help="where the tasks come from: see below")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK",
        help=f"some of {', '.join(TASKS)} (default: all; ax, the diagnostic set, where the source has it)")  # fmt: skip
    add("--out", required=True, type=Path, help="folder to write to")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale.data.make_glue import make_glue_shards

    for index in make_glue_shards(args.source, args.tasks, args.out):
        print(index.summary())


if __name__ == "__main__":
    exit_on_user_error(main)
