"""What a job is made of, the code and the resolved config, in a folder where later edits do not reach."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel

import acn_scale
from acn_scale.errors import UserError
from acn_scale.runs import COMMIT, git_commit

PRETRAIN, FINETUNE = "acn_scale/pretrain.py", "acn_scale/finetune.py"  # in it
NO_FILES: Mapping[str, bytes] = MappingProxyType({})


def _content(values: BaseModel, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a job is made of, by its name in the snapshot."""
    sources = Path(acn_scale.__file__).parents[1]
    programs = sorted(path for part in ("acn_scale", "launchers", "tools") for path in (sources / part).rglob("*.py"))
    config = json.dumps(values.model_dump(mode="json"), indent=1) + "\n"
    code = {str(path.relative_to(sources)): path.read_bytes() for path in programs}
    return code | {"config.json": config.encode()} | files


def snapshot_path(folder: Path, values: BaseModel, files: Mapping[str, bytes] = NO_FILES) -> Path:
    """Where the snapshot of the code and config as they are now belongs, for a job whose results go to a folder."""
    digest = hashlib.sha256(repr(sorted(_content(values, files).items())).encode()).hexdigest()
    return (folder / "jobs" / f"snapshot_{digest[:12]}").resolve()


def take_snapshot(folder: Path, values: BaseModel, files: Mapping[str, bytes] = NO_FILES) -> Path:
    """Copy the code, the resolved config and other `files` into the folder, where later edits do not reach; return
    where.

    The same code and config give the same snapshot: one that a queued job waits for is never written over.
    """
    snapshot = snapshot_path(folder, values, files)
    if not snapshot.exists():
        temporary = snapshot.with_suffix(".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for name, content in _content(values, files).items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            (temporary / COMMIT).write_text(f"{git_commit() or 'not in git'}\n")
            temporary.rename(snapshot)
        except OSError as error:
            raise UserError(f"{snapshot}: {error.strerror}") from None
    return snapshot
