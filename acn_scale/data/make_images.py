"""Images of any source -> shards that keep their bytes."""

import io
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from acn_scale.data.decode import narrowed
from acn_scale.data.image_sources import open_images
from acn_scale.data.make import Making, describe, in_order
from acn_scale.data.raw_images import ENCODINGS, ImageSource, RawImage, encode_png
from acn_scale.data.selection import select
from acn_scale.data.shards import INDEX_NAME, ShardIndex
from acn_scale.data.storage import Shard
from acn_scale.errors import BadData, UserError

log = logging.getLogger(__name__)

MEASURED = 10_000  # about so many images are decoded for the mean and deviation of the pixels
MEASURED_OF_UNKNOWN = 16  # every so manyth, where nothing tells how many there are
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats whose files are kept as they are
QUALITY = 95  # of JPEGs that are made smaller

Shrink = Callable[[Image.Image], Image.Image]


@dataclass
class Pixels:
    """Sums over images for the mean and deviation of their pixels (0..1). Every image counts the same."""

    images: int = 0
    colour: bool = False
    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))  # of the values and of their squares

    def add(self, image: Image.Image) -> None:
        image = narrowed(image)
        values = np.asarray(image.convert("RGB"), dtype=np.float64).reshape(-1, 3) / 255
        self.images += 1  # after all that can fail: what is left out counts for nothing
        self.colour |= image.mode not in ("1", "L")
        self.sums += [values.mean(0), np.square(values).mean(0)]

    def merge(self, notes: dict[str, Any]) -> None:
        self.images += notes["images"]
        self.colour |= notes["colour"]
        self.sums += notes["sums"]

    def notes(self) -> dict[str, Any]:
        return {"images": self.images, "colour": self.colour, "sums": self.sums.tolist()}

    def info(self) -> dict[str, list[float]]:
        """Of each channel; of the one channel of grey images."""
        mean, square = self.sums / max(1, self.images)
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return {name: values[: 3 if self.colour else 1].tolist() for name, values in (("mean", mean), ("std", std))}


def make_image_shards(
    source: str,
    split: str,
    folder: Path,
    *,
    shard_size: int = 1000,
    workers: int = 1,
    resize: int | None = None,
    square: bool = False,
    classes: Sequence[str] | None = None,
    streaming: bool = False,
    first_classes: int | None = None,
    per_class: int | None = None,
    skip_classes: int = 0,
) -> ShardIndex:
    """Write the images of a source as shards of `shard_size`, each image as the bytes that it came in.

    `first_classes`, `skip_classes` and `per_class` take some of them only, as select does. With `resize`, images whose
    shorter side is longer than that are made smaller, JPEGs with quality 95; with `square`, all become their middle
    square of that size. What is no image is left out and listed in the index. The same shards come whatever `workers`
    is. Raises UserError.
    """
    images = open_images(source, split, classes=classes, streaming=streaming)
    images = select(images, first_classes=first_classes, per_class=per_class, skip_classes=skip_classes)
    plan = {"source": source, "split": split, "shard_size": shard_size, "resize": resize}
    plan |= {"classes": list(images.classes), "images": images.identity} | ({"square": True} if square else {})
    shrink = partial(shrunk, resize=resize, square=square) if resize else None
    with Making(folder, plan) as making:
        if making.index:
            return making.index
        shards, left_out, pixels = [], [], Pixels()
        bar = tqdm(total=images.size, desc=str(folder), unit="image", unit_scale=True)
        for shard, notes in _shards(making, images, shard_size, shrink, workers):
            shards.append(shard)
            left_out += notes["left_out"]
            pixels.merge(notes["pixels"])
            bar.update(shard.samples + len(notes["left_out"]))
        bar.close()
        for line in left_out[:10]:
            log.warning("left out: %s", line)
        if not any(shard.samples for shard in shards):
            making.discard()
            raise UserError(f"--source {source}: none of its {len(left_out)} images can be read: {left_out[:1]}")
        info = {"kind": "images", "source": source, "split": split, "classes": list(images.classes), **pixels.info()}
        return making.finish(shards, info | {"rows_per_record": 1, "resize": resize, "left_out": left_out})


def _shards(
    making: Making, images: ImageSource, shard_size: int, shrink: Shrink | None, workers: int
) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """All shards with their notes, those of an earlier run first made again only where they are not whole."""
    if images.size is None:  # one process reads on; there is nothing that others could do meanwhile
        yield from _shards_of_stream(making, images, shard_size, shrink)
        return
    every = max(1, images.size // MEASURED)

    def make(number: int) -> tuple[Shard, dict[str, Any]]:
        raw = images.read(number * shard_size, min((number + 1) * shard_size, images.size))
        return making.done(number) or _write(making, number, shard_size, raw, shrink, every)

    yield from in_order(make, range(math.ceil(images.size / shard_size)), workers)


def _shards_of_stream(
    making: Making, images: ImageSource, shard_size: int, shrink: Shrink | None
) -> Iterator[tuple[Shard, dict[str, Any]]]:
    number = 0
    while done := making.done(number):
        yield done
        number += 1
    rest = images.read(number * shard_size, None)
    while raw := list(islice(rest, shard_size)):
        yield _write(making, number, shard_size, raw, shrink, MEASURED_OF_UNKNOWN)
        number += 1


def _write(
    making: Making, number: int, shard_size: int, raw: Iterable[RawImage], shrink: Shrink | None, every: int
) -> tuple[Shard, dict[str, Any]]:
    pixels, left_out = Pixels(), []

    def records() -> Iterator[dict[str, Any]]:
        for position, image in enumerate(raw, number * shard_size):
            try:
                extension, content = prepare(image, shrink, pixels if position % every == 0 else None)
            except BadData as error:
                left_out.append(f"{image.shown or f'image {position}'}: {error}")
                continue
            key = "-".join(filter(None, [f"{position:08d}", re.sub(r"[^\w-]", "_", Path(image.name).stem)]))
            yield {"__key__": key, extension: content, "cls": str(image.label).encode()}

    shard = making.write(number, records())
    notes = {"left_out": left_out, "pixels": pixels.notes()}
    making.record(number, shard, notes)
    return shard, notes


def shrunk(image: Image.Image, *, resize: int, square: bool) -> Image.Image:
    """With a shorter side of `resize` at most, or its middle as a square of that; the same object where that is so."""
    if image.size == (resize, resize) or (not square and min(image.size) <= resize):
        return image
    image = narrowed(image)
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    if square:
        return ImageOps.fit(image, (resize, resize), Image.Resampling.BICUBIC)
    scale = resize / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)


