"""Leaving a classifier at the first depth that is sure enough, sample by sample; what that costs and what it saves."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from acn_scale.config import ModelConfig
from acn_scale.depth import cost
from acn_scale.models.base import Model
from acn_scale.models.bert import MaskedLanguageHead


@dataclass(frozen=True)
class Criterion:
    """When a readout is sure enough: meets(measure(logits), threshold), both (batch,)."""

    measure: Callable[[Tensor], Tensor]
    meets: Callable[[Tensor, float], Tensor]
    sign: str


def entropy(logits: Tensor) -> Tensor:
    """logits: (..., classes) -> (...): of their softmax, as a share of its largest value, ln(classes).

    Dorovatas et al. 2025, table 7, leave below 0.7 nats of 10 classes: 0.30 here.
    """
    return torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1) / math.log(logits.shape[-1])


def confidence(logits: Tensor) -> Tensor:
    """logits: (..., classes) -> (...): the probability of the likeliest class."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


CRITERIA = {"entropy": Criterion(entropy, torch.lt, "<"), "confidence": Criterion(confidence, torch.gt, ">")}


class EarlyExit(nn.Module):
    """A classifier of which each sample leaves at the first depth where the shared head is sure enough.

    Samples that are done leave the batch, the rest goes on. Put it in eval(), or dropout decides too; and not under
    ZeRO-3 on several ranks: they would leave at different depths and wait for each other's weights.
    Raises ValueError for a masked language model: it has no one prediction for a sample.
    """

    def __init__(self, model: Model, threshold: float, criterion: str = "entropy") -> None:
        super().__init__()
        if isinstance(model.head, MaskedLanguageHead):
            raise ValueError("early exit takes a classifier, not a masked language model")
        self.model, self.threshold, self.criterion = model, threshold, CRITERIA[criterion]

    @torch.no_grad()
    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """The model's batch -> (logits (batch, classes), depth at which each sample left (batch,))."""
        readouts = self.model.readouts(**batch)
        logits, last = next(readouts), len(self.model.trunk.blocks)
        answers = torch.empty_like(logits)
        depths = torch.full((len(logits),), last, device=logits.device)
        here = torch.arange(len(logits), device=logits.device)  # the samples that are still under way
        for depth in range(last):
            done = self.criterion.meets(self.criterion.measure(logits), self.threshold)
            left = here[done]
            answers[left], depths[left] = logits[done], depth
            here = here[~done]
            if not len(here):
                return answers, depths
            logits = readouts.send(~done if len(left) else None)
        answers[here] = logits
        return answers, depths


@dataclass(frozen=True)
class Readings:
    """Of an evaluation set, (samples, depths): what the criterion measures, and whether the prediction is right."""

    criterion: str
    measured: Tensor
    correct: Tensor

    def depths(self, threshold: float) -> Tensor:
        """(samples,) where each leaves."""
        sure = CRITERIA[self.criterion].meets(self.measured, threshold)
        sure[:, -1] = True
        return sure.int().argmax(dim=1)  # the first


@torch.no_grad()
def take_readings(
    model: Model, batches: Iterable[tuple[dict[str, Tensor], Tensor]], criterion: str, device: torch.device
) -> Readings:
    """From one pass. `batches`: (batch, which of its samples count), as an Evaluation gives them; of one process."""
    model.eval()
    measured, correct = [], []
    for batch, counts in batches:
        batch = {name: values.to(device) for name, values in batch.items()}
        readouts = list(model.readouts(**batch))
        right = [model.score(logits, **batch)["accuracy"] for logits in readouts]
        measured.append(CRITERIA[criterion].measure(torch.stack(readouts, dim=1)).cpu()[counts])
        correct.append(torch.stack(right, dim=1).cpu()[counts])
    return Readings(criterion, torch.cat(measured), torch.cat(correct))


@dataclass(frozen=True)
class Point:
    """Means over the samples, at one threshold."""

    threshold: float
    accuracy: float  # 0..1
    depth: float
    flops: float  # of the blocks up to the exit and of the head at each depth on the way


def point(readings: Readings, flops: Sequence[int], threshold: float) -> Point:
    """`flops`: exit_flops of the model."""
    depths = readings.depths(threshold)
    accuracy = readings.correct.gather(1, depths[:, None]).double().mean().item()
    spent = torch.tensor(flops, dtype=torch.float64)[depths].mean().item()
    return Point(threshold, accuracy, depths.double().mean().item(), spent)


def tradeoff(readings: Readings, flops: Sequence[int], points: int = 41) -> list[Point]:
    """From none to nearly all leaving at depth 0: at quantiles of what was measured below full depth, deepest first."""
    levels = np.quantile(readings.measured[:, :-1].numpy(), np.linspace(0, 1, points))
    found = [point(readings, flops, float(level)) for level in np.unique(levels)]
    return sorted(found, key=lambda each: each.flops, reverse=True)


def cheapest(curve: Sequence[Point], accuracy: float, tolerance: float) -> Point:
    """The point that saves most among those within `tolerance` points (of 100) of an accuracy (0..1)."""
    return min((each for each in curve if each.accuracy >= accuracy - tolerance / 100 - 1e-9), key=lambda p: p.flops)


def tradeoff_figure(cfg: ModelConfig, name: str, readings: Readings, curve: Sequence[Point], chosen: Point) -> Figure:
    """Accuracy over operations: of early exit, with the chosen threshold marked, and of one cut for all samples."""
    cuts = [cost(cfg, depth).flops for depth in range(cfg.depth + 1)]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    early = [[100 * each.flops / cuts[-1], 100 * each.accuracy] for each in curve]
    (line,) = axes.plot(*zip(*early, strict=True), marker=".", label=f"early exit by {readings.criterion}")
    ring = {"marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "none", "color": line.get_color()}
    sign = CRITERIA[readings.criterion].sign
    label = f"{sign} {chosen.threshold:.3g}: mean depth {chosen.depth:.1f}"
    axes.plot(100 * chosen.flops / cuts[-1], 100 * chosen.accuracy, label=label, **ring)
    accuracy = 100 * readings.correct.double().mean(dim=0)
    axes.plot([100 * flops / cuts[-1] for flops in cuts], accuracy, marker="o", label="cut at depth 0, 1, ...")
    axes.set_xlabel("FLOPs (% of full depth), with every evaluation of the head")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"{name}: early exit, and one cut for all samples")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
