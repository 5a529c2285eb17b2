"""A remote folder of shards, seen through a cache that the ranks of a node share."""

import contextlib
import errno
import getpass
import logging
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import fsspec

from acn_scale.config import RemoteConfig
from acn_scale.data.storage import Shard, check_digest, scheme_of
from acn_scale.errors import BadData, UserError

log = logging.getLogger(__name__)

LONGEST_WAIT = 30.0  # seconds between two attempts
ABANDONED = 3600.0  # seconds after which a partial download counts as left behind
DOWNLOADS = 4  # at once in each rank, ahead of their use
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class RemoteFolder:
    """Shards behind a URL, downloaded whole, once a node, into a bounded cache.

    A cached file is named by its sha256, so that nothing outside decides on paths; it comes under that name only when
    its bytes are verified. Ranks and loader processes of a node take turns by file locks, which die with their
    process. When the cache is full, what was used longest ago goes; open files stay readable.
    """

    def __init__(self, location: str, shards: Sequence[Shard], remote: RemoteConfig) -> None:
        self.location, self.shards, self.remote = location.rstrip("/"), shards, remote
        self.cache = Path(remote.cache_dir) if remote.cache_dir else _default_cache()
        self._filesystem: tuple[int, Any] | None = None
        self._wanted: queue.SimpleQueue[int] | None = None
        self._filesystem_here()  # a missing package is a mistake to report now
        _make_private(self.cache / "locks")

    def read(self, name: str) -> bytes:
        return self._attempt(name, lambda: self._filesystem_here().cat_file(f"{self.location}/{name}"))

    def path(self, shard: int) -> Path:
        entry = self.shards[shard]
        path = self.cache / f"{entry.sha256}.tar"
        if _touch(path):
            return path
        try:
            with filelock.FileLock(self.cache / "locks" / entry.sha256[:3]):
                if not _touch(path):  # another process may have brought it meanwhile
                    self._attempt(entry.name, lambda: self._download(entry, path))
            self._evict(path)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise UserError(f"data.remote.cache_dir = {self.cache}: {error.strerror}") from None
            raise BadData(f"cannot be had: {error.strerror or error}") from None
        return path

    def missing(self) -> list[str]:
        return []

    def prefetch(self, shards: Sequence[int]) -> None:
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            for _ in range(DOWNLOADS):  # daemons: nobody waits for them when the run ends
                threading.Thread(target=self._bring, name="prefetch", daemon=True).start()
        for shard in shards:
            self._wanted.put(shard)

    def _bring(self) -> None:
        while True:
            with contextlib.suppress(BadData, UserError):  # whoever reads the shard meets it again, and reports it
                self.path(self._wanted.get())

    def _filesystem_here(self) -> Any:
        """fsspec's file system, one for each process: its event loop does not survive a fork."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            scheme = scheme_of(self.location)
            try:
                options = _timeouts(scheme, self.remote.timeout)
                self._filesystem = os.getpid(), fsspec.filesystem(scheme, skip_instance_cache=True, **options)
            except ImportError as error:
                raise UserError(f"{self.location}: {error}") from None
        return self._filesystem[1]

    def _download(self, shard: Shard, path: Path) -> None:
        partial = path.with_suffix(".part")
        try:
            self._filesystem_here().get_file(f"{self.location}/{shard.name}", str(partial))
            check_digest(partial, shard)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Do it; where it fails, again after about 1, 2, 4, ... seconds. What cannot get better is not tried again."""
        attempts = self.remote.retries + 1
        for attempt in range(attempts):
            try:
                return action()
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "not found") from None
            except Exception as error:  # each store has failures of its own, and time-outs that are no OSError
                status = getattr(error, "status", None)  # of HTTP
                refused = status is not None and 400 <= status < 500 and status not in (408, 429)
                reason = str(error) or type(error).__name__
                if getattr(error, "errno", None) in DISK_ERRORS:
                    raise
                if refused:
                    raise OSError(reason) from None
            if attempt + 1 < attempts:
                wait = min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
                log.warning("%s/%s: %s; trying again in %.1f s", self.location, name, reason, wait)
                time.sleep(wait)
        raise OSError(f"{reason} ({attempts} attempts)")

    def _evict(self, newest: Path) -> None:
        """Drop what was used longest ago until the cache keeps to its size."""
        with filelock.FileLock(self.cache / "locks" / "evict"):
            files = sorted(_sizes(self.cache), reverse=True)  # newest first
            total = 0
            for used, size, path in files:
                total += size
                abandoned = path.suffix == ".part" and used < time.time() - ABANDONED
                if abandoned or (total > self.remote.cache_gib * 2**30 and path != newest and path.suffix == ".tar"):
                    path.unlink(missing_ok=True)


def _sizes(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            if entry.is_file():
                yield entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)


def _touch(path: Path) -> bool:
    """Whether it is there; if so, it counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _default_cache() -> Path:
    """On a disk of the node, as temporary folders are; a folder of the user's own."""
    return Path(tempfile.gettempdir()) / f"acn_scale-{getpass.getuser()}" / "shards"


def _make_private(folder: Path) -> None:
    """Raises UserError for a folder that cannot be made, or that another user made to put shards of theirs into."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.remote.cache_dir = {folder.parent}: {error.strerror}") from None
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"data.remote.cache_dir = {folder.parent}: belongs to another user; name another folder")


def _timeouts(scheme: str, seconds: float) -> dict[str, Any]:
    """A connection that stays silent for so long has failed. Each store has a name of its own for that."""
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        return {"client_kwargs": {"timeout": timeout}}
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    return {"requests_timeout": seconds} if scheme == "gs" else {}
