"""The data path beside timm, torchvision and webdataset: decoding, reading, resuming, and its order."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from acn_scale.benchmark import mosaicml
from acn_scale.benchmark.order import index_at_scale, shuffling
from acn_scale.benchmark.rows import Row, in_turns, row
from acn_scale.config import ImageDataConfig, StreamConfig, ViTConfig
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.data.images import ImageDecoder
from acn_scale.data.make import write_shard
from acn_scale.data.make_images import index_shards
from acn_scale.data.order import Order
from acn_scale.data.samples import Decoder, Key, Samples
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import Stream
from acn_scale.errors import UserError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RAW_RECORDS, RAW_BYTES = 2000, 20_000  # in each of the shards that are only read


def data_rows(images: Path | None, mosaicml_python: Path | None, rounds: int) -> list[Row]:
    """All of them. `images` is a folder of class folders of JPEGs; without it some are made. `mosaicml_python`
    has that library; without it its row is left out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = decoding(images or photos(Path(folder) / "photos"), Path(folder) / "decoding", rounds)
        rows += raw_reading(Path(folder) / "raw", rounds)
        rows += resuming(Path(folder) / "resume", mosaicml_python, rounds)
        return [*rows, *shuffling(), *index_at_scale()]


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


def decoding(images: Path, folder: Path, rounds: int) -> list[Row]:
    """JPEG files -> batches of normalised 224 px crops, flipped or not, in one process: images a second."""
    from timm.data import create_dataset, create_loader
    from torchvision.datasets import ImageFolder
    from webdataset import ShardWriter

    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    folder.mkdir(parents=True)
    with ShardWriter(f"{folder}/%06d.tar", maxcount=100, verbose=0) as writer:
        for number, path in enumerate(files):
            writer.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": "0"})
    index = index_shards(folder)
    data = ImageDataConfig(
        kind="images", train=str(folder), eval=str(folder), augment="crop_flip", mean=MEAN, std=STD, streams=1
    )
    model = ViTConfig(name="vit", connectivity="acn", size="Ti", image_size=224, patch_size=16, num_classes=1000)
    decoder = ImageDecoder(data, model, index, {}, training=True)
    order = Order(index.samples_per_shard, seed=0, streams=1, window=1024)
    samples = Samples(index, decoder, data, seed=0, order=order)
    epochs = iter(range(10**9))
    batch = 50

    def ours() -> Iterator[int]:
        first = next(epochs) * len(files)
        for start in range(0, len(files), batch):
            positions = [first + position for position in range(start, min(start + batch, len(files)))]
            yield len(decoder.finish(samples.__getitems__(positions).batch)["images"])

    transforms = [
        v2.RandomResizedCrop(224, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    dataset = ImageFolder(str(images), v2.Compose(transforms))
    torchvision = torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True)
    timm = create_loader(
        create_dataset("", root=str(images), split="train", is_training=True),
        input_size=(3, 224, 224),
        batch_size=batch,
        is_training=True,
        hflip=0.5,
        color_jitter=0,
        interpolation="bilinear",
        use_prefetcher=False,
        num_workers=0,
        mean=MEAN,
        std=STD,
    )

    def peer(loader: Any) -> Callable[[], Iterator[int]]:
        return lambda: (len(labels) for _, labels in loader)

    contenders = {"acn_scale": ours, "timm": peer(timm), "torchvision": peer(torchvision)}
    figures = in_turns({name: _speed(run) for name, run in contenders.items()}, rounds)
    return [
        row("JPEG to 224 px, one core", name, "images/s", figures["acn_scale"], figures[name], more_is_better=True)
        for name in ("timm", "torchvision")
    ]


def _speed(run: Callable[[], Iterator[int]]) -> Callable[[], float]:
    """Samples a second of a run that yields how many each batch has."""

    def measure() -> float:
        start = time.perf_counter()
        samples = sum(run())
        return samples / (time.perf_counter() - start)

    return measure


class _Bytes(Decoder):
    """Hands out records as they are."""

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> dict[str, bytes]:
        return files

    def collate(self, samples: list[dict[str, bytes]], keys: list[Key]) -> dict[str, Any]:
        return {"samples": samples}


def raw_reading(folder: Path, rounds: int) -> list[Row]:
    """Samples from tars, shuffled and not decoded, from the page cache: samples a second."""
    import webdataset

    _write_raw(folder, shards=8, records=RAW_RECORDS, size=RAW_BYTES)
    index = ShardIndex.load(folder)
    names = [str(folder / shard.name) for shard in index.shards]
    total, batch = index.num_samples, 100
    epochs = iter(range(10**9))

    def ours(verify: bool) -> Callable[[], Iterator[int]]:
        def run() -> Iterator[int]:
            samples = _raw_samples(folder, index, verify=verify)  # anew: to open and check shards is part of it
            first = next(epochs) * total
            for start in range(0, total, batch):
                positions = list(range(first + start, first + min(start + batch, total)))
                yield len(samples.__getitems__(positions).batch["samples"])

        return run

    def theirs() -> Iterator[int]:
        pipeline = webdataset.WebDataset(names, shardshuffle=len(names)).shuffle(4096).batched(batch, collation_fn=None)
        return (len(group) for group in pipeline)

    contenders = {"acn_scale": ours(True), "acn_scale, unverified": ours(False), "webdataset": theirs}
    figures = in_turns({name: _speed(run) for name, run in contenders.items()}, rounds)
    unit = f"samples/s of {RAW_BYTES // 1000} kB"
    return [
        row(work, "webdataset", unit, figures[name], figures["webdataset"], more_is_better=True)
        for work, name in (
            ("tar to samples, sha256 checked", "acn_scale"),
            ("tar to samples, unchecked", "acn_scale, unverified"),
        )
    ]


def _write_raw(folder: Path, *, shards: int, records: int, size: int) -> None:
    folder.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(size)

    def files(shard: int) -> Iterator[dict[str, Any]]:
        return ({"__key__": f"{shard:04d}{record:06d}", "bin": content, "cls": b"0"} for record in range(records))

    entries = [write_shard(folder / f"{number:06d}.tar", files(number)) for number in range(shards)]
    ShardIndex(folder, entries, {"rows_per_record": 1}).save()


def _raw_samples(folder: Path, index: ShardIndex, *, verify: bool, streams: int = 1) -> Samples:
    cfg = StreamConfig(train=str(folder), eval=str(folder), verify_checksums=verify)
    order = Order(index.samples_per_shard, seed=0, streams=streams, window=4096)
    return Samples(index, _Bytes(), cfg, seed=0, order=order)


def resuming(folder: Path, mosaicml_python: Path | None, rounds: int) -> list[Row]:
    """Time to the first batch of 200 shards: fresh, at 90 % of the epoch, by webdataset's skipping and by MosaicML's
    streaming."""
    import webdataset

    shards, records, size, batch = 200, 200, 1000, 64
    _write_raw(folder, shards=shards, records=records, size=size)
    names = sorted(str(path) for path in folder.glob("*.tar"))
    samples = int(0.9 * shards * records) // batch * batch

    def ours(start_at: int) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            index = ShardIndex.load(folder)
            samples = _raw_samples(folder, index, verify=True, streams=8)
            stream = Stream(samples, StreamConfig(train="-", eval="-"), BatchPlan(batch, batch, 0, 1, 1))
            if start_at:
                stream.load_state_dict(stream.state_dict() | {"samples": start_at})
            next(stream)
            return time.perf_counter() - start

        return measure

    def by_webdataset() -> float:
        start = time.perf_counter()
        pipeline = iter(webdataset.WebDataset(names, shardshuffle=200).shuffle(4096).batched(batch, collation_fn=None))
        for _ in range(samples // batch + 1):
            next(pipeline)
        return time.perf_counter() - start

    contenders = {"ours": ours(samples), "our fresh start": ours(0), "webdataset, skipping": by_webdataset}
    with contextlib.ExitStack() as stack:
        if mosaicml_python:
            sizes = [shards, records, size, batch, samples]
            peer = _resumed_by_mosaicml(mosaicml_python, folder / "mds", sizes)
            contenders["MosaicML streaming"] = stack.enter_context(peer)
        figures = in_turns(contenders, rounds)
    work, mine = "first batch when resumed at 90 % of 200 shards", figures.pop("ours")
    return [row(work, peer, "s", mine, seconds, more_is_better=False) for peer, seconds in figures.items()]


@contextlib.contextmanager
def _resumed_by_mosaicml(python: Path, folder: Path, sizes: list[int]) -> Iterator[Callable[[], float]]:
    command = [python, mosaicml.__file__, folder, *map(str, sizes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def measure() -> float:
            with contextlib.suppress(BrokenPipeError):  # it has ended, as is seen below
                print(file=process.stdin, flush=True)
            for line in process.stdout:  # the library prints there too
                if line.startswith(mosaicml.MARK):
                    return float(line.removeprefix(mosaicml.MARK))
            raise UserError(f"--mosaicml {python}: its process has ended; what it wrote says why")

        try:
            yield measure
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
