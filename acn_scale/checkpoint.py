"""Find, verify and load checkpoints. One that is not complete is never chosen."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from acn_scale import distributed, reshape
from acn_scale.config import Config
from acn_scale.data.stream import Stream
from acn_scale.errors import UserError
from acn_scale.runs import read_json, run_folder

log = logging.getLogger(__name__)

STATE_NAME = "state.json"  # written last: a folder without it is not a checkpoint
CHUNK = 2**26  # bytes that are written or read in a go: a sign of progress


def complete(folder: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in (folder / "checkpoints").glob(f"step_*/{STATE_NAME}"))


def trained(cfg: Config) -> bool:
    """Whether the run has come to its end: its newest complete checkpoint is of its last step."""
    folder = run_folder(cfg)
    checkpoints = complete(folder)
    return bool(checkpoints) and checkpoints[-1].name == f"step_{read_json(folder / 'environment.json')['steps']:08d}"


def damage(path: Path, part: int = 0, parts: int = 1, progress: Callable[[], None] = lambda: None) -> list[str]:
    """What is wrong with every `parts`-th file of a checkpoint, from number `part` on: size, checksum, or not there."""
    try:
        state = read_json(path / STATE_NAME)
        files = sorted(state["files"].items())
    except (UserError, KeyError, TypeError, AttributeError):
        return [f"{path / STATE_NAME}: not what it should be"] if part == 0 else []
    found = []
    for name, entry in files[part::parts]:
        try:
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    found.append(f"{path / name}: {size} bytes, not {entry['bytes']}")
                elif _sha256(file, progress) != entry["sha256"]:
                    found.append(f"{path / name}: its sha256 is not the one in {STATE_NAME}")
        except OSError as error:
            found.append(f"{path / name}: {error.strerror}")
    return found


def _sha256(file: BinaryIO, progress: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        progress()
    return digest.hexdigest()


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run that is not damaged; a warning tells of those that are passed over."""
    return undamaged(complete(folder), damage)


def undamaged(checkpoints: list[Path], damages: Callable[[Path], list[str]]) -> Path | None:
    for path in reversed(checkpoints):
        if not (found := damages(path)):
            return path
        if distributed.rank() == 0:
            more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
            log.warning("%s is damaged and passed over: %s%s", path.name, found[0], more)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds."""
    return read_json(path / STATE_NAME)


def load(engine: Any, stream: Stream, path: Path) -> dict[str, Any]:
    """Load a checkpoint into engine and stream, whatever number of ranks, ZeRO stage and of blocks wrote it; return its
    state. Of a network with more blocks the upper ones are left out.

    Raises UserError where the data are others now, or where the checkpoint cannot be brought into this run's layout.
    """
    state = read_state(path)
    steps = distributed.union([state["step"]])
    assert len({*steps}) == 1, f"{path}: of step {steps}, by rank"
    stream.load_state_dict(state["stream"])
    written, now = state["layout"], reshape.layout(engine)
    if reshape.fits(written, now):
        engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    else:
        reshape.load(engine, path, state)
        if distributed.rank() == 0:
            log.info("reshaped %s from %s to %s", path.name, reshape.describe(written), reshape.describe(now))
    return state
