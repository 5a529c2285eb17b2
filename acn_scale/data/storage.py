"""Where shard files are: a local folder, or a remote one (remote_folder.py)."""

import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from acn_scale.config import RemoteConfig
from acn_scale.errors import BadData, UserError

REMOTE = ("s3", "gs", "hf", "http", "https")


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file as the index lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    table: int = 0  # where the table of its records begins; 0: it has none


class Folder(Protocol):
    """A folder of shards. Made before loader processes are forked, used in all of them."""

    location: str
    shards: Sequence[Shard]

    def read(self, name: str) -> bytes:
        """A small file beside the shards. Raises FileNotFoundError, or OSError for what else prevents it."""
        ...

    def path(self, shard: int) -> Path:
        """The shard as a local file whose bytes are those that the index lists. Raises BadData."""
        ...

    def missing(self) -> list[str]:
        """Shards that the index lists and that are not there, where that can be told at once."""
        ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Have these at hand soon, the first ones first. Returns at once."""
        ...


def open_folder(location: str, shards: Sequence[Shard], remote: RemoteConfig, *, verify: bool = True) -> Folder:
    """The folder at a path or URL. Raises UserError for a URL of a kind that is not read."""
    if scheme_of(location) is None:
        return LocalFolder(location, shards, verify=verify)
    from acn_scale.data.remote_folder import RemoteFolder  # here: a run on local shards does without its packages

    return RemoteFolder(location, shards, remote)


def read_file(location: str, name: str, remote: RemoteConfig) -> bytes:
    """A small file of a folder, before its shards are known. Raises FileNotFoundError, OSError or UserError."""
    return open_folder(location, [], remote).read(name)


def scheme_of(location: str) -> str | None:
    """The "https" of a URL, None of a path. Raises UserError for any other scheme: a name never starts a command."""
    scheme, colon, rest = location.partition(":")
    if not colon or "/" in scheme or Path(location).exists():
        return None
    if scheme not in REMOTE or not rest.startswith("//"):
        raise UserError(f"{location}: neither a folder nor a URL of {', '.join(f'{name}://' for name in REMOTE)}")
    return scheme


class LocalFolder:
    """Shards on a disk of this machine or a file system that it mounts."""

    def __init__(self, location: str, shards: Sequence[Shard], *, verify: bool) -> None:
        self.location, self.shards, self.verify = location, shards, verify
        # One byte a shard, shared with forked loader processes: each shard is verified once a rank, not once a worker.
        self._verified = mmap.mmap(-1, max(1, len(shards)))

    def read(self, name: str) -> bytes:
        return (Path(self.location) / name).read_bytes()

    def path(self, shard: int) -> Path:
        entry = self.shards[shard]
        path = Path(self.location) / entry.name
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                raise BadData(f"{size} bytes, where the index lists {entry.bytes}")
            if self.verify and not self._verified[shard]:
                check_digest(path, entry)
                self._verified[shard] = 1
        except OSError as error:
            raise BadData(f"cannot be read: {error.strerror}") from None
        return path

    def missing(self) -> list[str]:
        there = set(os.listdir(self.location))  # one call, where asking for each of 100,000 would take long
        return [shard.name for shard in self.shards if shard.name not in there]

    def prefetch(self, shards: Sequence[int]) -> None:
        pass  # the system reads ahead by itself


def check_digest(path: Path, shard: Shard) -> None:
    """Raises BadData where the file's bytes are not those that the index lists."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise BadData(f"wrong checksum: sha256 {digest[:12]}..., where the index lists {shard.sha256[:12]}...")
