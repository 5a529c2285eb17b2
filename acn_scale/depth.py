"""How much of its depth a network uses: scores at every depth, the cut-off, what is saved there."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from acn_scale import distributed
from acn_scale.config import BertConfig, Config, ModelConfig, SentenceDataConfig
from acn_scale.data.samples import Batch
from acn_scale.data.sentences import USUAL_TOKENS
from acn_scale.data.stream import Evaluation
from acn_scale.models import build_model
from acn_scale.optim import freeze

if TYPE_CHECKING:  # a run needs it at its first evaluation only
    from matplotlib.figure import Figure


@torch.no_grad()
def evaluate(
    model: nn.Module, evaluation: Evaluation, device: torch.device, *, changes: bool = False
) -> dict[str, list[float]]:
    """The mean of each of the model's scores at depth 0, 1, ..., over the samples of all ranks, in one pass.

    With `changes`, also "change", how much of the logits a block makes: |logits at depth k - those at k - 1| by |logits
    at full depth|, root mean squares over samples and classes; at depth 0 they are all its own.

    Each sample counts once, whatever the number of ranks and the batch size. Call it on every rank.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    total = 0
    for scores, counts in scored(model, evaluation, device, changes=changes):
        total += int(counts.sum())
        for name, values in scores.items():
            added = values[:, counts].double().sum(dim=1)
            sums[name] = sums[name] + added if name in sums else added
    model.train(was_training)
    total = distributed.sum_over_ranks(torch.tensor(float(total), dtype=torch.float64, device=device))
    sums = {name: distributed.sum_over_ranks(values) for name, values in sums.items()}
    if changes:
        size = sums.pop("size")[-1].clamp_min(torch.finfo(torch.float64).tiny)
        sums["change"] = total * (sums["change"] / size).sqrt()
    return {name: (values / total).tolist() for name, values in sums.items()}


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """(..., classes) less their mean: what is added to all classes alike changes no prediction."""
    logits = logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)


@torch.no_grad()
def scored(
    model: nn.Module, evaluation: Iterable[tuple[Batch, torch.Tensor]], device: torch.device, *, changes: bool = False
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Of each batch: the model's scores (depths, batch) at depth 0, 1, ..., in one pass, and which samples count
    (batch,) bool. Put the model in eval() before, or dropout has its say.

    With `changes`, also the squares of a sample's logits, "size", and of what the block changed in them, "change".
    """
    for batch, counts in evaluation:
        batch = {name: values.to(device) for name, values in batch.items()}
        depths, before = [], 0.0
        for output in model.readouts(**batch):
            depths.append(model.score(output, **batch))
            if changes:
                logits = _centred(output).flatten(1)
                depths[-1] |= {"size": logits.square().sum(dim=1), "change": (logits - before).square().sum(dim=1)}
                before = logits
        yield {name: torch.stack([scores[name] for scores in depths]) for name in depths[0]}, counts.to(device)


def cutoff(accuracy: list[float], tolerance: float) -> int:
    """The smallest depth whose accuracy (0..1) is within `tolerance` points (of 100) of full depth's."""
    lowest = accuracy[-1] - tolerance / 100 - 1e-9  # rounding must not decide
    return next(depth for depth, value in enumerate(accuracy) if value >= lowest)


@dataclass(frozen=True)
class Cost:
    parameters: int
    flops: int  # of the forward pass of one sample, a multiply-add counted as two, for the tokens that the head takes


def cost(cfg: ModelConfig, depth: int) -> Cost:
    """Of the model cut at `depth`, counted without building it."""
    with torch.device("meta"):
        model = build_model(cfg)
        model.trunk.truncate(depth)
        model.eval()
        batch = batch_of(cfg, 1, mask_ratio=0.0)
        del batch["labels"]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())


def exit_flops(cfg: ModelConfig) -> list[int]:
    """Operations on one sample that leaves at depth 0, 1, ..., counted as in Cost.

    The head is evaluated at each depth on the way, to know whether to leave: that is k heads more than cost(cfg, k).
    And all blocks are computed for all tokens; a cut network's last one is for those alone that its head takes.
    """
    with torch.device("meta"):
        model = build_model(cfg).eval()
        batch = batch_of(cfg, 1, mask_ratio=0.0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            return [counter.get_total_flops() for _ in model.readouts(**batch)]


def batch_of(model: ModelConfig, samples: int, mask_ratio: float) -> dict[str, torch.Tensor]:
    """A batch without values, as the model is trained on it. Call it under torch.device("meta")."""
    if isinstance(model, BertConfig):
        tokens = torch.zeros(samples, model.max_tokens, dtype=torch.long)
        if model.num_classes:
            labels = torch.zeros(samples, dtype=torch.long if model.num_classes > 1 else torch.float)
            return {"tokens": tokens, "labels": labels}
        masked = torch.zeros(samples, max(1, round(mask_ratio * model.max_tokens)), dtype=torch.long)
        return {"tokens": tokens, "masked": masked, "labels": masked.clone()}
    images = torch.zeros(samples, model.channels, model.image_size, model.image_size)
    return {"images": images, "labels": torch.zeros(samples, dtype=torch.long)}


def step_flops(model: ModelConfig, mask_ratio: float, *, frozen: bool = False) -> int:
    """Operations of a forward and a backward pass of one sample, a multiply-add counted as two. `frozen`: all but the
    head is.

    What recomputing adds is left out: it is not work on the model.
    """
    with torch.device("meta"):
        network = build_model(model.model_copy(update={"recompute": False}))
        if frozen:
            freeze(network)
        with FlopCounterMode(display=False) as counter:
            network(**batch_of(model, 2, mask_ratio))["loss"].backward()
    return counter.get_total_flops() // 2


def as_trained(cfg: Config, info: Mapping[str, Any]) -> Config:
    """With model.max_tokens as long as sequences of its data are at most. `info`: of its shards' index."""
    tokens = info.get("tokens")
    if isinstance(cfg.data, SentenceDataConfig):
        tokens = cfg.data.max_tokens or min(USUAL_TOKENS, cfg.model.max_tokens)
    model = cfg.model if tokens is None else cfg.model.model_copy(update={"max_tokens": tokens})
    return cfg.model_copy(update={"model": model})


def image_tokens(cfg: ModelConfig) -> int:
    """Tokens that the trunk sees of one image; 0 of a text."""
    if isinstance(cfg, BertConfig):
        return 0
    return (cfg.image_size // cfg.patch_size) ** 2 + (cfg.pool != "mean")


def depth_figure(
    curves: dict[str, list[float]], tolerance: float, intervals: dict[str, list[tuple[float, float]]] | None = None
) -> "Figure":
    """Accuracy over depth, a curve for each name, with its cut-off marked, and a band where intervals are given."""
    from matplotlib.figure import Figure

    many = len(curves) > 6  # more than there is room for beside the curves
    figure = Figure(figsize=(6, 4 + many * 0.11 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for name, accuracy in curves.items():
        cut = cutoff(accuracy, tolerance)
        (line,) = axes.plot([100 * value for value in accuracy], marker="o", label=f"{name} (cut-off {cut})")
        ring = {"marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "none"}
        axes.plot(cut, 100 * accuracy[cut], color=line.get_color(), **ring)
        if intervals:
            low, high = zip(*([100 * bound for bound in bounds] for bounds in intervals[name]), strict=True)
            axes.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("depth (blocks)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"Readout at every depth; rings: cut-off within {tolerance} points")
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    else:
        axes.legend()
    return figure
