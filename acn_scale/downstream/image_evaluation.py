"""All that is asked about a classifier of images: clean, under noise and corruptions, its frozen readouts; as text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from acn_scale import distributed
from acn_scale.data.image_noise import ImageNoise
from acn_scale.depth import cutoff
from acn_scale.downstream.classification import classify
from acn_scale.downstream.corruptions import corrupted
from acn_scale.downstream.image_sets import Subject
from acn_scale.downstream.noise_table import noise_table, paper_tasks
from acn_scale.downstream.probes import KINDS, fitted
from acn_scale.errors import UserError
from acn_scale.results import Measurement
from acn_scale.tables import aligned


def evaluate_images(
    subject: Subject,
    device: torch.device,
    *,
    noises: Mapping[str, ImageNoise] | None = None,
    corruptions: Path | bool = False,
    kinds: Sequence[str] = (),
    per_class: int = 0,
    tolerance: float = 0.5,
) -> str:
    """Evaluate at every depth, clean first; write <folder>/eval/; return it all as tables.

    `corruptions`: all of ImageNet-C's, made here (True) or in a folder of it. `kinds`: what is fitted to frozen
    readouts, of probes.KINDS, with `per_class` training images of each class (0: all). Call it on every rank. Raises
    UserError.
    """
    with distributed.together():
        _make(subject.folder)
    subject.net.model.to(device)
    found = classify(subject, device, noises or {})
    if corruptions:
        found += corrupted(subject, device, corruptions if isinstance(corruptions, Path) else None)
    if kinds:
        found += fitted(subject, device, {kind: KINDS[kind] for kind in kinds}, per_class)
    return _text(subject, found, tolerance) if distributed.rank() == 0 else ""


def _make(folder: Path) -> None:
    """Before an evaluation of hours. Raises UserError where it cannot be written to."""
    try:
        (folder / "eval").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


def _text(subject: Subject, found: Sequence[Measurement], tolerance: float) -> str:
    name, depths = subject.images.name, range(subject.net.card.model.depth + 1)
    rows = [["at depth", *map(str, depths)]]
    shown = [line for line in found if "/" not in line.metric]  # not each severity of each corruption
    for task, metric in dict.fromkeys((line.task, line.metric) for line in shown):
        values = [line.value for line in shown if (line.task, line.metric) == (task, metric)]
        percent = metric != "loss"
        rows.append([f"{task}: {metric}", *(f"{100 * value:.2f}" if percent else f"{value:.3f}" for value in values)])
    clean = [line for line in found if (line.task, line.metric) == (name, "accuracy")]
    cut = cutoff([line.value for line in clean], tolerance)
    speed = json.loads((subject.folder / "eval" / "throughput" / f"{name}.json").read_text())
    parts = [
        f"{subject.net.card.source}: {clean[-1].samples:,} images of {subject.images.location}; shares in %",
        aligned(rows),
        f"accuracy at full depth: {_with_interval(clean[-1])}; within {tolerance} points of it: depth {cut} of "
        f"{depths[-1]}, {_with_interval(clean[cut])}",
    ]
    if noisy := {line.task for line in found} & paper_tasks(name):
        parts.append(noise_table([subject.folder], tolerance=tolerance, tasks=noisy))
    parts.append(
        f"{speed['samples_per_second']:,.1f} images a second at every depth, read and decoded, on {speed['ranks']} "
        f"rank{'s' * (speed['ranks'] > 1)}; results in {subject.folder / 'eval'}"
    )
    return "\n\n".join(parts)


def _with_interval(line: Measurement) -> str:
    low, high = line.interval
    return f"{100 * line.value:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
