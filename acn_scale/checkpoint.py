"""Save, find, load and prune checkpoints. One that is not complete is never chosen."""

import logging
import shutil
from pathlib import Path
from typing import Any

from acn_scale import distributed
from acn_scale.data.stream import Stream
from acn_scale.errors import UserError
from acn_scale.runs import read_json, write_json

log = logging.getLogger(__name__)

STATE_NAME = "state.json"  # written last: a folder without it is not a checkpoint


def save(engine: Any, stream: Stream, folder: Path, step: int, *, keep: int) -> Path:
    """Write runs/<name>/checkpoints/step_<step> under a temporary name, rename it, drop all but the newest `keep`.

    Call it on every rank, between optimizer steps.
    """
    checkpoints = folder / "checkpoints"
    path = checkpoints / f"step_{step:08d}"
    temporary = path.with_name(f".{path.name}.tmp")
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()
    engine.save_checkpoint(str(checkpoints), tag=temporary.name, save_latest=False)
    distributed.barrier()  # every rank's part is there
    if distributed.rank() == 0:
        state = {"step": step, "stream": stream.state_dict(), "layout": _layout(engine)}
        write_json(temporary / STATE_NAME, state)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return path


def complete(folder: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in (folder / "checkpoints").glob(f"step_*/{STATE_NAME}"))


def resume(engine: Any, stream: Stream, folder: Path) -> int:
    """Load the newest complete checkpoint into engine and stream; return its step, or 0 where there is none.

    Raises UserError where it was written by another number of ranks or at another ZeRO stage.
    """
    checkpoints = complete(folder)
    if not checkpoints:
        return 0
    path = checkpoints[-1]
    state = read_json(path / STATE_NAME)
    if state["layout"] != _layout(engine):
        raise UserError(f"{path}: written with {state['layout']}; this run has {_layout(engine)}")
    stream.load_state_dict(state["stream"])
    engine.load_checkpoint(str(path.parent), tag=path.name, load_lr_scheduler_states=False)
    log.info("resumed at step %d from %s", state["step"], path)
    return state["step"]


def _layout(engine: Any) -> dict[str, int]:
    return {"ranks": distributed.world_size(), "zero_stage": engine.zero_optimization_stage()}
