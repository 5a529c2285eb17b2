"""Some of a source's images: of some of its classes, or so many of each class."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from acn_scale.data.raw_images import ImageSource, RandomAccess, RawImage
from acn_scale.errors import UserError


@dataclass(frozen=True)
class Selection(RandomAccess):
    """A source like any other."""

    source: RandomAccess
    indices: Sequence[int]  # in the source, ascending
    labels: Sequence[int]  # here
    classes: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.indices)

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"{self.source.identity} {list(self.indices)}".encode()).hexdigest()

    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        images = self.source.pick([self.indices[index] for index in indices])
        for index, image in zip(indices, images, strict=True):
            yield image._replace(label=self.labels[index])


def select(
    source: ImageSource, *, first_classes: int | None, per_class: int | None, skip_classes: int = 0
) -> ImageSource:
    """The images of the first classes after those that are skipped, and of each class `per_class`, drawn once for all.

    Classes are numbered anew from 0. Raises UserError for a source that does not say how many images it has, and where
    there are fewer classes.
    """
    if first_classes is None and per_class is None and not skip_classes:
        return source
    if source.size is None:
        raise UserError(
            "--first-classes, --skip-classes, --per-class: take a source that says how many images it has, not a stream"
        )
    left = list(source.classes)[skip_classes:]
    if not left:
        raise UserError(f"--skip-classes {skip_classes}: must be less than the {len(source.classes)} classes")
    if first_classes is not None and first_classes > len(left):
        raise UserError(f"--first-classes {first_classes}: must be {len(left)} at most, of the classes that there are")
    classes = left[:first_classes]
    labels = np.array(source.labels) - skip_classes
    order = np.random.default_rng(0).permutation(source.size)
    chosen = np.sort(np.concatenate([order[labels[order] == label][:per_class] for label in range(len(classes))]))
    return Selection(source, chosen.tolist(), labels[chosen].tolist(), classes)
