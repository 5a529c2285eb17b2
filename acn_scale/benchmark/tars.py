"""Tars beside webdataset and MosaicML streaming: samples read, not decoded, and how soon the first batch is there."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from acn_scale.benchmark import mosaicml
from acn_scale.benchmark.rows import Row, row
from acn_scale.benchmark.sides import Measure, Side, beside, compare, speed
from acn_scale.benchmark.tar_peer import webdataset_samples, webdataset_skipping
from acn_scale.config import StreamConfig
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.data.make import write_shard
from acn_scale.data.order import Order
from acn_scale.data.samples import Decoder, Key, Samples
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import Stream
from acn_scale.errors import UserError

RECORDS, SIZE, BATCH = 2000, 20_000, 100  # of raw reading: records of a shard, bytes of one
SHARDS, SMALL_RECORDS, SMALL_SIZE, SMALL_BATCH = 200, 200, 1000, 64  # of resuming
PLACE = int(0.9 * SHARDS * SMALL_RECORDS) // SMALL_BATCH * SMALL_BATCH  # samples before the batch that is waited for


class _Bytes(Decoder):
    """Hands out records as they are."""

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> dict[str, bytes]:
        return files

    def collate(self, samples: list[dict[str, bytes]], keys: list[Key]) -> dict[str, Any]:
        return {"samples": samples}


def raw_reading(folder: Path, rounds: int) -> Iterator[Row]:
    """Samples from tars, shuffled and not decoded, from the page cache: samples a second."""
    _write(folder, shards=8, records=RECORDS, size=SIZE)
    ours = {"tar to samples, sha256 checked": Side(our_samples, folder, True)}
    ours["tar to samples, unchecked"] = Side(our_samples, folder, False)
    figures, peaks = compare(ours | {"webdataset": Side(webdataset_samples, folder, BATCH)}, rounds)
    for work in ours:
        both, memory = ((each[work], each["webdataset"]) for each in (figures, peaks))
        yield row(work, "webdataset", f"samples/s of {SIZE // 1000} kB", *both, more_is_better=True, peaks=memory)


@contextmanager
def our_samples(folder: Path, verify: bool) -> Iterator[Measure]:
    index = ShardIndex.load(folder)
    epochs, total = iter(range(10**9)), index.num_samples

    def run() -> Iterator[int]:
        samples = _samples(folder, index, verify=verify)  # anew: to open and check shards is part of it
        first = next(epochs) * total
        for start in range(0, total, BATCH):
            positions = list(range(first + start, first + min(start + BATCH, total)))
            yield len(samples.__getitems__(positions).batch["samples"])

    yield speed(run)


def _write(folder: Path, *, shards: int, records: int, size: int) -> None:
    folder.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(size)

    def files(shard: int) -> Iterator[dict[str, Any]]:
        return ({"__key__": f"{shard:04d}{record:06d}", "bin": content, "cls": b"0"} for record in range(records))

    entries = [write_shard(folder / f"{number:06d}.tar", files(number)) for number in range(shards)]
    ShardIndex(folder, entries, {"rows_per_record": 1}).save()


def _samples(folder: Path, index: ShardIndex, *, verify: bool, streams: int = 1) -> Samples:
    cfg = StreamConfig(train=str(folder), eval=str(folder), verify_checksums=verify)
    order = Order(index.samples_per_shard, seed=0, streams=streams, window=4096)
    return Samples(index, _Bytes(), cfg, seed=0, order=order)


def resuming(folder: Path, mosaicml_python: Path | None, rounds: int) -> Iterator[Row]:
    """Time to the first batch of 200 shards: fresh, at 90 % of the epoch, by webdataset's skipping and by MosaicML's
    streaming."""
    _write(folder, shards=SHARDS, records=SMALL_RECORDS, size=SMALL_SIZE)
    sides = {"ours": Side(our_first_batch, folder, PLACE), "our fresh start": Side(our_first_batch, folder, 0)}
    sides["webdataset, skipping"] = Side(webdataset_skipping, folder, SMALL_BATCH, PLACE)
    if mosaicml_python:
        sides["MosaicML streaming"] = MosaicML(mosaicml_python, folder / "mds")
    yield from beside("first batch when resumed at 90 % of 200 shards", sides, rounds)


@contextmanager
def our_first_batch(folder: Path, place: int) -> Iterator[Measure]:
    def measure() -> float:
        start = time.perf_counter()
        index = ShardIndex.load(folder)
        samples = _samples(folder, index, verify=True, streams=8)
        stream = Stream(samples, StreamConfig(train="-", eval="-"), BatchPlan(SMALL_BATCH, SMALL_BATCH, 0, 1, 1))
        if place:
            stream.load_state_dict(stream.state_dict() | {"samples": place})
        next(stream)
        return time.perf_counter() - start

    yield measure


class MosaicML:
    """A Side of that library, in a Python of its own."""

    def __init__(self, python: Path, folder: Path) -> None:
        sizes = map(str, (SHARDS, SMALL_RECORDS, SMALL_SIZE, SMALL_BATCH, PLACE))
        self._command = [python, mosaicml.__file__, folder, *sizes]
        self.peak = 0.0  # MiB

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(BrokenPipeError):
            self._process.__exit__(*error)

    def measure(self) -> float:
        with suppress(BrokenPipeError):  # it has ended, as is seen below
            print(file=self._process.stdin, flush=True)
        for line in self._process.stdout:  # the library prints there too
            if line.startswith(mosaicml.MARK):
                seconds, self.peak = map(float, line.removeprefix(mosaicml.MARK).split())
                return seconds
        raise UserError(f"--mosaicml {self._command[0]}: its process has ended; what it wrote says why")
