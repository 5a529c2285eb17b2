"""Fine-tune on GLUE, all tasks, learning rates and seeds at once: python launchers/glue.py --from runs/bert/NAME
--data data/glue --lr 1e-5 2e-5 5e-5 --seeds 0 1 2 [key.sub=value ...]

Each is a run of its own, <name>/<task>/lr=...-seed=..., with the task's metrics at every depth in eval/ and the file
for the GLUE server in submission/. tools/results.py makes the table of them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import submission
import sweep
from cluster_options import add_options
from local import worst
from snapshots import FINETUNE

from acn_scale.checkpoint import trained
from acn_scale.cli import exit_on_user_error, load_config, positive
from acn_scale.config import Config
from acn_scale.data.tasks import TASKS
from acn_scale.downstream.source import completed
from acn_scale.errors import UserError
from acn_scale.runs import run_folder
from acn_scale.stopping import EXIT_STOPPED

TRAINED = [name for name, task in TASKS.items() if "train" in task.splits]
RECIPE = Path(__file__).parents[1] / "configs/glue/paper.toml"
SMALL = ("rte", "mrpc", "stsb")  # that gain from MNLI (Phang et al. 2018, arXiv 1811.01088)

# Where keys are looked at before there is a network: deep enough for all that name a block.
ANY_NETWORK = {
    "name": "bert",
    "connectivity": "acn",
    "depth": 1000,
    "dim": 64,
    "num_heads": 1,
    "vocab_size": 100,
    "num_classes": 2,
}


def of_task(text: str) -> tuple[str, str]:
    """TASK:key.sub=a,b as (task, axis), for argparse."""
    task, _, axis = text.partition(":")
    if task not in TRAINED or "=" not in axis:
        tasks = ", ".join(TRAINED)
        raise argparse.ArgumentTypeError(f"{text}: must be TASK:key.sub=value,value,... with one of {tasks}")
    return task, axis


def configs_of(
    args: argparse.Namespace,
    task: str,
    starts: Mapping[int, str] = MappingProxyType({}),
    complete: Callable[[dict[str, Any]], dict[str, Any]] = completed,
) -> list[Config]:
    """Of all runs of a task. `starts`: what those of a seed start from, where that is another network of --from."""
    found = []
    own = [axis for name, axis in args.grid if name == task]
    if args.lr and not any(axis.startswith("optim.lr=") for axis in own):
        own = [f"optim.lr={','.join(args.lr)}", *own]
    for combination in sweep.combinations(own, args.seeds):
        values = [f'run.name="{args.name}/{task}/{sweep.run_name(combination)}"', f'train.init_from="{args.source}"']
        values += [f'data.{split}="{args.data}/{task}/{split}"' for split in ("train", "eval")]
        cfg = load_config(args.config, [*args.overrides, *combination, *values], complete)
        start = {"init_from": starts.get(cfg.run.seed, args.source)}
        found.append(cfg.model_copy(update={"train": cfg.train.model_copy(update=start)}))
    return found


def check_keys(args: argparse.Namespace) -> None:
    """Raises UserError for a recipe or values that no network could be fine-tuned with; there may be none yet."""

    def of_any(values: dict[str, Any]) -> dict[str, Any]:
        model = ANY_NETWORK | values.get("model", {})
        return values | {"model": model, "data": {"tokenizer": args.source} | values.get("data", {})}

    for task in args.tasks or TRAINED:
        configs_of(args, task, complete=of_any)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="source", required=True, help="a run, a checkpoint, an export or hf:FOLDER of an encoder")
    add("--data", type=Path, default=Path("data/glue"), help="folder of make_glue_shards.py (default: data/glue)")
    add("--config", type=Path, default=RECIPE, help="recipe (default: configs/glue/paper.toml)")
    add("--tasks", nargs="+", choices=TRAINED, metavar="TASK", help=f"some of {', '.join(TRAINED)} (default: "
        "those that --data holds)")  # fmt: skip
    add("--lr", nargs="+", default=[], help="learning rates to try (default: the recipe's)")
    add("--grid", nargs="+", type=of_task, default=[], metavar="TASK:key.sub=a,b", help="keys of one task and values "
        "to try; its optim.lr takes the place of --lr")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], help="of the new head, the order and dropout (default: 0)")
    add("--from-mnli", action="store_true", help=f"start {', '.join(SMALL)} from the MNLI run of the first "
        "settings and the same seed; on Slurm they leave the queue where that one fails")  # fmt: skip
    add("--name", help="folder of the runs below run.dir (default: glue/<last part of --from>)")
    add(
        "--parallel",
        type=positive,
        help="runs at the same time, also of those that wait for one MNLI run (default: all)",
    )
    add("overrides", nargs="*", metavar="key.sub=value", help="keys to change in all of them")
    add_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.cluster == "debug":
        raise UserError("--cluster debug: is for one run; acn_scale/finetune.py is that")
    args.name = args.name or f"glue/{Path(args.source.partition(':')[2] or args.source).name}"
    args.tasks = args.tasks or [task for task in TRAINED if (args.data / task / "train" / "index.json").exists()]
    if not args.tasks:
        raise UserError(f"--data {args.data}: holds no tasks; tools/make_glue_shards.py makes them")
    if unknown := [task for task, _ in args.grid if task not in args.tasks]:
        raise UserError(f"--grid {unknown[0]}: must be one of the tasks {', '.join(args.tasks)}")
    later = [task for task in args.tasks if args.from_mnli and task in SMALL]
    if later and "mnli" not in args.tasks:
        raise UserError("--from-mnli: --tasks must have mnli")
    first = {task: configs_of(args, task) for task in args.tasks if task not in later}
    configs = [cfg for part in first.values() for cfg in part]
    starts = {cfg.run.seed: cfg for cfg in reversed(first.get("mnli", []))}
    folders = {seed: str(run_folder(cfg)) for seed, cfg in starts.items()}
    second = [cfg for task in later for cfg in configs_of(args, task, folders)]
    for cfg in second:
        submission.check(cfg, args)  # before MNLI's hours
    launch = partial(submission.launch_all, args, args.name.replace("/", "_"), program=FINETUNE)
    code, jobs = launch(configs, parallel=args.parallel)
    args.extra = [*args.extra, "kill-on-invalid-dep=yes"]
    ids = {str(run_folder(cfg)): job for cfg, job in zip(configs, jobs, strict=False)}
    for seed in dict.fromkeys(cfg.run.seed for cfg in second):
        if code == EXIT_STOPPED:
            break
        start = folders[seed]
        waiting = [cfg for cfg in second if cfg.run.seed == seed]
        if args.cluster == "local" and not args.dry_run and not trained(starts[seed]):
            print(f"{start}: did not come to its end; not begun: {', '.join(str(run_folder(cfg)) for cfg in waiting)}",
                  file=sys.stderr)  # fmt: skip
        else:
            after = [ids[start]] if ids else []
            code = worst([code, launch(waiting, parallel=args.parallel, after=after)[0]])
    if not args.dry_run:
        print(f"\ntable:  python tools/results.py {Path(configs[0].run.dir) / args.name}")
    sys.exit(code)


if __name__ == "__main__":
    exit_on_user_error(main)
