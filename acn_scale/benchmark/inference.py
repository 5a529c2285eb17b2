"""A trained ACN, cut where it is as good as its residual twin, beside the twin; the cost of reading out every depth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from acn_scale.benchmark import work
from acn_scale.benchmark.rows import Row, in_turns, row
from acn_scale.convert import read_model
from acn_scale.convert.network import Network
from acn_scale.data import build_evaluation
from acn_scale.depth import cutoff
from acn_scale.distributed import local_device
from acn_scale.errors import UserError
from acn_scale.report.measure import cut_copy
from acn_scale.runs import read_config

BATCH = 32
PASSES = 5  # of a turn, over the evaluation set
TOLERANCE = 0.5  # points of accuracy that count as equal, as in the cut-off


@torch.inference_mode()
def inference_rows(acn: Path, twin: Path, rounds: int) -> list[Row]:
    """Seconds of a pass over the evaluation set, of two runs of a classifier on the same data.

    Raises UserError for a folder that is no run, and for an ACN that is at no depth as good as its twin.
    """
    nets = [read_model(path) for path in (acn, twin)]
    for path, net in zip((acn, twin), nets, strict=True):
        if net.card.accuracy is None:
            raise UserError(f"{path}: has not been evaluated yet")
    device = local_device()
    for net in nets:
        net.model.to(device)
    batches = _batches(acn, device)
    lowest = nets[1].card.accuracy[-1] - TOLERANCE / 100 - 1e-9
    depth = next((depth for depth, value in enumerate(nets[0].card.accuracy) if value >= lowest), None)
    if depth is None:
        raise UserError(f"{acn}: at no depth within {TOLERANCE} points of {twin}")
    cut = _Cut(nets[0], depth)
    peers = [_Cut(nets[1], depth) for depth in (nets[1].card.model.depth, cutoff(nets[1].card.accuracy, TOLERANCE))]
    return [*_cuts(cut, peers, batches, rounds), *_every_depth(nets[0], batches, rounds)]


class _Cut:
    """A network cut at a depth, and what it is called."""

    def __init__(self, net: Network, depth: int) -> None:
        self.model = cut_copy(net.model, depth)
        self.name = f"{depth} of {net.card.model.depth} blocks, {100 * net.card.accuracy[depth]:.1f} %"


def _cuts(cut: _Cut, peers: list[_Cut], batches: list[dict[str, Any]], rounds: int) -> list[Row]:
    whole, at_its_cutoff = peers
    contenders = {
        "ACN": cut,
        f"twin: {whole.name}": whole,
        f"twin at its own cut-off: {at_its_cutoff.name}": at_its_cutoff,
    }
    figures = in_turns({name: _pass(each.model, batches) for name, each in contenders.items()}, rounds)
    ours, at = figures.pop("ACN"), f"inference at equal accuracy: {cut.name}"
    return [row(at, name, "s", ours, seconds, more_is_better=False) for name, seconds in figures.items()]


def _every_depth(net: Network, batches: list[dict[str, Any]], rounds: int) -> list[Row]:
    model, depth = net.model, net.card.model.depth
    cuts = [cut_copy(model, each) for each in range(depth + 1)]

    def at_every_depth(**batch: Any) -> None:
        for logits in model.readouts(**batch):
            model.score(logits, **batch)

    def one_by_one(**batch: Any) -> None:
        for each in cuts:
            inputs = {name: values for name, values in batch.items() if name != "labels"}
            each.score(each(**inputs)["logits"], **batch)

    runs = {"ours": at_every_depth, f"{depth + 1} evaluations": one_by_one, "one evaluation": cuts[-1]}
    figures = in_turns({name: _pass(run, batches) for name, run in runs.items()}, rounds)
    what = f"evaluation at all of {depth + 1} depths"
    return [row(what, peer, "s", figures["ours"], figures[peer], more_is_better=False) for peer in list(figures)[1:]]


def _batches(run: Path, device: torch.device) -> list[dict[str, Any]]:
    """The run's evaluation set."""
    parts = []
    for batch, counts in build_evaluation(read_config(run)):
        split = {name: values[counts].to(device).split(BATCH) for name, values in batch.items()}
        parts += [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
    return parts


def _pass(run: Callable[..., Any], batches: Sequence[dict[str, Any]]) -> Callable[[], float]:
    """Seconds of a pass."""
    return lambda: work.seconds(lambda: [run(**batch) for batch in batches], PASSES)
