"""Some of a source's images: of its first classes, or so many of each class."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from acn_scale.data.image_sources import ImageSource, RawImage
from acn_scale.errors import UserError


@dataclass(frozen=True)
class Selection:
    """A source like any other."""

    source: ImageSource
    indices: Sequence[int]
    classes: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.indices)

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"{self.source.identity} {list(self.indices)}".encode()).hexdigest()

    def read(self, start: int, stop: int | None) -> Iterator[RawImage]:
        for index in self.indices[start:stop]:
            yield from self.source.read(index, index + 1)


def select(source: ImageSource, *, first_classes: int | None, per_class: int | None) -> ImageSource:
    """The images of the first classes, and of each class `per_class`, drawn once for all.

    Raises UserError for a source that does not say how many images it has.
    """
    if first_classes is None and per_class is None:
        return source
    if source.size is None:
        raise UserError("--first-classes, --per-class: take a source that says how many images it has, not a stream")
    classes = list(source.classes)[:first_classes]
    labels = np.array([image.label for image in source.read(0, source.size)])
    order = np.random.default_rng(0).permutation(source.size)
    chosen = [order[labels[order] == label][:per_class] for label in range(len(classes))]
    return Selection(source, sorted(np.concatenate(chosen).tolist()), classes)
