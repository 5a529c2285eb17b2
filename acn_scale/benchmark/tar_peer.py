"""webdataset as its users run it, in processes that import little else: its peak is not to be that of our modules."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acn_scale.benchmark.sides import Measure, speed


@contextmanager
def webdataset_samples(folder: Path, batch: int) -> Iterator[Measure]:
    yield speed(lambda: (len(group) for group in _batches(folder, batch)))


@contextmanager
def webdataset_skipping(folder: Path, batch: int, samples: int) -> Iterator[Measure]:
    """Seconds from opening the data to the batch that comes after so many samples of the epoch."""

    def measure() -> float:
        start = time.perf_counter()
        batches = iter(_batches(folder, batch))
        for _ in range(samples // batch + 1):
            next(batches)
        return time.perf_counter() - start

    yield measure


def _batches(folder: Path, batch: int) -> Any:
    from webdataset import WebDataset

    names = sorted(str(path) for path in folder.glob("*.tar"))
    return WebDataset(names, shardshuffle=len(names)).shuffle(4096).batched(batch, collation_fn=None)
