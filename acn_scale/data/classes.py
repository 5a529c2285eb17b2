"""Labels as sources have them -> class names in their order, and class numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acn_scale.errors import UserError


def read_classes(path: Path) -> list[str]:
    """Class names in their order: from an index.json of shards, a JSON list, Keras's imagenet_class_index.json, or
    the first words of a text file's lines. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            names = [line.split()[0] for line in text.splitlines() if line.strip()]
        else:
            values = json.loads(text)
            if isinstance(values, dict) and "info" in values:
                values = values["info"]["classes"]
            if isinstance(values, dict):
                values = [values[str(number)][0] for number in range(len(values))]
            names = [str(name) for name in values]
    except OSError as error:
        raise UserError(f"--classes {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"--classes {path}: no list of classes") from None
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--classes {path}: must name each class once")
    return names


def class_names(values: set[Any]) -> list[str]:
    """Class names from the labels that occur: numbers count from 0, words are sorted."""
    if all(isinstance(value, int) for value in values):
        return [str(number) for number in range(max(values, default=-1) + 1)]
    return sorted(map(str, values))


def class_number(value: Any, numbers: Mapping[str, int], where: str) -> int:
    """The class number of a label. Raises UserError for one that is not among the classes."""
    if type(value) is int and 0 <= value < len(numbers):
        return value
    if str(value) not in numbers:
        raise UserError(f"{where}: label {value!r} is not among the {len(numbers)} classes")
    return numbers[str(value)]
