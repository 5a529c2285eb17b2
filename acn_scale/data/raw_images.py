"""What a source of images gives, and what all sources have in common."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

ENCODINGS = ("jpg", "png", "jpeg", "webp")  # that shards hold
EXTENSIONS = (*(f".{name}" for name in ENCODINGS), ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


class RawImage(NamedTuple):
    """An image file's bytes, or what keeps them from being read; what its source calls it."""

    content: bytes
    label: int
    name: str
    problem: str = ""

    @property
    def shown(self) -> str:
        """Its name as any text may hold it: bytes that are no UTF-8 as \\xe9."""
        return self.name.encode(errors="surrogateescape").decode(errors="backslashreplace")


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


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_file(path: Path, label: int, name: str) -> RawImage:
    """An image's own file."""
    try:
        return RawImage(path.read_bytes(), label, name)
    except OSError as error:
        return RawImage(b"", label, name, f"cannot be read: {error.strerror}")
