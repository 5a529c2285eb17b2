"""Everything that a report says, as one dict of plain values: what depth.json holds and the page is made from."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acn_scale.config import TextDataConfig
from acn_scale.report.bootstrap import LEVEL, RESAMPLES, cut_at, interval, resample
from acn_scale.report.measure import costs, describe, take_readings
from acn_scale.report.subject import Subject
from acn_scale.results import read_measurements
from acn_scale.runs import read_json, read_metrics

TOLERANCES = (0.1, 0.5, 1.0)  # points of accuracy
COLUMNS = 200  # of the gradient norms' heat map
BLOCK_NORM = "grad_norm/block_"


def report_numbers(subjects: Sequence[Subject], tolerance: float, device: torch.device) -> dict[str, Any]:
    """Evaluate and measure all subjects; `tolerance` is the one that stands out. None stands for what is not finite."""
    tolerances = sorted({*TOLERANCES, tolerance})
    return finite(
        {
            "tolerance": tolerance,
            "tolerances": tolerances,
            "resamples": RESAMPLES,
            "level": LEVEL,
            "measured_on": describe(device),
            "networks": [_network(subject, tolerances, device) for subject in subjects],
        }
    )


def _network(subject: Subject, tolerances: list[float], device: torch.device) -> dict[str, Any]:
    # What is only read comes first: a mistake in it must not cost an evaluation.
    measurements = [line.model_dump(mode="json") for line in read_measurements(subject.folder, means=True)]
    training = _training(subject.folder) if subject.is_run else {}
    card, index = subject.network.card, subject.evaluation.samples.index
    model = subject.network.model.to(device)
    readings = take_readings(model, subject.evaluation, device, subject.name)
    means = resample(readings.accuracy)
    accuracy = readings.accuracy.mean(axis=0)
    cuts = [cut_at(readings.accuracy, means, tolerance) for tolerance in tolerances]
    depths = sorted({cut.depth for cut in cuts} | {card.model.depth})
    text = isinstance(subject.data, TextDataConfig)
    return {
        "name": subject.name,
        "folder": str(subject.folder),
        "kind": "run" if subject.is_run else "export",
        "model": card.model.name,
        "connectivity": card.model.connectivity,
        "depth": card.model.depth,
        "full_depth": card.full_depth,
        "step": card.step,
        "data": subject.data.eval,
        "fingerprint": index.fingerprint,
        "samples": len(readings.accuracy),
        "metric": subject.metric,
        "mask_ratio": subject.data.mask_ratio if text else None,
        "unigram_loss": index.info.get("unigram_loss") if text else None,
        "accuracy": accuracy.tolist(),
        "accuracy_interval": [interval(values, mean) for values, mean in zip(means.T, accuracy.tolist(), strict=True)],
        "loss": readings.loss.mean(axis=0).tolist(),
        "block_influence": readings.influence,
        "cutoffs": [asdict(cut) for cut in cuts],
        "costs": costs(subject.network, depths, subject.data.mask_ratio, subject.name),
        "measurements": measurements,
    } | training


def _training(folder: Path) -> dict[str, Any]:
    """What a run's folder says of its training, and what made it."""
    found = {name: read_json(folder / f"{name}.json") for name in ("config", "environment")}
    return {"gradient_norms": _gradient_norms(folder)} | found


def _gradient_norms(folder: Path) -> dict[str, Any] | None:
    """Of each block at evenly chosen lines of metrics.jsonl: "norms" (lines, blocks); None where there are none."""
    lines = [line for line in read_metrics(folder) if any(name.startswith(BLOCK_NORM) for name in line)]
    if not lines:
        return None
    places = np.unique(np.linspace(0, len(lines) - 1, min(COLUMNS, len(lines))).round().astype(int))
    blocks = sorted({name for line in lines for name in line if name.startswith(BLOCK_NORM)})
    return {
        "steps": [lines[place]["step"] for place in places],
        "blocks": [int(name.removeprefix(BLOCK_NORM)) for name in blocks],
        "norms": [[lines[place].get(name) for name in blocks] for place in places],
    }


def finite(values: Any) -> Any:
    """The same in lists and dicts alone, with None for each number that JSON does not know."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
