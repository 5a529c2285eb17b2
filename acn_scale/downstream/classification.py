"""A classifier of images at every depth: top-1, top-5, and of each class, clean and under noise; how fast it went."""

import json
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from acn_scale import distributed
from acn_scale.data.image_noise import ImageNoise
from acn_scale.data.stream import Evaluation
from acn_scale.downstream.image_sets import Subject
from acn_scale.downstream.predictions import Predictions, as_table, predict
from acn_scale.files import csv_lines, write_together
from acn_scale.report.bootstrap import share_interval
from acn_scale.report.measure import describe
from acn_scale.results import Measurement, write_measurements

log = logging.getLogger(__name__)

KEPT = 5  # of the likeliest classes


def first_five(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: (batch, classes) -> (batch, 6): the likeliest classes, best first, -1 where there are fewer, and the
    cross-entropy. Of equal logits the lower class comes first, whatever the device.
    """
    logits = logits.float()
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :KEPT]
    best = F.pad(best, (0, KEPT - best.shape[1]), value=-1)
    return torch.cat([best.float(), F.cross_entropy(logits, labels, reduction="none")[:, None]], dim=1)


def classify(subject: Subject, device: torch.device, noises: Mapping[str, ImageNoise]) -> list[Measurement]:
    """Read the network out on its images, clean and with each noise. The model is on the device.

    Writes eval/<data>.json and eval/<data>+<noise>.json; of the clean images eval/predictions/<data>.tsv and
    eval/per_class/<data>.tsv, and how fast it was, eval/throughput/<data>.json. Call it on every rank; rank 0 writes.
    """
    found = []
    for noise_name, noise in ({"": None} | dict(noises)).items():
        name = f"{subject.images.name}+{noise_name}" if noise else subject.images.name
        evaluation = subject.evaluation(noise=noise)
        start = time.perf_counter()
        predictions = predict(subject.net.model, evaluation, device, name, first_five)
        seconds = time.perf_counter() - start
        found += measured(subject, name, predictions)
        if distributed.rank() == 0:
            write_measurements(subject.folder, name, [each for each in found if each.task == name])
            if noise is None:
                _write_details(subject, predictions, evaluation)
                _write_speed(subject, name, len(predictions.samples), seconds, device)
    return found


def measured(subject: Subject, name: str, predictions: Predictions, note: str | None = None) -> list[Measurement]:
    """Of first_five() at every depth, by metric."""
    best, loss = predictions.outputs[..., :KEPT], predictions.outputs[..., KEPT].astype(np.float64)
    hits = best == predictions.labels[:, None, None]
    accuracy = hits[..., 0].mean(axis=0), hits.any(axis=-1).mean(axis=0)
    metrics = {"accuracy": accuracy[0]} | ({"top5_accuracy": accuracy[1]} if top_five_counts(subject) else {})
    known = {"task": name, "samples": len(hits), "checkpoint": subject.digest, "seed": subject.seed, "note": note}
    found = []
    for metric, values in (metrics | {"loss": loss.mean(axis=0)}).items():
        for depth, value in enumerate(values.tolist()):
            bounds = None if metric == "loss" else share_interval(value, len(hits))
            found.append(Measurement(metric=metric, value=value, interval=bounds, depth=depth, **known))
    return found


def top_five_counts(subject: Subject) -> bool:
    """Whether there are more than five classes to choose from."""
    return subject.net.card.model.num_classes > KEPT


def _write_details(subject: Subject, predictions: Predictions, evaluation: Evaluation) -> None:
    name, place = subject.images.name, subject.folder / "eval"
    first = predictions.outputs[..., 0].astype(np.int64)
    said = Predictions(predictions.samples, predictions.labels, first)
    write_together(place / "predictions", {f"{name}.tsv": as_table(said)})
    classes = evaluation.samples.index.info["classes"]
    write_together(place / "per_class", {f"{name}.tsv": _per_class(said, classes)})


def _per_class(said: Predictions, classes: Sequence[str]) -> bytes:
    """A line for each class that there are images of: the share of these that are given it, at each depth."""
    rows = [["class", "name", "samples", *(f"depth_{depth:02d}" for depth in range(said.outputs.shape[1]))]]
    right = said.outputs == said.labels[:, None]
    for number in np.unique(said.labels):
        mine = right[said.labels == number]
        name = classes[number] if number < len(classes) else number
        rows.append([number, name, len(mine), *(f"{share:.6g}" for share in mine.mean(axis=0))])
    return csv_lines(rows, "\t")


def _write_speed(subject: Subject, name: str, samples: int, seconds: float, device: torch.device) -> None:
    """Of the pass: reading, decoding and the network at every depth, over all ranks."""
    values = {"samples_per_second": samples / seconds, "samples": samples, "seconds": seconds}
    values |= {"ranks": distributed.world_size(), "batch_size": subject.batch_size, "workers": subject.data.workers}
    content = json.dumps(values | describe(device), indent=1) + "\n"
    write_together(subject.folder / "eval" / "throughput", {f"{name}.json": content.encode()})
    log.info("%s: %.1f images a second", name, samples / seconds)
