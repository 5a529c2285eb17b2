"""A run's network on its evaluation shards: accuracy at full depth and with early exit, operations, time."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.convert import read_model
from acn_scale.data import build_evaluation
from acn_scale.data.stream import Evaluation
from acn_scale.depth import cost, exit_flops
from acn_scale.distributed import local_device
from acn_scale.early_exit import CRITERIA, EarlyExit, Point, cheapest, point, take_readings, tradeoff, tradeoff_figure
from acn_scale.errors import UserError
from acn_scale.models.base import Model
from acn_scale.report.measure import BATCH_SIZES, in_turns
from acn_scale.runs import read_config, write_json
from acn_scale.tables import aligned

TIMED = 64  # samples


def evaluate_run(
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    threshold: float | None = None,
    criterion: str = "entropy",
    json: Path | None = None,
) -> str:
    """Write <run>/report/early_exit.png, and all numbers to `json`; return them as a table.

    Without a threshold: the one that saves most within eval.tolerance points of full depth's accuracy. It is chosen on
    the samples it is then judged by. Raises UserError for a folder that is no run, for one whose checkpoint cannot be
    read, and for a masked language model.
    """
    cfg = _config(folder, overrides)
    if json is not None and not json.parent.is_dir():
        raise UserError(f"--json {json}: {json.parent} is not a folder")
    evaluation = build_evaluation(cfg)
    device = local_device()
    net = read_model(folder)
    model, shape = net.model.to(device), net.card.model
    kept: list[dict[str, Tensor]] = []
    readings = take_readings(model, _keeping(evaluation, kept), criterion, device)
    flops = exit_flops(shape)
    curve = tradeoff(readings, flops)
    accuracy = readings.correct.double().mean(dim=0).tolist()
    if threshold is None:
        chosen = cheapest(curve, accuracy[-1], cfg.eval.tolerance)
        why = f"saves most within {cfg.eval.tolerance} points, on these samples"
    else:
        chosen, why = point(readings, flops, threshold), "as given"
    full = Point(float("nan"), accuracy[-1], shape.depth, cost(shape, shape.depth).flops)
    samples = {name: _joined([batch[name] for batch in kept]).to(device) for name in kept[0]}
    early = EarlyExit(model, chosen.threshold, criterion)
    times = {size: timed(model, early, samples, size, folder.name) for size in BATCH_SIZES}
    picture = folder / "report" / "early_exit.png"
    figure = tradeoff_figure(shape, folder.name, readings, curve, chosen)
    try:
        picture.parent.mkdir(exist_ok=True)
        figure.savefig(picture, dpi=150)
        if json is not None:
            write_json(json, _numbers(criterion, accuracy, full, chosen, curve, times))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    head = f"{folder.name}: {len(readings.correct):,} samples of {cfg.data.eval}; threshold {why}"
    table = _table(full, chosen, f"{criterion} {CRITERIA[criterion].sign} {chosen.threshold:.4g}", times)
    return f"{head}\n\n{table}\n\nFLOPs of early exit count the head at each depth on the way.\nTrade-off:  {picture}"


def _config(folder: Path, overrides: Sequence[str]) -> Config:
    cfg = load_config(folder / "config.json", overrides)
    if cfg.model != read_config(folder).model:
        raise UserError(f"{folder}: its weights fit its own model alone; keys of model cannot be changed here")
    if cfg.model.num_classes < 2:
        raise UserError(f"{folder}: model.num_classes = {cfg.model.num_classes}: early exit takes a classifier")
    return cfg


def _keeping(evaluation: Evaluation, kept: list[dict[str, Tensor]]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The evaluation's batches; what is timed afterwards, evenly spread over them, is left in `kept`."""
    every, seen = max(1, evaluation.samples.num_samples // TIMED), 0
    for batch, counts in evaluation:
        chosen = (torch.arange(seen, seen + len(counts)) % every == 0) & counts
        kept.append({name: values[chosen] for name, values in batch.items()})
        seen += len(counts)
        yield batch, counts


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches after one another; texts, (batch, tokens), padded with zeros to the longest, as their mask is there."""
    if parts[0].ndim == 2:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1])) for part in parts]
    return torch.cat(list(parts))


def _inputs(samples: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Some of the samples, without labels; texts no longer than the longest of them."""
    inputs = {name: values[start:stop] for name, values in samples.items() if name != "labels"}
    if "mask" in inputs:
        longest = int(inputs["mask"].sum(dim=1).max())
        inputs = {name: values[:, :longest] for name, values in inputs.items()}
    return inputs


def timed(
    model: Model, early: EarlyExit, samples: dict[str, Tensor], batch_size: int, name: str
) -> tuple[float, float]:
    """Seconds for each sample at full depth and with early exit: medians of passes over the samples, in turns."""
    count = len(samples["labels"])
    batches = [_inputs(samples, start, start + batch_size) for start in range(0, count, batch_size)]

    def all_batches(run: Callable[..., Any]) -> None:
        for batch in batches:
            run(**batch)

    works = [partial(all_batches, run) for run in (model, early)]
    full, exits = (statistics.median(column) for column in in_turns(works, f"{name}: timing batch {batch_size}"))
    return full / count, exits / count


def _table(full: Point, chosen: Point, name: str, times: dict[int, tuple[float, float]]) -> str:
    head = ["", "accuracy (%)", "mean depth", "MFLOPs", "saved", *(f"ms a sample, batch {size}" for size in times)]
    rows = [head]
    for place, (label, at) in enumerate((("full depth", full), (name, chosen))):
        cells = [
            f"{100 * at.accuracy:.2f}",
            f"{at.depth:.2f}",
            f"{at.flops / 1e6:,.2f}",
            f"{1 - at.flops / full.flops:.0%}",
        ]
        rows.append([label, *cells, *(f"{1000 * pair[place]:.3f}" for pair in times.values())])
    return aligned(rows)


def _numbers(
    criterion: str,
    accuracy: list[float],
    full: Point,
    chosen: Point,
    curve: Sequence[Point],
    times: dict[int, tuple[float, float]],
) -> dict[str, Any]:
    seconds = {size: {"full_depth": pair[0], "early_exit": pair[1]} for size, pair in times.items()}
    return {
        "criterion": criterion,
        "accuracy_by_depth": accuracy,
        "full_depth": {"accuracy": full.accuracy, "depth": full.depth, "flops": full.flops},
        "early_exit": asdict(chosen),
        "curve": [asdict(each) for each in curve],
        "seconds_per_sample_by_batch_size": seconds,
    }
