"""Images as people have them -> encoded images with class numbers, any range of them at once."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from acn_scale.data.cifar import read_cifar
from acn_scale.data.classes import class_names, class_number
from acn_scale.data.image_parts import parquet, webdataset
from acn_scale.data.raw_images import EXTENSIONS, ImageSource, RandomAccess, RawImage, encode_png, read_file
from acn_scale.data.sources import EVAL_NAMES, find_source, load_hugging_face, split_name
from acn_scale.errors import UserError

DIGITS_TRAIN = 1400  # of 1,797 images; the others are for evaluation


def open_images(
    source: str, split: str, *, classes: Sequence[str] | None = None, streaming: bool = False
) -> ImageSource:
    """`classes` names the classes in their order, where the source's own are not meant. Raises UserError."""
    opener, rest = find_source(source, IMAGE_SOURCES)
    return opener(rest, split, classes, streaming)


@dataclass
class Arrays(RandomAccess):
    """Small images that fit in memory, written as PNG."""

    images: np.ndarray  # (n, height, width[, 3]) uint8
    labels: Sequence[int]
    classes: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.images)

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(self.images.tobytes() + bytes(self.labels)).hexdigest()

    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        for index in indices:
            yield RawImage(encode_png(Image.fromarray(self.images[index])), int(self.labels[index]), "")


def digits(rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> Arrays:
    """scikit-learn's scanned digits, 8 x 8 pixels. The split is one fixed random draw."""
    from sklearn.datasets import load_digits

    if split not in ("train", "eval"):
        raise UserError(f"--split {split}: there are eval, train")
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    chosen = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)  # 17 levels of grey
    return Arrays(pixels.reshape(-1, 8, 8), labels[chosen].tolist(), [str(number) for number in range(10)])


def cifar(rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> Arrays:
    """CIFAR-10 or CIFAR-100, its fine labels."""
    return Arrays(*read_cifar(Path(rest), split))


class Folder(RandomAccess):
    """A folder for each class, ImageNet's layout. In an order drawn once, so that each shard has all classes.

    Classes are numbered in the order of their sorted names, as torchvision's ImageFolder and timm number ImageNet's.
    """

    def __init__(self, rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> None:
        root = Path(rest)
        if not root.is_dir():
            raise UserError(f"folder:{rest}: no such folder")
        parts = {path.name for path in root.iterdir() if path.is_dir()}
        if "train" in parts and parts <= {"train", *EVAL_NAMES}:  # otherwise the folder is itself the split
            self.classes = classes or _class_folders(root / "train")
            root = root / split_name(split, parts)
        else:
            self.classes = classes or _class_folders(root)
        self.number(self.classes)
        strange = [name for name in _class_folders(root) if name not in self._numbers]
        if strange:
            raise UserError(f"{root}: class folder {strange[0]} is not among the {len(self.classes)} classes")
        self.root = root
        paths = [path for name in _class_folders(root) for path in _images_under(root / name)]
        if not paths:
            raise UserError(f"{root}: no class folders with images ({' '.join(EXTENSIONS)})")
        self.paths = [os.path.relpath(path, root) for path in paths]  # by class, then by name
        self._order = np.random.default_rng(0).permutation(len(paths))
        self.size = len(paths)
        names = "\n".join(self.paths[number] for number in self._order)
        self.identity = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()

    def number(self, classes: Sequence[str]) -> None:
        """Number the classes in this order, which must have all of them."""
        self.classes, self._numbers = classes, {name: number for number, name in enumerate(classes)}

    @property
    def labels(self) -> list[int]:
        return [self.label(number) for number in self._order]

    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        for index in indices:
            yield self.image(self._order[index])

    def image(self, number: int) -> RawImage:
        """Of paths[number]."""
        path = self.paths[number]
        return read_file(self.root / path, self.label(number), path)

    def label(self, number: int) -> int:
        return self._numbers[self.paths[number].split(os.sep, 1)[0]]


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _images_under(folder: Path) -> list[str]:
    found = [
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
    return sorted(found)


class HuggingFace(RandomAccess):
    """A data set of the hub or a local folder; when it streams, it is only read from its beginning on and has no
    size."""

    def __init__(self, rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> None:
        import datasets

        data = load_hugging_face(rest, split, streaming=streaming)
        features = data.features or {}
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        labels = sorted(labels, key=lambda name: name.startswith("coarse")) + [n for n in ("label",) if n in features]
        if not images or not labels:
            raise UserError(f"hf:{rest}: needs a column of images and one of labels; has {', '.join(features)}")
        self._image, self._label = images[0], labels[0]
        if classes is None and isinstance(features[self._label], datasets.ClassLabel):
            classes = features[self._label].names
        if classes is None and streaming:
            raise UserError(f"hf:{rest}: has labels without names: --classes must name them")
        self.classes = classes or class_names(set(data.unique(self._label)))
        self._numbers = {name: number for number, name in enumerate(self.classes)}
        self._data = data.cast_column(self._image, datasets.Image(decode=False))  # the original bytes
        self.size = None if streaming else len(data)
        state = [rest, split, self.size, getattr(data, "_fingerprint", None)]
        self.identity = hashlib.sha256(repr(state).encode()).hexdigest()

    def read(self, start: int, stop: int | None) -> Iterator[RawImage]:
        if self.size is not None:
            return super().read(start, stop)
        rows = self._data.skip(start)
        return self._images(enumerate(rows if stop is None else rows.take(stop - start), start))

    @property
    def labels(self) -> list[int]:
        return [self._class(number, label) for number, label in enumerate(self._data[self._label])]

    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        return self._images((index, self._data[index]) for index in indices)

    def _class(self, number: int, label: Any) -> int:
        return class_number(label, self._numbers, f"row {number}")

    def _images(self, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[RawImage]:
        for number, row in rows:
            image = row[self._image] or {}
            content, path = image.get("bytes"), Path(image.get("path") or "")
            label = self._class(number, row[self._label])
            if content is None and path.name:
                yield read_file(path, label, path.name)
            else:
                yield RawImage(content or b"", label, path.name)


IMAGE_SOURCES: dict[str, Callable[..., ImageSource]] = {
    "folder": Folder,
    "cifar": cifar,
    "parquet": parquet,
    "wds": webdataset,
    "hf": HuggingFace,
    "digits": digits,
}
