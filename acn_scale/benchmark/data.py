"""The data path beside timm, torchvision, webdataset and MosaicML streaming: decoding, reading, resuming, its order."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from acn_scale.benchmark.order import index_at_scale, shuffling
from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import Measure, Side, beside, speed
from acn_scale.benchmark.tars import raw_reading, resuming
from acn_scale.config import ImageDataConfig, ViTConfig
from acn_scale.data.images import ImageDecoder
from acn_scale.data.make_images import index_shards
from acn_scale.data.order import Order
from acn_scale.data.samples import Samples
from acn_scale.data.shards import ShardIndex

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 50


def data_rows(images: Path | None, mosaicml_python: Path | None, rounds: int) -> Iterator[Row]:
    """All of them. `images` is a folder of class folders of JPEGs; without it some are made. `mosaicml_python`
    has that library; without it its row is left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield from decoding(images or photos(Path(folder) / "photos"), Path(folder) / "decoding", rounds)
            yield from raw_reading(Path(folder) / "raw", rounds)
            yield from resuming(Path(folder) / "resume", mosaicml_python, rounds)
        yield from shuffling()
        yield from index_at_scale()
    finally:
        torch.set_num_threads(threads)


def photos(folder: Path, number: int = 100) -> Path:
    """JPEGs of ImageNet's usual size, 500 x 375, with detail at all scales as photographs have; 60 kB or so each."""
    random = np.random.default_rng(0)
    (folder / "a").mkdir(parents=True)
    for index in range(number):
        pixels = np.zeros((375, 500, 3))
        for scale in (2, 4, 8, 16, 32, 64):
            noise = random.normal(0, 6 * scale**0.4, (375 // scale + 2, 500 // scale + 2, 3)).clip(-128, 127)
            layer = Image.fromarray((noise + 128).astype(np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer).astype(float) - 128
        Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(folder / "a" / f"{index}.jpg", quality=90)
    return folder


def decoding(images: Path, folder: Path, rounds: int) -> Iterator[Row]:
    """JPEG files -> batches of normalised 224 px crops, flipped or not, in one process: images a second."""
    from webdataset import ShardWriter

    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    folder.mkdir(parents=True)
    with ShardWriter(f"{folder}/%06d.tar", maxcount=100, verbose=0) as writer:
        for number, path in enumerate(files):
            writer.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": "0"})
    index_shards(folder)
    sides = {"ours": Side(our_crops, folder), "timm": Side(timm_crops, images)}
    sides["torchvision"] = Side(torchvision_crops, images)
    yield from beside("JPEG to 224 px, one core", sides, rounds, "images/s", more_is_better=True)


@contextmanager
def our_crops(folder: Path) -> Iterator[Measure]:
    index = ShardIndex.load(folder)
    data = ImageDataConfig(
        kind="images", train=str(folder), eval=str(folder), augment="crop_flip", mean=MEAN, std=STD, streams=1
    )
    model = ViTConfig(name="vit", connectivity="acn", size="Ti", image_size=224, patch_size=16, num_classes=1000)
    decoder = ImageDecoder(data, model, index, {}, training=True)
    order = Order(index.samples_per_shard, seed=0, streams=1, window=1024)
    samples = Samples(index, decoder, data, seed=0, order=order)
    epochs, number = iter(range(10**9)), index.num_samples

    def run() -> Iterator[int]:
        first = next(epochs) * number
        for start in range(0, number, BATCH):
            positions = [first + position for position in range(start, min(start + BATCH, number))]
            yield len(decoder.finish(samples.__getitems__(positions).batch)["images"])

    yield speed(run)


@contextmanager
def timm_crops(images: Path) -> Iterator[Measure]:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(images), split="train", is_training=True),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        hflip=0.5,
        color_jitter=0,
        interpolation="bilinear",
        use_prefetcher=False,
        num_workers=0,
        mean=MEAN,
        std=STD,
    )
    yield _loading(loader)


@contextmanager
def torchvision_crops(images: Path) -> Iterator[Measure]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transforms = [
        v2.RandomResizedCrop(224, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    dataset = ImageFolder(str(images), v2.Compose(transforms))
    yield _loading(torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True))


def _loading(loader: Any) -> Measure:
    """Images a second of a pass over it."""
    return speed(lambda: (len(labels) for _, labels in loader))
