"""Evaluate fine-tuned classifiers of texts at every depth: the metrics of their GLUE tasks, or those under noise.

    python tools/evaluate_task.py runs/glue/ac_bert/*/lr=* --noise swap_0.1 drop_0.1

One after the other; those that fail are named at the end. Writes SOURCE/eval/<task>.json, the predictions beside it,
and SOURCE/submission/ for the GLUE server; with --noise, only SOURCE/eval/<task>+<noise>.json. The end of
acn_scale/finetune.py does the same, without noise. Runs on several ranks too (torchrun, srun, deepspeed).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from acn_scale.cli import exit_on_user_error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, nargs="+", help="a run, a checkpoint or an export")
    add("--data", metavar="SHARDS", help="shards of the task, with the evaluation and test sets that lie beside them "
        "(default: the run's)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="for the results of one source (default: the source's folder)")
    add("--noise", nargs="+", default=[], metavar="NAME", help="on the texts: swap_P swaps two characters of each word "
        "with probability P, drop_P drops words; such as swap_0.1 drop_0.1")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # a launcher's own
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()

    from acn_scale import distributed
    from acn_scale.downstream.tasks import evaluate_tasks
    from acn_scale.downstream.text_noise import text_noise

    noises = {name: text_noise(name) for name in args.noise}
    with distributed.process_group() as device:
        for text in evaluate_tasks(args.source, device, data=args.data, noises=noises, out=args.out):
            if distributed.rank() == 0:
                print(text, flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
