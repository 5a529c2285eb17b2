"""Images as people have them -> encoded images with class numbers, any range of them at once."""

import bisect
import hashlib
import io
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from acn_scale.data.cifar import read_cifar
from acn_scale.data.classes import class_names, class_number
from acn_scale.data.images import ENCODINGS
from acn_scale.data.sources import EVAL_NAMES, files_identity, find_files, find_source, load_hugging_face, split_name
from acn_scale.data.tar import Table
from acn_scale.errors import BadData, UserError

EXTENSIONS = (*(f".{name}" for name in ENCODINGS), ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
DIGITS_TRAIN = 1400  # of 1,797 images; the others are for evaluation


class RawImage(NamedTuple):
    """An image file's bytes, or what keeps them from being read; what its source calls it."""

    content: bytes
    label: int
    name: str
    problem: str = ""


class ImageSource(Protocol):
    """`identity` changes when the images do. `size` is None where only reading on tells how many there are."""

    classes: Sequence[str]
    identity: str
    size: int | None

    def read(self, start: int, stop: int | None) -> Iterator[RawImage]:
        """The images from `start` up to `stop`."""
        ...


class RandomAccess(ABC):
    """A source that knows how many images it has. `labels` are of all of them; no image is read for that."""

    size: int
    labels: Sequence[int]

    @abstractmethod
    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        """The images of these numbers, which ascend."""

    def read(self, start: int, stop: int | None) -> Iterator[RawImage]:
        return self.pick(range(*slice(start, stop).indices(self.size)))


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


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


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
        return _read(self.root / path, self.label(number), path)

    def label(self, number: int) -> int:
        return self._numbers[self.paths[number].split(os.sep, 1)[0]]


def _read(path: Path, label: int, name: str) -> RawImage:
    try:
        return RawImage(path.read_bytes(), label, name)
    except OSError as error:
        return RawImage(b"", label, name, f"cannot be read: {error.strerror}")


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


@dataclass
class Parts(RandomAccess):
    """Images in files that each hold many: finds the file of each and leaves reading these to others, once for all the
    images that are asked for."""

    classes: Sequence[str]
    identity: str
    sizes: Sequence[int]  # images in each part
    read_part: Callable[[int, Sequence[int]], Iterator[RawImage]]  # the images of these rows of a part
    labels_of: Callable[[int], Iterable[int]]  # all of a part

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.size = self.starts.pop()

    @property
    def labels(self) -> list[int]:
        return [label for part in range(len(self.sizes)) for label in self.labels_of(part)]

    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        for part, group in itertools.groupby(indices, lambda index: bisect.bisect_right(self.starts, index) - 1):
            yield from self.read_part(part, [index - self.starts[part] for index in group])


def parquet(rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> Parts:
    """Parquet files with a column of image bytes, or of the structs that Hugging Face writes, and one of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = find_files(rest)
    groups: list[tuple[Path, int]] = []
    sizes: list[int] = []
    try:
        schema = pq.read_schema(paths[0])
        image, label, names = _columns(paths[0], schema)
        for path in paths:
            metadata = pq.read_metadata(path)
            groups += [(path, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if classes is None:
            classes = names or _values_of_column(paths, label)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"parquet:{rest}: {str(error).splitlines()[0]}") from None
    numbers = {name: number for number, name in enumerate(classes)}

    def number(part: int, row: int, value: Any) -> int:
        path, group = groups[part]
        return class_number(value, numbers, f"{path.name}: row group {group}, row {row}")

    def read(part: int, rows: Sequence[int]) -> Iterator[RawImage]:
        path, group = groups[part]
        table = pq.ParquetFile(path).read_row_group(group, columns=[image, label])
        for row in rows:
            content, value = table[image][row].as_py(), table[label][row].as_py()
            content = content.get("bytes") if isinstance(content, dict) else content
            yield RawImage(content or b"", number(part, row, value), f"{path.stem}-{group}-{row}")

    def labels_of(part: int) -> Iterator[int]:
        path, group = groups[part]
        values = pq.ParquetFile(path).read_row_group(group, columns=[label])[label].to_pylist()
        return (number(part, row, value) for row, value in enumerate(values))

    return Parts(classes, files_identity(paths), sizes, read, labels_of)


def _columns(path: Path, schema: Any) -> tuple[str, str, list[str] | None]:
    """(image column, label column, class names where the file tells them)."""
    import pyarrow as pa

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})

    def is_image(field: Any) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field)]
    labels = [name for name in features if features[name].get("_type") == "ClassLabel"]
    labels += [name for name in ("label", "labels", "fine_label", "cls", "class") if name in schema.names]
    if not images or not labels:
        raise UserError(f"{path}: needs a column of image bytes and one named label; has {', '.join(schema.names)}")
    return images[0], labels[0], features.get(labels[0], {}).get("names")


def _values_of_column(paths: Sequence[Path], label: str) -> list[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    values = {value for path in paths for value in pc.unique(pq.read_table(path, columns=[label])[label]).to_pylist()}
    return class_names(values)


def webdataset(rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> Parts:
    """Webdataset tars with an image and a .cls (a class's number, or its name where `classes` are given)."""
    paths = find_files(rest)
    sizes, labels = [], set()
    for path in paths:
        try:
            table = Table(path)
        except BadData as error:
            raise UserError(f"{path}: {error}") from None
        sizes.append(len(table.places))
        if classes is None:
            labels |= {_label(table, record, path) for record in range(sizes[-1])}
    if classes is None and (words := [label for label in labels if not isinstance(label, int)]):
        raise UserError(f"wds:{rest}: label {words[0]!r}: --classes must name the classes in their order")
    numbers = {name: number for number, name in enumerate(classes or class_names(labels))}

    def number(table: Table, record: int, path: Path) -> int:
        return class_number(_label(table, record, path), numbers, f"{path}: {table.key(record)}")

    def read(part: int, records: Sequence[int]) -> Iterator[RawImage]:
        path = paths[part]
        table = Table(path)
        for record in records:
            label = number(table, record, path)
            try:
                files, problem = table.read(record), ""
            except BadData as error:
                files, problem = {}, str(error)
            extension = next((name for name in EXTENSIONS if name[1:] in files), "")
            yield RawImage(files.get(extension[1:], b""), label, table.key(record) + extension, problem)

    def labels_of(part: int) -> Iterator[int]:
        path = paths[part]
        table = Table(path)
        return (number(table, record, path) for record in range(sizes[part]))

    return Parts(list(numbers), files_identity(paths), sizes, read, labels_of)


def _label(table: Table, record: int, path: Path) -> int | str:
    try:
        files = table.read(record, only="cls") or table.read(record)
    except BadData as error:
        raise UserError(f"{path}: {table.key(record)}: {error}") from None
    if "cls" not in files:
        raise UserError(f"{path}: {table.key(record)}: has no .cls, but {', '.join(files)}")
    text = files["cls"].decode(errors="replace").strip()
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


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
                yield _read(path, label, path.name)
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
