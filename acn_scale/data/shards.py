"""Shards: plain webdataset tars, the index.json that lists them, and random access to their records.

A sample is one record of a tar (files that share a key), or one row of a record where `rows_per_record` says that
records hold several (token sequences).
"""

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from acn_scale.config import RemoteConfig
from acn_scale.data.storage import Folder, Shard, read_file
from acn_scale.data.tar import Table
from acn_scale.errors import BadData, UserError
from acn_scale.files import write_file

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardIndex:
    """What index.json says of a folder of shards. `info` describes the data set: kind, classes, mean, std, ..."""

    folder: Path | str  # or a URL
    shards: list[Shard]
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path, remote: RemoteConfig | None = None) -> "ShardIndex":
        """Of a folder or URL. Raises UserError where there is none, or one that is not usable or lists no samples."""
        path = f"{folder}/{INDEX_NAME}"
        try:
            values = json.loads(read_file(str(folder), INDEX_NAME, remote or RemoteConfig()))
            index = cls(folder, [Shard(**shard) for shard in values["shards"]], values["info"])
            for shard in index.shards:
                _check(shard)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror or error}; tools/make_*_shards.py write shards and their index"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not an index of shards: {error!r}") from None
        if index.num_samples == 0:
            raise UserError(f"{path}: lists no samples")
        return index

    def save(self) -> None:
        text = json.dumps({"info": self.info, "shards": [asdict(shard) for shard in self.shards]}, indent=1)
        write_file(Path(self.folder) / INDEX_NAME, text.encode())

    @property
    def samples_per_shard(self) -> np.ndarray:
        return np.fromiter((shard.samples for shard in self.shards), dtype=np.int64, count=len(self.shards))

    @functools.cached_property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def summary(self) -> str:
        """The folder in one line."""
        total = sum(shard.bytes for shard in self.shards)
        return f"{self.folder}: {self.num_samples:,} samples in {len(self.shards):,} shards, {total / 1e6:,.1f} MB"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the shards' contents, whatever folder they lie in."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.sha256} {shard.samples}\n".encode())
        return digest.hexdigest()


def _check(shard: Shard) -> None:
    """Raises ValueError for what could lead out of the folder, or is no count."""
    if "/" in shard.name or shard.name in ("", ".", ".."):
        raise ValueError(f"name {shard.name!r} is not that of a file in the folder")
    if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"{shard.name}: sha256 {shard.sha256!r} is not 64 hexadecimal digits")
    numbers = shard.samples, shard.bytes, shard.table
    if any(type(number) is not int for number in numbers) or min(numbers) < 0:
        raise ValueError(f"{shard.name}: samples, bytes and table must be whole numbers from 0 on")


class ShardReader:
    """Random access to the records of a folder's shards."""

    def __init__(self, folder: Folder, open_shards: int = 256) -> None:
        self.folder = folder
        self._open = functools.lru_cache(maxsize=open_shards)(self._table)

    def read(self, shard: int, record: int, only: str | None = None) -> dict[str, bytes]:
        """The files of a record by extension, all or `only` one of them. Raises BadData for a shard that does not hold
        what its index says."""
        return self._opened(shard).read(record, only)

    def key(self, shard: int, record: int) -> str | None:
        """The record's key in its tar, or None where it cannot be told."""
        try:
            return self._opened(shard).key(record)
        except BadData:
            return None

    def _opened(self, shard: int) -> Table:
        table = self._open(shard)
        if isinstance(table, BadData):
            raise table
        return table

    def _table(self, shard: int) -> Table | BadData:
        """A bad shard is remembered as well: reading it anew for each of its samples could take hours."""
        for attempt in range(2):
            try:
                return Table(self.folder.path(shard), self.folder.shards[shard].table)
            except BadData as error:
                return error
            except OSError as error:  # another process may have dropped it from the cache in between
                if attempt == 1:
                    return BadData(f"cannot be opened: {error.strerror}")
        raise AssertionError
