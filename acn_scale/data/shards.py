"""Shards: plain webdataset tars, the index.json that lists them, and random access to their records.

A sample is one record of a tar (files that share a key), or one row of a record where `rows_per_record` says that
records hold several (token sequences).
"""

import functools
import hashlib
import json
import os
import re
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext

from acn_scale.config import RemoteConfig
from acn_scale.data.storage import Folder, Shard, read_file
from acn_scale.data.tar import members
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
    if type(shard.samples) is not int or type(shard.bytes) is not int or min(shard.samples, shard.bytes) < 0:
        raise ValueError(f"{shard.name}: samples and bytes must be whole numbers from 0 on")


class Table:
    """Where the records of one open shard lie. `extensions` names the columns; a size of -1: the record has no such."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        records: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            for name, start, size in members(self.file):
                key, extension = base_plus_ext(name)
                if key is not None:
                    records.setdefault(key, {})[extension] = (start, size)
        except (tarfile.TarError, OSError, ValueError) as error:
            if not records:
                raise BadData(f"not a readable tar: {error}") from None
        # Of fixed width: a tenth of what strings take.
        self.keys = np.array([key.encode() for key in records], dtype=bytes)
        self.extensions = sorted({extension for files in records.values() for extension in files})
        self.places = np.full((len(records), len(self.extensions), 2), -1, dtype=np.int64)
        for row, files in zip(self.places, records.values(), strict=True):
            for extension, place in files.items():
                row[self.extensions.index(extension)] = place

    def read(self, record: int, only: str | None = None) -> dict[str, bytes]:
        """The files of a record by extension, all or `only` one of them. Raises BadData where the file is cut or cannot
        be read."""
        if record >= len(self.places):
            raise BadData(f"the shard holds {len(self.places)} records, fewer than {INDEX_NAME} says")
        files = {}
        for extension, (start, size) in zip(self.extensions, self.places[record].tolist(), strict=True):
            if size >= 0 and only in (None, extension):
                try:
                    files[extension] = os.pread(self.file.fileno(), size, start)
                except OSError as error:
                    raise BadData(f"cannot be read: {error.strerror}") from None
                if len(files[extension]) < size:
                    raise BadData(f"the shard is cut: .{extension} has {len(files[extension])} of {size} bytes")
        return files

    def key(self, record: int) -> str | None:
        return self.keys[record].decode(errors="replace") if record < len(self.keys) else None


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
                return Table(self.folder.path(shard))
            except BadData as error:
                return error
            except OSError as error:  # another process may have dropped it from the cache in between
                if attempt == 1:
                    return BadData(f"cannot be opened: {error.strerror}")
        raise AssertionError
