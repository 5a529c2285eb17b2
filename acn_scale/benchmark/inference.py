"""A trained ACN, cut where it is as good as its residual twin, beside the twin; the cost of reading out every depth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acn_scale.benchmark import work
from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import Measure, Side, beside
from acn_scale.convert import read_model
from acn_scale.data import build_evaluation
from acn_scale.depth import cutoff
from acn_scale.distributed import local_device
from acn_scale.errors import UserError
from acn_scale.report.measure import cut_copy
from acn_scale.runs import read_config

BATCH = 32
PASSES = 5  # of a turn, over the evaluation set
TOLERANCE = 0.5  # points of accuracy that count as equal, as in the cut-off


def inference_rows(acn: Path, twin: Path, rounds: int) -> Iterator[Row]:
    """Seconds of a pass over the evaluation set, of two runs of a classifier on the same data.

    The ACN is cut where it is as good as its twin. Where that is at no depth it is whole, and the rows say that it is
    worse. Raises UserError for a folder that is no run, and for one that has not been evaluated.
    """
    accuracies = [_accuracy(path) for path in (acn, twin)]
    ours, theirs = accuracies
    lowest = theirs[-1] - TOLERANCE / 100 - 1e-9
    depth = next((depth for depth, value in enumerate(ours) if value >= lowest), None)
    at = "at equal accuracy" if depth is not None else f"more than {TOLERANCE} points below the twin"
    depth = len(ours) - 1 if depth is None else depth
    sides = {"ours": Side(at_a_depth, acn, acn, depth)}
    for name, cut in (("twin", len(theirs) - 1), ("twin at its own cut-off", cutoff(theirs, TOLERANCE))):
        sides[f"{name}: {_cut(theirs, cut)}"] = Side(at_a_depth, acn, twin, cut)
    yield from beside(f"inference {at}: {_cut(ours, depth)}", sides, rounds)
    sides = {"ours": Side(at_every_depth, acn), f"{len(ours)} evaluations": Side(one_by_one, acn)}
    sides["one evaluation"] = Side(at_full_depth, acn)
    yield from beside(f"evaluation at all of {len(ours)} depths", sides, rounds)


def _accuracy(run: Path) -> list[float]:
    accuracy = read_model(run).card.accuracy
    if accuracy is None:
        raise UserError(f"{run}: has not been evaluated yet")
    return accuracy


def _cut(accuracy: list[float], depth: int) -> str:
    return f"{depth} of {len(accuracy) - 1} blocks, {100 * accuracy[depth]:.1f} %"


@contextmanager
def at_a_depth(data: Path, run: Path, depth: int) -> Iterator[Measure]:
    """Seconds of a pass of the run's network, cut there, over the evaluation set of the run `data`."""
    model = _model(run)
    model.trunk.truncate(depth)
    yield _passes(data, model)


@contextmanager
def at_every_depth(run: Path) -> Iterator[Measure]:
    model = _model(run)

    def scores(**batch: Any) -> None:
        for logits in model.readouts(**batch):
            model.score(logits, **batch)

    yield _passes(run, scores)


@contextmanager
def one_by_one(run: Path) -> Iterator[Measure]:
    """All of the depths, each by an evaluation of its own."""
    model = _model(run)
    cuts = [cut_copy(model, depth) for depth in range(len(model.trunk.blocks) + 1)]
    yield _passes(run, lambda **batch: [_evaluate(cut, batch) for cut in cuts])


@contextmanager
def at_full_depth(run: Path) -> Iterator[Measure]:
    model = _model(run)
    yield _passes(run, lambda **batch: _evaluate(model, batch))


def _evaluate(model: nn.Module, batch: dict[str, Any]) -> None:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    model.score(model(**inputs)["logits"], **batch)


def _model(run: Path) -> nn.Module:
    return read_model(run).model.to(local_device())


def _passes(run: Path, each: Callable[..., Any]) -> Measure:
    """Seconds of a pass over the run's evaluation set."""
    batches = []
    for batch, counts in build_evaluation(read_config(run)):
        split = {name: values[counts].to(local_device()).split(BATCH) for name, values in batch.items()}
        batches += [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]

    @torch.inference_mode()
    def measure() -> float:
        return work.seconds(lambda: [each(**batch) for batch in batches], PASSES)

    return measure
