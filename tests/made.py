"""Small folders of shards, made by hand."""

import hashlib
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import webdataset as wds
from PIL import Image
from torch import Tensor

from acn_scale.data.shards import ShardIndex
from acn_scale.data.storage import Shard


def png(width: int = 8, height: int = 8, colour: int = 0, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def shard_of(path: Path, samples: int) -> Shard:
    content = path.read_bytes()
    return Shard(path.name, samples, len(content), hashlib.sha256(content).hexdigest())


def write_folder(folder: Path, shards: Sequence[Sequence[dict[str, Any]]], info: dict[str, Any]) -> Path:
    """Shards of records without "__key__": the sample's number in the folder is made its key."""
    folder.mkdir(parents=True)
    entries, number = [], 0
    for place, records in enumerate(shards):
        path = folder / f"shard-{place:06d}.tar"
        with wds.TarWriter(str(path), mtime=0) as tar:
            for record in records:
                tar.write({"__key__": f"{number:06d}"} | record)
                number += 1
        entries.append(shard_of(path, len(records)))
    ShardIndex(folder, entries, {"rows_per_record": 1} | info).save()
    return folder


def image_folder(folder: Path, shards: Sequence[Sequence[tuple[bytes, str]]], classes: int = 10) -> Path:
    """Shards of (image file, label)."""
    info = {"kind": "images", "classes": [str(number) for number in range(classes)], "mean": [0.5], "std": [0.5]}
    records = [[{"png": image, "cls": label.encode()} for image, label in samples] for samples in shards]
    return write_folder(folder, records, info)


def numbered_images(folder: Path, sizes: Sequence[int]) -> Path:
    """Shards of these sizes of 8 x 8 images; the grey of a sample's pixels is its number."""
    numbers = iter(range(sum(sizes)))
    return image_folder(folder, [[(png(colour=next(numbers)), "1") for _ in range(size)] for size in sizes])


def numbers_in(images: Tensor) -> list[int]:
    """Of a batch of such images, as a stream gives them."""
    return [round(float(image.mean() * 0.5 + 0.5) * 255) for image in images]


def numbered_texts(folder: Path, sizes: Sequence[int]) -> Path:
    """Shards of these sizes; a sample's file holds its number."""
    numbers = iter(range(sum(sizes)))
    return write_folder(folder, [[{"txt": str(next(numbers))} for _ in range(size)] for size in sizes], {})


def reseal(folder: Path) -> None:
    """Have the index list the shards as they are now, as one would that was made from damaged shards."""
    index = ShardIndex.load(folder)
    shards = [shard_of(folder / shard.name, shard.samples) for shard in index.shards]
    ShardIndex(folder, shards, index.info).save()


def hashes(folder: Path) -> list[str]:
    return [shard.sha256 for shard in ShardIndex.load(folder).shards]


def run_killed(arguments: list[str], shards: Path, seen: int) -> None:
    """Run a tool and kill it as soon as it has written so many shards."""
    nowhere = Path(os.devnull)
    process = forked.start(*arguments, cwd=Path(__file__).parents[1], out=nowhere, errors=nowhere)
    while len(list(shards.glob("*.tar"))) < seen:
        assert process.exitcode is None, "it was done before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()


def record_of(out: Path, shard: Path) -> Path:
    """What a maker notes of a shard that is done."""
    return out / ".making" / f"{shard.stem.removeprefix('shard-')}.json"
