"""What a network says of every sample of an evaluation set at every depth, from one pass over all ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acn_scale import distributed
from acn_scale.data.stream import Evaluation
from acn_scale.errors import RunFailed
from acn_scale.files import csv_lines
from acn_scale.models.base import Model
from acn_scale.progress import bar


@dataclass(frozen=True)
class Predictions:
    """In the order of the samples as they lie on disk, those left out that cannot be read."""

    samples: np.ndarray  # (samples,) their numbers in the data set
    labels: np.ndarray  # (samples,)
    outputs: np.ndarray  # (samples, depths, ...)


def as_they_are(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float()


@torch.no_grad()
def predict(
    model: Model,
    evaluation: Evaluation,
    device: torch.device,
    name: str,
    of: Callable[[Tensor, Tensor], Tensor] = as_they_are,
) -> Predictions:
    """`of` makes of logits (batch, classes) and labels (batch,) what is kept of them, (batch, ...). The model is on the
    device.

    Call it on every rank; each gets the whole. The same on any number of ranks, to the last digit. Raises RunFailed
    where the network says what is no number.
    """
    model.eval()
    numbers, labels, outputs = [], [], []
    places: Iterable[list[int]] = evaluation.positions
    for positions, (batch, counts) in zip(places, bar(evaluation, name, len(evaluation.counts)), strict=True):
        batch = {key: values.to(device) for key, values in batch.items()}
        kept = torch.stack([of(logits, batch["labels"]) for logits in model.readouts(**batch)], dim=1).cpu()
        here = counts.numpy()
        numbers.append(np.array([evaluation.samples.key(position)[0].sample for position in positions])[here])
        labels.append(batch["labels"].cpu().numpy()[here])
        outputs.append(kept.numpy()[here])
    parts = [(np.concatenate(numbers), np.concatenate(labels), np.concatenate(outputs))]
    if torch.distributed.is_initialized():
        parts = distributed.union(parts)
    samples, labels, outputs = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if not np.isfinite(outputs).all():
        raise RunFailed(f"{name}: some of the network's outputs are not finite; has its training diverged?")
    order = np.argsort(samples)
    return Predictions(samples[order], labels[order], outputs[order])


def as_table(predictions: Predictions, *, labelled: bool = True) -> bytes:
    """A line for each sample, of tab-separated values: its number, its label where it has one, and what is said of it
    at each depth, of outputs (samples, depths).
    """
    rows = [["sample", *["label"] * labelled, *(f"depth_{depth:02d}" for depth in range(predictions.outputs.shape[1]))]]
    for sample, label, said in zip(predictions.samples, predictions.labels, predictions.outputs, strict=True):
        rows.append([sample, *[label] * labelled, *said])
    return csv_lines(rows, "\t")
