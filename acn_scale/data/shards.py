"""Shards on disk: plain webdataset tars and one index.json; and the order in which their samples are read.

A sample is one record of a tar (files that share a key), or one row of a record where `rows_per_record` says that
records hold several (token sequences).
"""

import functools
import hashlib
import json
import mmap
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext

from acn_scale.errors import UserError

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What index.json says of a folder of shards. `info` describes the data set: kind, classes, mean, std, ..."""

    folder: Path
    shards: list[Shard]
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """Raises UserError for a folder that is missing, holds no usable index, lists no samples or lacks a shard."""
        path = Path(folder) / INDEX_NAME
        try:
            values = json.loads(path.read_text())
            index = cls(Path(folder), [Shard(**shard) for shard in values["shards"]], values["info"])
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; tools/make_*_shards.py write shards and their index") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not an index of shards: {error!r}") from None
        if index.num_samples == 0:
            raise UserError(f"{path}: lists no samples")
        for shard in index.shards:
            if not (index.folder / shard.name).is_file():
                raise UserError(f"{path}: lists {shard.name}, which is not there")
        return index

    def save(self) -> None:
        text = json.dumps({"info": self.info, "shards": [asdict(shard) for shard in self.shards]}, indent=1)
        temporary = self.folder / (INDEX_NAME + ".tmp")
        temporary.write_text(text)
        temporary.rename(self.folder / INDEX_NAME)

    @property
    def samples_per_shard(self) -> np.ndarray:
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the shards' contents, whatever folder they lie in."""
        lines = "\n".join(f"{shard.sha256} {shard.samples}" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()


class Order:
    """Where the sample at a position of an epoch lies: a pure function of (seed, epoch, position).

    Shards are permuted anew in each epoch, and the row of all their samples is cut into `streams` ranges of equal
    length. Positions are dealt to the streams in turn, `group` at a time, so that a rank which takes every n-th group
    reads n-th parts of the shards. Within a stream, samples are shuffled inside windows of `window`. Each sample comes
    exactly once an epoch, whatever the numbers are.
    """

    def __init__(self, samples_per_shard: np.ndarray, *, seed: int, streams: int, window: int, group: int = 1) -> None:
        self.samples_per_shard = samples_per_shard
        self.num_samples = int(samples_per_shard.sum())
        self.seed, self.streams, self.window, self.group = seed, streams, window, group
        whole_rounds, rest = divmod(self.num_samples, group * streams)
        self._lengths = whole_rounds * group + np.clip(rest - group * np.arange(streams), 0, group)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._shards_of_epoch = functools.lru_cache(maxsize=2)(self._permute_shards)
        self._permutation = functools.lru_cache(maxsize=2 * streams)(self._permute_window)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, sample in that shard) of a position 0 ... num_samples - 1."""
        block, offset = divmod(position, self.group)
        round_, stream = divmod(block, self.streams)
        window, offset = divmod(round_ * self.group + offset, self.window)
        place = self._starts[stream] + window * self.window + self._permutation(epoch, stream, window)[offset]
        shards, ends = self._shards_of_epoch(epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[turn])
        return shard, int(place - (ends[turn] - self.samples_per_shard[shard]))

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples_per_shard))
        return shards, np.cumsum(self.samples_per_shard[shards])

    def _permute_window(self, epoch: int, stream: int, window: int) -> np.ndarray:
        size = min(self.window, int(self._lengths[stream]) - window * self.window)
        return np.random.default_rng([self.seed, epoch, stream, window]).permutation(size)


class ShardReader:
    """Random access to the records of local shards."""

    def __init__(self, index: ShardIndex, open_shards: int = 64) -> None:
        self.index = index
        self._open = functools.lru_cache(maxsize=open_shards)(self._scan)

    def path(self, shard: int) -> Path:
        return self.index.folder / self.index.shards[shard].name

    def read(self, shard: int, record: int) -> dict[str, memoryview]:
        """The files of a record by extension. Raises UserError for a shard that does not hold what its index says."""
        try:
            buffer, records = self._open(shard)
            files = records[record]
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"not a readable tar: {error}") from None
        except IndexError:
            raise UserError(f"the shard holds {len(records)} records, fewer than {INDEX_NAME} says") from None
        return {extension: buffer[start : start + size] for extension, (start, size) in files.items()}

    def _scan(self, shard: int) -> tuple[memoryview, list[dict[str, tuple[int, int]]]]:
        """The shard's bytes, mapped, and where the files of each record lie in them."""
        records: dict[str, dict[str, tuple[int, int]]] = {}
        with open(self.path(shard), "rb") as file:
            buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    if member.isfile() and key is not None:
                        records.setdefault(key, {})[extension] = (member.offset_data, member.size)
        return buffer, list(records.values())
