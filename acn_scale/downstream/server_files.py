"""The files that the GLUE server takes, gathered from the runs that a table chose, and looked at before they go."""

import csv
from collections.abc import Mapping
from pathlib import Path

from acn_scale.data.tasks import TASKS, Task
from acn_scale.errors import UserError

HEADER = ["index", "prediction"]


def server_files(chosen: Mapping[str, Path]) -> tuple[dict[str, bytes], list[str]]:
    """The run of each task -> the files by name, and the names of those that are not there: the server wants all.

    Raises UserError for a file that the server would refuse, with the line.
    """
    files, lacking = {}, []
    for name, task in TASKS.items():
        run = chosen.get("mnli" if name == "ax" else name)  # what has learnt MNLI answers the diagnostic set
        for split in task.splits:
            if split.startswith("test"):
                file = f"{task.server.get(split, task.folder)}.tsv"
                path = run and run / "submission" / file
                if path and path.exists():
                    files[file] = path.read_bytes()
                    _check(path, task, run / "eval" / "predictions" / f"{name}_{split}.tsv")
                else:
                    lacking.append(file)
    return files, lacking


def _check(path: Path, task: Task, predictions: Path) -> None:
    head, *rows = _rows(path) or [[]]
    if head != HEADER:
        raise UserError(f"{path}:1: {head}: must be {HEADER}")
    for place, row in enumerate(rows):
        index, said = row if len(row) == 2 else ("", "")
        if index != str(place):
            raise UserError(f"{path}:{place + 2}: index {index!r}: must be {place}, the rows in their order")
        if not (said in task.labels if task.labels else _in_range(said, task.range)):
            valid = ", ".join(task.labels) or f"a number from {task.range[0]:g} to {task.range[1]:g}"
            raise UserError(f"{path}:{place + 2}: prediction {said!r}: must be {valid}")
    if predictions.exists() and len(rows) != (expected := len(_rows(predictions)) - 1):
        raise UserError(f"{path}: {len(rows)} predictions, must be {expected}, as {predictions} has")


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return [*csv.reader(file, delimiter="\t")]


def _in_range(said: str, bounds: tuple[float, float]) -> bool:
    try:
        return bounds[0] <= float(said) <= bounds[1]
    except ValueError:
        return False
