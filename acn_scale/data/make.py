"""Writing shards: whole or not at all, in parallel, going on where a killed run stopped."""

import hashlib
import json
import multiprocessing
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import filelock

from acn_scale.data.shards import INDEX_NAME, ShardIndex
from acn_scale.data.storage import Shard
from acn_scale.data.tar import append_table
from acn_scale.errors import UserError
from acn_scale.files import write_file
from acn_scale.stopping import end_with_parent

_function: Callable[[Any], Any]  # of a worker process
WORK = ".making"  # folder for what is not finished yet; it goes when the index comes


class Making:
    """A folder of shards in the making. Use it as a context: it keeps others from writing there meanwhile.

    `plan` says what is made and from what. Shards that were finished by the same plan are kept. Raises UserError where
    the folder holds the work of another plan, or another process is at it.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder, self.work = folder, folder / WORK
        self.plan = plan
        self.index: ShardIndex | None = None  # of a folder that is finished

    def __enter__(self) -> Self:
        if (self.folder / INDEX_NAME).exists():
            self.index = ShardIndex.load(self.folder)
            self._check(self.index.info.get("plan"))
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed just before its end
            return self
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.work / "lock", blocking=False)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f"--out {self.folder}: another process is writing there") from None
        except OSError as error:
            raise UserError(f"--out {self.folder}: {error.strerror}") from None
        plan = self.work / "plan.json"
        if plan.exists():
            self._check(json.loads(plan.read_text()))
        elif any(self.folder.glob("*.tar")):
            raise UserError(f"--out {self.folder}: holds tar files already; name another folder, or remove it")
        write_file(plan, json.dumps(self.plan).encode())
        return self

    def __exit__(self, *exception: object) -> None:
        if self.index is None:
            self._lock.release()

    def _check(self, plan: dict[str, Any] | None) -> None:
        now = json.loads(json.dumps(self.plan))
        if plan != now:
            key = next((key for key in now if plan and plan.get(key) != now[key]), None)
            what = f"{key} = {plan.get(key)}, now {now[key]}" if key else "made otherwise"
            raise UserError(f"--out {self.folder}: holds other shards ({what}); name another folder, or remove it")

    def write(self, number: int, records: Iterable[dict[str, Any]]) -> Shard:
        """Write one shard of webdataset records; the rows of an "npy" array are its samples."""
        temporary = self.work / f"shard-{number:06d}.tar"
        shard = write_shard(temporary, records)
        temporary.rename(self.folder / shard.name)
        return shard

    def record(self, number: int, shard: Shard, notes: dict[str, Any]) -> None:
        """Say that a shard is done, and what its writer has to remember of it."""
        write_file(self.work / f"{number:06d}.json", json.dumps({"shard": asdict(shard), "notes": notes}).encode())

    def done(self, number: int) -> tuple[Shard, dict[str, Any]] | None:
        """A shard that is done with its notes. None where it has to be made."""
        try:
            values = json.loads((self.work / f"{number:06d}.json").read_bytes())
            shard = Shard(**values["shard"])
            whole = (self.folder / shard.name).stat().st_size == shard.bytes
        except (OSError, ValueError):
            return None
        return (shard, values["notes"]) if whole else None

    def discard(self) -> None:
        """Remove all that was made: a mistake showed that only the whole could show."""
        for path in self.folder.glob("shard-*.tar"):
            path.unlink()
        shutil.rmtree(self.work)
        with suppress(OSError):  # something else may lie there
            self.folder.rmdir()

    def finish(self, shards: list[Shard], info: dict[str, Any]) -> ShardIndex:
        """Write the index, without which the folder counts as unfinished."""
        info |= {"plan": self.plan, "tool": f"acn_scale {version('acn_scale')}"}
        self.index = ShardIndex(self.folder, [shard for shard in shards if shard.samples], info)
        self.index.save()
        self._lock.release()
        shutil.rmtree(self.work)
        return self.index


def write_shard(path: Path, records: Iterable[dict[str, Any]]) -> Shard:
    """A tar of webdataset records; the rows of an "npy" array are its samples."""
    from webdataset import TarWriter

    samples = 0
    with TarWriter(str(path), mtime=0) as tar:
        for record in records:
            tar.write(record)
            samples += len(record["npy"]) if "npy" in record else 1
    return describe(path, samples, append_table(path))


def describe(path: Path, samples: int, table: int = 0) -> Shard:
    """A tar file as the index lists it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, samples, path.stat().st_size, digest, table)


def in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """map() over so many processes: results in the order of the items, which are taken only as fast as needed."""
    if workers <= 1:
        yield from map(function, items)
        return
    # Forked, so that the function and what it refers to need not be sent.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"--workers {workers}: a worker process was killed; was there too little memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Ctrl-C is the parent's affair."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _work(item: Any) -> Any:
    return _function(item)
