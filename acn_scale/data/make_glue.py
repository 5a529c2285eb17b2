"""The rows of a GLUE task -> shards: a record for each row, with its texts, label and index as JSON."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acn_scale.data.glue_sources import Row, read_split
from acn_scale.data.make import Making
from acn_scale.data.shards import ShardIndex
from acn_scale.data.tasks import TASKS
from acn_scale.errors import UserError

log = logging.getLogger(__name__)

SHARD_SIZE = 4096


def make_glue_shards(source: str, names: Sequence[str] | None, folder: Path) -> list[ShardIndex]:
    """Write each split that the source has of these tasks, or of all, to <folder>/<task>/<split>. Raises UserError;
    what was whole before stays.
    """
    found = []
    for name in names or TASKS:
        task, before = TASKS[name], len(found)
        for split in tqdm(task.splits, desc=name, unit="split", leave=False):
            lines = read_split(source, name, task, split)
            if lines is None:
                if split in ("train", "eval"):
                    raise UserError(f"--source {source}: has no {split} of {name}, {task.folder}/{task.splits[split]}")
                continue
            for line in lines.broken:
                log.warning("left out: %s", line)
            info = {"task": name, "split": split, "classes": list(task.labels), "left_out": lines.broken}
            found.append(write_split(folder / name / split, lines.rows, info))
        if names and len(found) == before:  # of all tasks, the diagnostic set alone may not be there
            raise UserError(f"--source {source}: has no {name}, {task.folder}/{' or '.join(task.splits.values())}")
    return found


def write_split(folder: Path, rows: Sequence[Row], info: dict[str, Any]) -> ShardIndex:
    """Shards of these rows. `info`: task, split, classes, and what else the index should say."""
    plan = {key: info[key] for key in ("task", "split")} | {"rows": len(rows), "content": _hash_of(rows)}
    with Making(folder, plan) as making:
        if making.index:
            return making.index
        starts = range(0, len(rows), SHARD_SIZE)
        shards = [making.write(number, _records(rows, start)) for number, start in enumerate(starts)]
        # By which rows of like length are put together; tokens are not known yet.
        lengths = [sum(len(text) for text in row.texts) for row in rows]
        return making.finish(shards, {"kind": "sentences", "rows_per_record": 1, "lengths": lengths} | info)


def _records(rows: Sequence[Row], first: int) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows[first : first + SHARD_SIZE], first):
        values = {"texts": row.texts, "label": row.label, "index": row.index}
        yield {"__key__": f"{number:08d}", "json": json.dumps(values, ensure_ascii=False).encode()}


def _hash_of(rows: Sequence[Row]) -> str:
    """Changes when any text or label does."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.texts, row.label, row.index)).encode())
    return digest.hexdigest()
