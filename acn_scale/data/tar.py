"""The records of a tar: where their files lie, by its headers or by a table at its end, and their bytes."""

import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from acn_scale.errors import BadData

TABLE_NAME = "__table__"  # webdataset's readers pass over such names


class Table:
    """Where the records of one open tar lie, files that share a key. `extensions` names the columns; a size of -1: the
    record has no such.

    `stored` is where the table that `append_table` wrote begins, which spares reading every header; 0: it has none.
    Raises BadData for what is no tar, and for a table that cannot be.
    """

    def __init__(self, path: Path, stored: int = 0) -> None:
        self.file = path.open("rb", buffering=0)
        self.keys, self.extensions, self.places = _load(self.file, stored) if stored else _scan(self.file)

    def read(self, record: int, only: str | None = None) -> dict[str, bytes]:
        """The files of a record by extension, all or `only` one of them. Raises BadData where the file is cut or cannot
        be read."""
        if record >= len(self.places):
            raise BadData(f"the shard holds {len(self.places)} records, fewer than its index says")
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


def _scan(file: BinaryIO) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Keys, extensions and places of a tar by its headers. One that is damaged ends before the damage."""
    from webdataset.tariterators import base_plus_ext  # here: shards with a table do without

    records: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        for name, start, size in members(file):
            key, extension = base_plus_ext(name)
            if key is not None:
                records.setdefault(key, {})[extension.lower()] = (start, size)  # as webdataset does
    except (tarfile.TarError, OSError, ValueError) as error:
        if not records:
            raise BadData(f"not a readable tar: {error}") from None
    # Of fixed width: a tenth of what strings take.
    keys = np.array([key.encode(errors="surrogateescape") for key in records], dtype=bytes)
    extensions = sorted({extension for files in records.values() for extension in files})
    places = np.full((len(records), len(extensions), 2), -1, dtype=np.int64)
    for row, files in zip(places, records.values(), strict=True):
        for extension, place in files.items():
            row[extensions.index(extension)] = place
    return keys, extensions, places


def _load(file: BinaryIO, stored: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The same from the table that begins there. It is the last file, so that only zeros follow."""
    try:
        content = os.pread(file.fileno(), max(0, os.fstat(file.fileno()).st_size - stored), stored)
        line, _, rest = content.partition(b"\n")
        records, width, extensions = json.loads(line)
        keys = np.frombuffer(rest, np.dtype((bytes, width)), records)
        shape = records, len(extensions), 2
        places = np.frombuffer(rest, "<i8", math.prod(shape), offset=records * width).reshape(shape)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadData(f"its table of records cannot be read: {error}") from None
    starts, sizes = places[..., 0], places[..., 1]
    if not ((sizes == -1) | ((starts >= 0) & (sizes >= 0) & (sizes <= stored - starts))).all():
        raise BadData("its table of records is damaged: it names places that are not in the shard")
    return keys, [str(extension) for extension in extensions], places


def append_table(path: Path) -> int:
    """Add the table of its records to a tar, as its last file; returns where the table's bytes begin.

    They are a line of JSON, [records, bytes of a key, extensions], and the arrays of keys and of places.
    """
    with path.open("r+b") as file:
        table = Table(path)
        line = json.dumps([len(table.keys), table.keys.itemsize, table.extensions]).encode() + b"\n"
        content = line + table.keys.tobytes() + table.places.astype("<i8").tobytes()
        entry = tarfile.TarInfo(TABLE_NAME)
        entry.size = len(content)
        file.seek(max((_padded(start + size) for _, start, size in members(file)), default=0))
        with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as tar:  # from here on
            start = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(entry, io.BytesIO(content))
        return start


def members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of the regular files of a tar, as Python's tarfile finds them but several times as fast.

    That takes over at the first header which is more than ustar's plain ones. Raises tarfile.TarError.
    """
    offset = 0
    while True:
        header = os.pread(file.fileno(), tarfile.BLOCKSIZE, offset)
        name, kind, magic, prefix = header[:100], header[156:157], header[257:262], header[345:346]
        digits, checksum = header[124:135], header[148:154]
        if (
            len(header) < tarfile.BLOCKSIZE
            or kind != tarfile.REGTYPE
            or magic != b"ustar"
            or prefix != b"\0"
            or not (digits + checksum).isdigit()
        ):
            break
        # Adler-32's lower half is 1 plus the sum of the bytes; that of the checksum's own field is of eight spaces.
        own = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
        if own != (1 + int(checksum, 8) - 8 * ord(" ")) % 65521:
            break
        size = int(digits, 8)
        start = offset + tarfile.BLOCKSIZE
        yield name.rstrip(b"\0").decode("utf-8", "surrogateescape"), start, size
        offset = _padded(start + size)
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        yield from ((member.name, member.offset_data, member.size) for member in tar if member.isfile())


def _padded(end: int) -> int:
    """Where the next header may begin."""
    return -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
