"""The order of the data: how well it mixes beside webdataset's buffer, and what it costs for 100,000 shards."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from acn_scale.benchmark.rows import Row, row
from acn_scale.benchmark.sides import peak_memory
from acn_scale.data.order import Order
from acn_scale.data.shards import ShardIndex


def shuffling(seeds: int = 4) -> list[Row]:
    """How well 50,000 samples of 50 shards are mixed: rank correlation (Spearman 1904) between the order on disk and
    the order read, and how far the samples of one shard end up from each other. A webdataset buffer holds samples; a
    window of ours holds eight bytes for each, so the same memory shuffles thousands of times as many."""
    from webdataset.filters import shuffle

    shards, size, memory = 50, 1000, 5000

    def ours(window: int) -> list[list[int]]:
        orders = (Order(np.full(shards, size), seed=seed, streams=1, window=window) for seed in range(seeds))
        places = [[order.locate(0, place) for place in range(shards * size)] for order in orders]
        return [[shard * size + number for shard, number in each] for each in places]

    def theirs() -> list[list[int]]:
        read = []
        for seed in range(seeds):
            permuted = np.random.default_rng(seed).permutation(shards)
            source = ({"number": int(shard) * size + number} for shard in permuted for number in range(size))
            read.append([sample["number"] for sample in shuffle(memory, initial=memory, seed=seed)(source)])
        return read

    figures = {"webdataset": theirs(), "same samples": ours(memory), "same memory": ours(shards * size)}
    spread = {name: [_spread(np.array(each) // size) for each in orders] for name, orders in figures.items()}
    disk = np.arange(shards * size)
    correlation = {
        name: np.mean([abs(np.corrcoef(disk, each)[0, 1]) for each in orders]) for name, orders in figures.items()
    }
    return [
        row(
            f"shuffle: spread of a shard's samples (rank correlation {correlation[name]:.3f}"
            f", theirs {correlation['webdataset']:.3f})",
            f"webdataset, {name}",
            "samples",
            spread[name],
            spread["webdataset"],
            more_is_better=True,
        )
        for name in ("same samples", "same memory")
    ]


def _spread(shards: np.ndarray) -> float:
    """Deviation of the places at which the samples of one shard are read, a mean over shards."""
    places = np.arange(len(shards))
    return float(np.mean([places[shards == shard].std() for shard in np.unique(shards)]))


def index_at_scale(shards: int = 100_000, samples: int = 13_000) -> list[Row]:
    """Index and order of 1.3 billion samples, in a process of its own: seconds and memory until a sample is located."""
    with tempfile.TemporaryDirectory() as folder:
        entry = {"samples": samples, "bytes": 1_000_000_000, "sha256": "0" * 64}
        entries = [{"name": f"shard-{number:06d}.tar", **entry} for number in range(shards)]
        values = {"info": {"rows_per_record": 1}, "shards": entries}
        (Path(folder) / "index.json").write_text(json.dumps(values, indent=1))
        command = [sys.executable, "-c", "from acn_scale.benchmark.order import _load; _load()", folder]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, mebibytes = map(float, output.split())
    work = f"index and order of {shards:,} shards, {shards * samples:,} samples"
    return [
        Row(work, "limit", seconds, 2.0, "s", 2.0 / seconds, 2.0 / seconds, 2.0 / seconds),
        Row(work, "limit", mebibytes, 200.0, "MiB", 200 / mebibytes, 200 / mebibytes, 200 / mebibytes),
    ]


def _load() -> None:
    """Of the process that measures the index; prints seconds and the growth of its peak memory in MiB."""
    before, start = peak_memory(), time.perf_counter()
    index = ShardIndex.load(sys.argv[1])
    order = Order(index.samples_per_shard, seed=0, streams=64, window=16384)
    order.locate(1, index.num_samples // 2)
    print(time.perf_counter() - start, peak_memory() - before)
