"""ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261): 15 corruptions at 5 severities, and the mean error."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from acn_scale import distributed
from acn_scale.config import Resize
from acn_scale.data.image_noise import CORRUPTIONS, SEVERITIES, corruptions_version, image_noise
from acn_scale.data.stream import Evaluation
from acn_scale.downstream.classification import first_five
from acn_scale.downstream.image_sets import Subject
from acn_scale.downstream.predictions import predict
from acn_scale.errors import UserError
from acn_scale.files import write_together
from acn_scale.report.bootstrap import interval, resample, share_interval
from acn_scale.results import Measurement, write_measurements

# AlexNet's error on each, the mean over severities, by the paper's authors (github.com/hendrycks/robustness).
ALEXNET = dict(zip(CORRUPTIONS, (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816,
                                 0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
                   strict=True))  # fmt: skip
IMAGENET_CLASSES = 1000
PARTS = ("noise", "blur", "weather", "digital", "extra", ".")  # folders of ImageNet-C as it is unpacked


def corrupted(subject: Subject, device: torch.device, folder: Path | None = None) -> list[Measurement]:
    """Accuracy and top-5 under all corruptions at every depth, their mean, and for 1,000 classes mCE, in which each
    error is divided by AlexNet's.

    Of ImageNet-C in `folder`, <corruption>/<severity>/<class folders or shards>, whose images have the crop made
    already; or of the subject's images, corrupted here after their crop and, other than in ImageNet-C, not compressed
    as JPEG then. Writes eval/<data>+corruptions.json, with the corruptions that are done, and at the end with the
    means. Called again, it goes on after those. Call it on every rank; rank 0 writes.
    """
    version = corruptions_version() if folder is None else f"ImageNet-C in {folder}"
    passes = list(_passes(subject, folder))  # what is missing shows before the first begins
    errors: dict[str, np.ndarray] = {}  # of each corruption (samples, depths), the mean over severities
    name = f"{subject.images.name}+corruptions"
    known = {"task": name, "checkpoint": subject.digest, "seed": subject.seed, "note": version}
    found: list[Measurement] = []
    for corruption, evaluations in passes:
        wrong = _wrong(subject, device, corruption, evaluations, version)
        errors[corruption] = sum(each / len(SEVERITIES) for each in wrong)
        for severity, each in zip(SEVERITIES, wrong, strict=True):
            found += [Measurement(**line, **known) for line in _by_depth(f"accuracy/{corruption}_{severity}", 1 - each)]
        with distributed.together():
            if distributed.rank() == 0:
                write_measurements(subject.folder, name, found)
    totals = [*_by_depth("accuracy", 1 - _mean(errors))]
    if subject.net.card.model.num_classes == IMAGENET_CLASSES:
        totals += _by_depth("mCE", _mean({each: error / ALEXNET[each] for each, error in errors.items()}))
    measurements = [*(Measurement(**line, **known) for line in totals), *found]
    if distributed.rank() == 0:
        write_measurements(subject.folder, name, measurements)
    return measurements


def _wrong(
    subject: Subject, device: torch.device, corruption: str, evaluations: Sequence[Evaluation], version: str
) -> np.ndarray:
    """bool (severities, samples, depths): which images are given a wrong class. As eval/corruptions/ has it of the
    same network, images and corruption; else measured and put there, since means and intervals need each image.
    """
    path = subject.folder / "eval" / "corruptions" / f"{subject.images.name}+{corruption}.npz"
    asked = [subject.digest, version, *(_asked(evaluation) for evaluation in evaluations)]
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()
    with distributed.together():
        mine = _kept(path, digest) if distributed.rank() == 0 else []
    if kept := distributed.union(mine):
        return kept[0]
    parts: list[np.ndarray] = []
    for severity, evaluation in zip(SEVERITIES, evaluations, strict=True):
        label = f"{subject.images.name}+{corruption}_{severity}"
        predictions = predict(subject.net.model, evaluation, device, label, first_five)
        parts.append(predictions.outputs[..., 0] != predictions.labels[:, None])
        if len(parts[-1]) != len(parts[0]):
            where = evaluation.samples.index.folder
            raise UserError(f"{where}: has {len(parts[-1])} images of {corruption}, and {len(parts[0])} at severity 1")
    wrong = np.stack(parts)
    with distributed.together():
        if distributed.rank() == 0:
            file = io.BytesIO()
            np.savez_compressed(file, digest=digest, wrong=wrong)
            write_together(path.parent, {path.name: file.getvalue()})
    return wrong


def _asked(evaluation: Evaluation) -> list[object]:
    """What the corrupted images of a pass, and what is right of them, depend on."""
    index, decoder = evaluation.samples.index, evaluation.samples.decoder
    resize = decoder.cfg.evaluation_resize(decoder.model.image_size)
    images = [str(index.folder), index.fingerprint, index.info["classes"]]
    return [*images, resize, decoder.mean, decoder.std]


def _kept(path: Path, digest: str) -> list[np.ndarray]:
    """What is there of this digest, whole: one or none."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return [kept["wrong"]] if kept["digest"] == digest else []
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):  # not there, or damaged
        return []


def _mean(errors: dict[str, np.ndarray]) -> np.ndarray:
    """Over corruptions, of each image. Raises UserError where they are not of the same number of images."""
    if len({len(error) for error in errors.values()}) > 1:
        sizes = ", ".join(f"{name} of {len(error)}" for name, error in errors.items())
        raise UserError(f"the corruptions must all be of the same images: {sizes}")
    return np.mean(list(errors.values()), axis=0)


def _by_depth(metric: str, values: np.ndarray) -> Iterator[dict[str, object]]:
    """values: (samples, depths) of each image."""
    means = values.mean(axis=0).tolist()
    single = np.isin(values, (0, 1)).all()
    draws = None if single else resample(values)
    for depth, value in enumerate(means):
        bounds = share_interval(value, len(values)) if single else list(interval(draws[:, depth], value))
        yield {"metric": metric, "value": value, "interval": bounds, "samples": len(values), "depth": depth}


def _passes(subject: Subject, folder: Path | None) -> Iterator[tuple[str, list[Evaluation]]]:
    """Of each corruption, one for each severity."""
    if folder is None:
        for corruption in CORRUPTIONS:
            noises = [image_noise(f"{corruption}_{severity}") for severity in SEVERITIES]
            yield corruption, [subject.evaluation(noise=noise) for noise in noises]
        return
    with distributed.together():
        sets = {
            corruption: [subject.open(str(_folder_of(corruption, folder) / str(severity))) for severity in SEVERITIES]
            for corruption in CORRUPTIONS
        }
    size = subject.net.card.model.image_size
    asked = (subject.data.evaluation_resize(size) or Resize(size=size)).model_copy(update={"size": size})
    for corruption, images in sets.items():
        yield corruption, [subject.evaluation(each, resize=asked) for each in images]


def _folder_of(corruption: str, folder: Path) -> Path:
    """ImageNet-C comes in tars that put the corruptions into folders of kinds."""
    places = [folder / part / corruption for part in PARTS]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UserError(f"{folder}: has no folder {corruption}; ImageNet-C has {', '.join(CORRUPTIONS)}")
    return found
