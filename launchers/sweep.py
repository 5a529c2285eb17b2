"""Submit a grid of runs as one job array: python launchers/sweep.py --config FILE.toml --grid optim.lr=1e-3,3e-3
--seeds 0 1 2 [key.sub=value ...]

Each combination is a run of its own, <run.name>/<what is special about it>.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import submission
from cluster_options import add_options

from acn_scale.cli import exit_on_user_error, load_config, positive
from acn_scale.errors import UserError


def combinations(grid: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
    """Overrides of each run of the grid. Raises UserError for an axis that is not key.sub=value,value,..."""
    axes = []
    for axis in [*grid, *([f"run.seed={','.join(map(str, seeds))}"] if seeds else [])]:
        key, sign, values = axis.partition("=")
        if not sign or not key or not all(values.split(",")):
            raise UserError(f"--grid {axis}: must be key.sub=value,value,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in itertools.product(*axes)]


def run_name(combination: Sequence[str]) -> str:
    """optim.lr=1e-3, run.seed=0 -> lr=1e-3-seed=0"""
    pairs = [override.partition("=") for override in combination]
    return "-".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file that the runs have in common")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys to change in all of them")
    parser.add_argument("--grid", nargs="+", default=[], metavar="key.sub=a,b,c", help="keys and their values")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="values of run.seed")
    parser.add_argument("--parallel", type=positive, help="runs at the same time (default: all)")
    add_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.cluster == "debug":
        raise UserError("--cluster debug: is for one run; launchers/pretrain.py has it")
    base = load_config(args.config, args.overrides)
    configs = []
    for combination in combinations(args.grid, args.seeds):
        name = f"{base.run.name}/{run_name(combination)}" if combination else base.run.name
        configs.append(load_config(args.config, [*args.overrides, *combination, f'run.name="{name}"']))
    code, _ = submission.launch_all(args, base.run.name.replace("/", "_"), configs, parallel=args.parallel)
    sys.exit(code)


if __name__ == "__main__":
    exit_on_user_error(main)
