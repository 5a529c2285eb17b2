"""Which classifier of images is evaluated, on which images, and where the results go."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acn_scale import distributed
from acn_scale.config import EvalConfig, ImageDataConfig, Resize
from acn_scale.convert.network import Network
from acn_scale.convert.sources import FOREIGN, read_model, results_folder, run_of
from acn_scale.data import evaluation_of
from acn_scale.data.image_files import ImageFiles
from acn_scale.data.image_noise import ImageNoise
from acn_scale.data.shards import INDEX_NAME, ShardIndex
from acn_scale.data.sources import EVAL_NAMES
from acn_scale.data.stream import Evaluation
from acn_scale.errors import UserError
from acn_scale.runs import read_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Shards, or `files` in a folder for each class."""

    location: str
    files: ImageFiles | None

    @property
    def name(self) -> str:
        """Of the data in results: the last part of its place that is not that of a split for evaluation."""
        location = self.location if "://" in self.location else str(Path(self.location).resolve())
        parts = [part for part in location.split("/") if part] or ["images"]
        while len(parts) > 1 and parts[-1] in EVAL_NAMES:
            parts.pop()
        return parts[-1]


@dataclass(frozen=True)
class Subject:
    """A network with what it is evaluated on; `folder` takes the results."""

    net: Network
    digest: str
    images: ImageSet
    train: ImageSet | None  # for what is fitted to its readouts
    data: ImageDataConfig
    classes: Sequence[str] | None  # in the network's order, as given
    folder: Path
    batch_size: int
    seed: int | None  # of the run

    def evaluation(
        self,
        images: ImageSet | None = None,
        noise: ImageNoise | None = None,
        *,
        chosen: np.ndarray | None = None,
        resize: Resize | None = None,
    ) -> Evaluation:
        """This rank's pass over `images`, by default those of the subject. Collective; raises UserError."""
        images = images or self.images
        changed = {"eval": images.location} | ({"resize": resize} if resize else {})
        with distributed.together():
            return evaluation_of(
                self.data.model_copy(update=changed),
                self.net.card.model,
                batch_size=self.batch_size,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                share=distributed.union,
                noise=noise,
                files=images.files,
                chosen=chosen,
            )

    def open(self, location: str) -> ImageSet:
        """Other images for the same network."""
        return open_images(location, "eval", self.net, self.classes)


def open_subject(
    source: str,
    *,
    data: str | None = None,
    train: str | None = None,
    classes: Sequence[str] | None = None,
    out: Path | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Subject:
    """A run, a checkpoint, an export, timm:NAME_OR_FILE or hf:FOLDER. What is left out is as its run has it.

    Raises UserError for what is no classifier of images, and where the data or the folder are not known.
    """
    net = read_model(source)
    model, card = net.card.model, net.card
    if model.name == "bert":
        raise UserError(f"{source}: must be a classifier of images")
    run = run_of(source, net)
    cfg = read_config(run) if run else None
    if cfg is None and data is None:
        raise UserError(f"{source}: has no evaluation data of its own; name some with --data")
    place = results_folder(source, net, out)
    if card.images is None and cfg is None:
        raise UserError(f"{source}: does not say how images are prepared")
    found = cfg.data if cfg else card.images.data(data)
    prepared = {"mean": card.images.mean, "std": card.images.std} if card.images else {}
    found = found.model_copy(update=prepared | ({} if workers is None else {"workers": workers}))
    train = train or (cfg.data.train if cfg else None)
    return Subject(
        net=net,
        digest=net.digest(),
        images=open_images(data or found.eval, "eval", net, classes),
        train=open_images(train, "train", net, classes) if train else None,
        data=found,
        classes=classes,
        folder=place,
        batch_size=batch_size or (cfg.eval if cfg else EvalConfig()).batch_size,
        seed=cfg.run.seed if cfg else None,
    )


def open_images(location: str, split: str, net: Network, classes: Sequence[str] | None) -> ImageSet:
    """Shards with their index, or class folders. Raises UserError where the classes are not those of the network.

    `classes` names the network's classes in their order, where neither the network nor the folders' names tell it.
    """
    folder, count = Path(location), net.card.model.num_classes
    if classes and len(classes) != count:
        raise UserError(f"--classes: names {len(classes)} classes; the network has {count}")
    known = classes or (net.card.images.classes if net.card.images else [])
    if folder.is_dir() and not (folder / INDEX_NAME).exists():
        files = ImageFiles(folder, split)
        _number(files, net, known, given=classes is not None)
        return ImageSet(location, files)
    there = ShardIndex.load(location).info.get("classes", [])
    for number, (name, other) in enumerate(zip(there, known, strict=False)):
        named = not (name.isdigit() or other.isdigit())
        if name != other and named and (classes or not _foreign(net)):
            whose = "--classes" if classes else net.card.source
            raise UserError(f"{location}: class {number} is {name!r}, and {other!r} in {whose}")
    return ImageSet(location, None)


def _foreign(net: Network) -> bool:
    """Whether its classes have names of another's choice."""
    return net.card.source.partition(":")[0] in FOREIGN


def _number(files: ImageFiles, net: Network, known: Sequence[str], *, given: bool) -> None:
    """Have the class folders numbered as the network's classes are: by name, or else in the order of sorted names."""
    names, count = files.images.classes, net.card.model.num_classes
    strange = [name for name in names if name not in known]
    hint = "--classes FILE must name the network's classes in their order"
    if strange and (given or not _foreign(net)):
        raise UserError(f"{files.location}: class folder {strange[0]} is not among the {count} classes; {hint}")
    if len(names) > count:
        raise UserError(f"{files.location}: has {len(names)} class folders, and the network {count} classes")
    found = len(files.class_folders)
    if found < count and not given:
        raise UserError(f"{files.location}: has images of {found} of {count} classes; {hint}, and some may then lack")
    if strange:
        log.warning("%s: its class folders, sorted, are taken for the classes of %s", files.location, net.card.source)
    else:
        files.images.number(known)
