"""Image files -> pixels, of the part that is needed."""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from acn_scale.errors import BadData

JPEG = b"\xff\xd8\xff"
NARROW = 8  # pixels


class Box(NamedTuple):
    """A part of an image in pixels."""

    top: int
    left: int
    height: int
    width: int


class Picture:
    """An image file, of which only the header has been read. `size` is (height, width); `mode` is "L" or "RGB".

    Of a JPEG, only the rows and columns that a box asks for are decoded. EXIF rotation is ignored, as torchvision and
    timm ignore it. Raises BadData, here and when pixels are asked for, for a file that is damaged or no image.
    """

    def __init__(self, content: bytes, mode: str) -> None:
        self.content, self.mode = content, mode
        self.codec = _codec(os.getpid()) if mode == "RGB" and content.startswith(JPEG) else None
        self.stream = self.codec.open(content) if self.codec else None
        if self.stream is not None:
            self.size = self.stream.height, self.stream.width
        else:
            self.image = _opened(content)
            self.size = self.image.height, self.image.width

    def pixels(self) -> Tensor:
        """All of it: (channels, height, width) uint8."""
        return self._box(Box(0, 0, *self.size))

    def resized(self, box: Box, size: int) -> Tensor:
        """The box scaled to (channels, size, size), bilinear and with antialiasing, uint8."""
        # By way of (1, height, width, channels), or PyTorch would not see that the result can be channels-last too.
        pixels = self._box(box).permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        return nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]

    def _box(self, box: Box) -> Tensor:
        if self.stream is not None:
            pixels = self.codec.decode(self.stream, box)
            if pixels is not None:
                return pixels
            self.stream = None
            self.image = _opened(self.content)  # Pillow has the last word on what is damaged
        left, top = box.left, box.top
        return _tensor(_converted(self.image, self.mode).crop((left, top, left + box.width, top + box.height)))


def narrowed(image: Image.Image) -> Image.Image:
    """The same; of 16 bits a pixel 8, the value / 257 rounded, where Pillow makes white of all above 255.

    Raises BadData for pixels of more bits and for fractions: nothing tells which of them is white.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise BadData(f"pixels that are {'fractions' if image.mode == 'F' else 'not in 0..65535'}")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except Exception as error:  # Pillow's readers fail in every way on bytes that are no image
        raise BadData(f"an image that cannot be decoded: {_reason(error)}") from None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    try:
        return narrowed(image).convert(mode)
    except Exception as error:  # see above
        raise BadData(f"an image that cannot be decoded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(error).replace("<_io.BytesIO object", "<bytes") or type(error).__name__


def _tensor(image: Image.Image) -> Tensor:
    return v2.functional.pil_to_tensor(image)


class _Codec:
    """nvImageCodec on the CPU: libjpeg-turbo that decodes a region. Its pixels are Pillow's."""

    def __init__(self) -> None:
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what is damaged is told by us
        with _without_stderr():  # it tells, at each start, of every CUDA library that is not there
            from nvidia import nvimgcodec

            self.module = nvimgcodec
            self.decoder = nvimgcodec.Decoder(
                device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
                options=":fancy_upsampling=1",
            )
        self.params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def open(self, content: bytes) -> Any:
        """The file's header, or None where it is for Pillow to read."""
        try:
            stream = self.module.CodeStream(content)
            return stream if stream.num_channels in (1, 3) else None  # CMYK has conventions that Pillow knows
        except Exception:  # Pillow's message is the one to show
            return None

    def decode(self, stream: Any, box: Box) -> Tensor | None:
        # libjpeg interpolates colours only where it has more than two of them in a row, of two pixels each.
        right = min(stream.width, max(box.left + box.width, box.left + NARROW))
        left = max(0, min(box.left, right - NARROW))
        region = self.module.Region(box.top, left, box.top + box.height, right)
        try:
            image = self.decoder.decode(stream.get_sub_code_stream(0, region=region), params=self.params)
        except Exception:
            return None
        if image is None:
            return None
        columns = slice(box.left - left, box.left - left + box.width)
        return torch.from_numpy(np.asarray(image)[:, columns]).permute(2, 0, 1)


@functools.lru_cache(maxsize=1)
def _codec(process: int) -> _Codec | None:
    """One for each process, made in it. None where the package is not there; Pillow does all then."""
    try:
        return _Codec()
    except ImportError:
        return None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Of C libraries too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
