"""Save checkpoints in the background, choose the one to go on from, and drop those that are not to be kept."""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from acn_scale import distributed, reshape
from acn_scale.checkpoint import CHUNK, STATE_NAME, complete, damage, undamaged
from acn_scale.data.stream import Stream
from acn_scale.errors import RunFailed, UserError
from acn_scale.runs import read_json, write_json

log = logging.getLogger(__name__)

LAST_WAIT = 10.0  # seconds for the other ranks' parts when this rank fails
POLL = 0.05  # seconds between two looks for what other ranks have written
SIGHT = 120.0  # seconds until each rank must see what rank 0 does: network file systems show a listing of a minute ago


class Checkpoints:
    """The checkpoints of a run, on every rank. Their methods are collective.

    A save copies this rank's part to main memory, which is all that training waits for; a thread writes it under a
    temporary name, with checksums. When the parts of all ranks are there, rank 0 writes state.json, gives the folder
    its name and drops the checkpoints that are not to be kept. A save that fails is logged, and the run goes on.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_every: int | None, progress: Callable[[], None] = lambda: None
    ) -> None:
        """`progress` is called while a rank waits for its files, whenever some of them are written or read."""
        self.folder, self.progress = folder / "checkpoints", progress
        self.keep, self.keep_every = keep, keep_every
        self._writer: _Writer | None = None
        self._saved = True  # whether the last save is complete
        if distributed.rank() == 0:
            for leftover in self.folder.glob(_temporary(Path("step_*")).name):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self, engine: Any, stream: Stream, step: int, state: dict[str, Any], parts: dict[str, bytes] | None = None
    ) -> float:
        """Begin to write step_<step>; return the seconds that training had to wait. Call it between two steps.

        `state` goes to state.json, `parts` are further files of this rank, by name. It waits for the save before, where
        that is not done yet.
        """
        start = time.perf_counter()
        self.finish()
        path = self.path(step)
        temporary = _temporary(path)
        mistakes = []
        if distributed.rank() == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                mistakes.append(_failed(path, error))
        if distributed.union(mistakes):
            self._saved = False
            return time.perf_counter() - start
        parts = _parts(engine, temporary) | (parts or {})
        state = {"step": step, "stream": stream.state_dict()} | reshape.notes(engine) | state
        self._writer = _Writer(self, path, temporary, parts, state)
        self._writer.start()
        return time.perf_counter() - start

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def finish(self) -> bool:
        """Wait for the last save; return whether it, where there was one, is complete."""
        if self._writer is not None:
            self._saved = self._writer.finish()
            self._writer = None
        return self._saved

    def close(self) -> None:
        """Let a save that is under way come to its end, when the run itself has failed. Not collective."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint, of those that rank 0 sees. Each rank looks at a part of the
        files of a candidate. The later ones, which are damaged, get another name.

        Raises RunFailed where a rank does not come to see them, and where all are damaged.
        """
        self.finish()
        ranks = distributed.rank(), distributed.world_size()
        listed = self._listed()
        found = undamaged(listed, lambda path: distributed.union(damage(path, *ranks, self.progress)))
        if listed and found is None:
            raise RunFailed(
                f"{self.folder}: {', '.join(path.name for path in listed)}: damaged or unreadable, as train.log says; "
                "mend one, or remove that folder to begin anew"
            )
        self._set_aside([path for path in listed if path > found])
        return found

    def _listed(self) -> list[Path]:
        """The complete ones, oldest first, the same on all ranks."""
        listed = distributed.union(complete(self.folder.parent) if distributed.rank() == 0 else [])
        deadline = time.monotonic() + SIGHT
        while (unseen := {*listed} - {*complete(self.folder.parent)}) and time.monotonic() < deadline:
            time.sleep(POLL)
        here = f"rank {distributed.rank()} ({socket.gethostname()})"
        for mistake in distributed.union([f"{here} does not see {path}, as rank 0 does" for path in sorted(unseen)]):
            raise RunFailed(f"{mistake}; all nodes must share that folder")
        return listed

    def _set_aside(self, damaged: list[Path]) -> None:
        """What is left of them stays, but counts no more: the run makes others of these steps, which are to be kept."""
        mistakes = []
        for path in damaged if distributed.rank() == 0 else []:
            try:
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            except OSError as error:
                mistakes.append(f"{path}: is damaged and cannot be renamed: {error.strerror}")
        for mistake in distributed.union(mistakes):
            raise RunFailed(mistake)

    def prune(self) -> None:
        """Drop all but the newest `keep` and the first one at or after each multiple of `keep_every`."""
        before = 0
        for old in complete(self.folder.parent)[: -self.keep]:
            step = int(old.name.removeprefix("step_"))
            # Whatever was dropped between the two is between the same multiples as `before`.
            if not (self.keep_every and step // self.keep_every > before // self.keep_every):
                try:
                    shutil.rmtree(old.rename(_temporary(old)))  # what is half removed is no checkpoint
                except OSError as error:
                    log.warning("%s is not to be kept, but cannot be removed: %s", old, error.strerror)
            before = step


class _Writer:
    """Writes this rank's part of a checkpoint; on rank 0 it then waits for the others' and completes it."""

    def __init__(
        self, owner: Checkpoints, path: Path, temporary: Path, parts: dict[str, bytes], state: dict[str, Any]
    ) -> None:
        self.owner, self.path, self.temporary, self.parts, self.state = owner, path, temporary, parts, state
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self._chunks = 0  # that are on the disk
        self._written = self._completed = False
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._completer = threading.Thread(target=self._complete, name="checkpoint completion", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._completer.start()

    def finish(self) -> bool:
        self._wait_for(self._thread)
        failed = distributed.union([] if self._written else [self.rank])
        if self.rank == 0:
            if failed:
                self._given_up.set()
            self._wait_for(self._completer)
            if failed:  # another rank may have written on while the folder was removed
                shutil.rmtree(self.temporary, ignore_errors=True)
        return not distributed.union([] if self._completed or self.rank else [self.rank])

    def _wait_for(self, thread: threading.Thread) -> None:
        """To the end, which may take as long as it needs while it writes; one that hangs is the watchdog's to find."""
        seen = 0
        while thread.is_alive():
            thread.join(POLL)
            if seen < self._chunks:
                seen = self._chunks
                self.owner.progress()

    def close(self) -> None:
        self._wait_for(self._thread)
        self._completer.join(timeout=LAST_WAIT if self.rank == 0 else 0)
        self._given_up.set()

    def _write(self) -> None:
        try:
            manifest = {}
            while self.parts:
                name, content = self.parts.popitem()
                manifest[name] = {"bytes": len(content), "sha256": self._write_file(self.temporary / name, content)}
            write_json(self.temporary / _part_name(self.rank), manifest)
            self._written = True
        except OSError as error:
            _failed(self.path, error)
            self._given_up.set()
            self.parts.clear()

    def _write_file(self, path: Path, content: bytes) -> str:
        """To the disk itself; return the sha256."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                digest.update(chunk)
                file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                self._chunks += 1
        return digest.hexdigest()

    def _complete(self) -> None:
        if self.rank != 0:
            return
        try:
            manifests = [self.temporary / _part_name(rank) for rank in range(self.world_size)]
            while not all(manifest.exists() for manifest in manifests):
                if self._given_up.wait(POLL):
                    shutil.rmtree(self.temporary, ignore_errors=True)
                    return
            files = {name: entry for manifest in manifests for name, entry in read_json(manifest).items()}
            for manifest in manifests:
                manifest.unlink()
            write_json(self.temporary / STATE_NAME, self.state | {"files": files})
            _sync(self.temporary)
            shutil.rmtree(self.path, ignore_errors=True)
            self.temporary.rename(self.path)
            _sync(self.path.parent)
            self._completed = True
        except (OSError, UserError) as error:
            _failed(self.path, error)
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            self.owner.prune()


def _parts(engine: Any, temporary: Path) -> dict[str, bytes]:
    """This rank's files of a checkpoint, as DeepSpeed would write them."""
    parts: dict[str, bytes] = {}

    def keep(state_dict: dict[str, Any], path: Any = None, save_path: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        parts[Path(path or save_path).name] = buffer.getbuffer()

    writer = engine.checkpoint_engine
    writer.save = keep  # in the place of the method, for this instance
    engine._copy_recovery_script = lambda folder: None  # it would fail on a full disk, in training itself
    try:
        engine.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False)
    finally:
        del writer.save, engine._copy_recovery_script
    return parts


def _temporary(path: Path) -> Path:
    """Its name while it is written or removed. What a start finds under such a name goes."""
    return path.with_name(f".{path.name}.tmp")


def _part_name(rank: int) -> str:
    return f"part_{rank:05d}.json"


def _sync(folder: Path) -> None:
    """Have a folder's entries on the disk. Some network file systems do not know this."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _failed(path: Path, error: OSError | UserError) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or error
    message = f"rank {distributed.rank()}: {path} was NOT saved: {reason}; training goes on"
    log.error(message)
    return message