def prepare(raw: RawImage, shrink: Shrink | None, pixels: Pixels | None) -> tuple[str, bytes]:
    """(extension, image file) to write for an image file, whose pixels are measured. Raises BadData for no image."""
    if raw.problem:
        raise BadData(raw.problem)
    try:
        original = Image.open(io.BytesIO(raw.content))
        kind, image = original.format, shrink(original) if shrink else original
        if pixels is not None:
            pixels.add(image)
        if kind in KEPT and image is original:
            return KEPT[kind], raw.content
        if kind == "JPEG":
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=QUALITY)
            return "jpg", buffer.getvalue()
        image = narrowed(image)
        return "png", encode_png(image if image.mode in ("1", "L", "RGB") else image.convert("RGB"))
    except Exception as error:  # damaged files fail in every way that Pillow's decoders can
        raise BadData(str(error).replace("<_io.BytesIO", "<the file") or type(error).__name__) from None


def index_shards(folder: Path, *, classes: Sequence[str] | None = None, workers: int = 1) -> ShardIndex:
    """Write the index of webdataset tars of images, as another tool made them, beside them. Raises UserError."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: holds no .tar files")
    if (folder / INDEX_NAME).exists():
        raise UserError(f"{folder / INDEX_NAME}: is there already; remove it to have it written again")
    images = open_images(f"wds:{folder}/*.tar", "", classes=classes)
    every = max(1, images.size // MEASURED)

    def look(part: int) -> tuple[Shard, dict[str, Any], list[str]]:
        pixels, bad = Pixels(), []
        for number, raw in enumerate(images.read_part(part, range(images.sizes[part]))):
            try:
                if not (raw.problem or raw.name.endswith(ENCODINGS)):
                    raise BadData(f"no file that ends in one of {', '.join(ENCODINGS)}, which alone are read as images")
                prepare(raw, None, pixels if number % every == 0 else None)
            except BadData as error:
                bad.append(f"{paths[part].name}: {raw.shown}: {error}")
        return describe(paths[part], images.sizes[part]), pixels.notes(), bad

    pixels, shards, bad = Pixels(), [], []
    results = in_order(look, range(len(paths)), workers)
    for shard, notes, unreadable in tqdm(results, total=len(paths), desc=str(folder), unit="shard"):
        shards.append(shard)
        pixels.merge(notes)
        bad += unreadable
    for line in bad[:10]:
        log.warning("cannot be read: %s", line)
    if not pixels.images:
        raise UserError(f"{folder}: none of its {images.size} images can be read: {bad[:1]}")
    info = {"kind": "images", "source": "index_shards", "classes": list(images.classes), **pixels.info()}
    index = ShardIndex(folder, shards, info | {"rows_per_record": 1, "unreadable": bad})
    index.save()
    return index


def describe_images(
    source: str,
    split: str,
    *,
    shard_size: int,
    classes: Sequence[str] | None,
    streaming: bool,
    first_classes: int | None = None,
    per_class: int | None = None,
    skip_classes: int = 0,
) -> str:
    """What make_image_shards would write, from a look at a hundred of the images. Raises UserError."""
    images = open_images(source, split, classes=classes, streaming=streaming)
    images = select(images, first_classes=first_classes, per_class=per_class, skip_classes=skip_classes)
    content: Counter[str] = Counter()
    sizes, bad = [], []
    for raw in islice(images.read(0, 100), 100):
        try:
            extension, _ = prepare(raw, None, None)
            content[extension] += 1
            sizes.append(len(raw.content))
        except BadData as error:
            bad.append(f"{raw.name}: {error}")
    lines = [f"{source}, {split}: {images.size if images.size is not None else 'a stream of'} images"]
    names = ", ".join(images.classes[:3])
    lines.append(f"{len(images.classes)} classes: {names}{', ...' if len(images.classes) > 3 else ''}")
    lines.append("of the first ones: " + ", ".join(f"{count} {name}" for name, count in content.items()))
    if images.size is not None and sizes:
        total = images.size * sum(sizes) / len(sizes)
        lines.append(f"{math.ceil(images.size / shard_size)} shards, about {total / 1e6:,.1f} MB as they are")
    return "\n".join(lines + [f"cannot be read: {line}" for line in bad[:5]])
