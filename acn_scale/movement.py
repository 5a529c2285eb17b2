"""Runs that prune networks by movement while they train on: how they are set up, and the curve that they measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, nan
from pathlib import Path

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.convert.export import read_export, write_export
from acn_scale.data.shards import ShardIndex
from acn_scale.distributed import process_group
from acn_scale.durations import Horizon
from acn_scale.errors import RunFailed, UserError
from acn_scale.files import new_folder
from acn_scale.pretrain import train
from acn_scale.report.subject import Subject
from acn_scale.runs import check_run_folder, read_metrics, run_folder

SET_HERE = ("run.name", "run.dir", "model.depth", "train.init_from", "train.length", "data.eval", "eval.every", "prune")


@dataclass(frozen=True)
class Movement:
    """How far and how fast: `share` of what is left goes each `every`, until `sparsity` of the weights is zero."""

    sparsity: float
    share: float
    every: str
    overrides: Sequence[str]  # of the config that the network was trained with


def movement_runs(subjects: Sequence[Subject], plan: Movement, out: Path) -> list[Path]:
    """Run those in `out` that are not finished, one after the other in this process; return their folders.

    Raises UserError for what cannot be trained, and RunFailed where a signal stops a run: called again, it goes on.
    """
    if not 0 < plan.share < 1:
        raise UserError(f"--share {plan.share}: must be more than 0 and less than 1")
    if plan.sparsity == 1:
        raise UserError("--sparsities 1: movement prunes a share of what is left and never comes to 1; name less")
    out = out.absolute()  # the same run from wherever it is called
    runs = [_config(subject, plan, out) for subject in subjects]
    for subject, cfg in zip(subjects, runs, strict=True):
        _start(subject, Path(cfg.train.init_from))
    with process_group() as device:
        for cfg in runs:
            if not train(cfg, device):
                raise RunFailed(
                    f"{run_folder(cfg)}: stopped, as a signal asked for, and saved; the same command goes on"
                )
    return [run_folder(cfg) for cfg in runs]


def _config(subject: Subject, plan: Movement, out: Path) -> Config:
    """The network's own config with what pruning changes in it. Each sparsity is trained with for plan.every, then
    evaluated.
    """
    if not subject.is_run:
        raise UserError(f"{subject.given}: an export has no training data of its own; movement takes a run")
    for override in plan.overrides:
        key = override.partition("=")[0]
        if any(f"{key}.".startswith(f"{mine}.") or mine.startswith(f"{key}.") for mine in SET_HERE):
            raise UserError(f"--set {override}: that is set by the pruning itself")
    depth, times = subject.network.card.model.depth, ceil(log(1 - plan.sparsity) / log(1 - plan.share) - 1e-9)
    name = f"{subject.slug}/depth_{depth:02d}_share_{plan.share:g}_times_{times}"
    layout = ["train.zero_stage=0", "train.offload=none", "train.precision=fp32", "train.ema_decay=0.0"]
    layout += ["train.batch_ramp=0step", "train.anneal=0step", "train.freeze=false", "depth.cut_while_training=false"]
    layout += [f"checkpoint.every={plan.every}"]
    mine = {"run.dir": out, "run.name": name, "model.depth": depth}
    mine |= {"train.init_from": out / name / "start", "data.eval": subject.data.eval}
    mine |= {"prune.share": plan.share, "prune.every": plan.every, "eval.every": plan.every}
    path = subject.folder / "config.json"
    overrides = [*layout, *plan.overrides, *(f"{key}={_toml(value)}" for key, value in mine.items())]
    cfg = load_config(path, overrides)
    samples = ShardIndex.load(cfg.data.train, cfg.data.remote).num_samples // cfg.continual.tasks
    steps = (times + 1) * max(1, Horizon(samples, cfg.train.global_batch_size).count(plan.every))
    cfg = load_config(path, [*overrides, f"train.length={steps}step"])
    check_run_folder(cfg)
    return cfg


def _toml(value: object) -> str:
    return json.dumps(value if isinstance(value, int | float) else str(value), ensure_ascii=False)


def _start(subject: Subject, folder: Path) -> None:
    """The network, cut, as an export: what the run starts from."""
    net = subject.network
    if not folder.exists():
        with new_folder(folder) as new:
            write_export(net, new, "fp32")
    source = read_export(folder).card.source
    if Path(source).resolve() != Path(net.card.source).resolve():
        raise UserError(
            f"{folder}: of {source}, not of {net.card.source}; remove {folder.parent}, or name another --out"
        )


def movement_curve(folder: Path) -> list[dict[str, float]]:
    """Of a run: what its last evaluation at each sparsity says, in rising order; nan where that was not finite."""
    names = {"sparsity": "prune/sparsity", "sparsity_all": "prune/sparsity_all"}
    names |= {"accuracy": "eval/accuracy", "loss": "eval/loss"}
    lines = [line for line in read_metrics(folder) if names["sparsity"] in line]
    points = {
        line[names["sparsity"]]: {name: line.get(metric, nan) for name, metric in names.items()} for line in lines
    }
    return [points[sparsity] for sparsity in sorted(points)]
