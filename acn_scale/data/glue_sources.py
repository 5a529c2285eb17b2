"""GLUE as people have it, the official TSV files or a Hugging Face data set -> rows of texts with their labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acn_scale.data.sources import find_source, load_hugging_face, text_lines
from acn_scale.data.tasks import Task
from acn_scale.errors import UserError

BROKEN = 0.001  # share of a training file's lines that may lack columns: the official QQP has a few
HUB_SPLITS = {"eval": "validation", "eval_mismatched": "validation_mismatched", "test_mismatched": "test_mismatched"}
HUB_TEXTS = {"mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis"), "ax": ("premise", "hypothesis")}
# What the hub calls the classes, in the order of ours, where the official files number them.
HUB_CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "wnli": ("not_entailment", "entailment"),
}


@dataclass(frozen=True)
class Row:
    """`label`: the number of a class, or the number to be predicted; None where the file does not tell."""

    texts: tuple[str, ...]
    label: float | None
    index: str  # by which the GLUE server knows it


@dataclass(frozen=True)
class Lines:
    """The rows of one split, and the lines that were left out, with what they lack."""

    rows: list[Row]
    broken: list[str]


def read_split(source: str, name: str, task: Task, split: str) -> Lines | None:
    """None where the source has no such split. Raises UserError for files that are not as the task's should be."""
    opener, rest = find_source(source, GLUE_SOURCES)
    return opener(rest, name, task, split)


def _from_files(rest: str, name: str, task: Task, split: str) -> Lines | None:
    folder = Path(rest)
    path = next((each for each in _places(folder, task, split) if each.exists()), None)
    if path is None:
        if not any(each.parent.is_dir() for each in _places(folder, task, split)):
            raise UserError(f"{folder / task.folder}: no such folder; it must hold {', '.join(task.splits.values())}")
        return None
    return _rows(path, text_lines(path), task, split)


def _places(folder: Path, task: Task, split: str) -> tuple[Path, Path]:
    """In the folder of all tasks, or in that of this one."""
    return folder / task.folder / task.splits[split], folder / task.splits[split]


def _rows(path: Path, file: Iterable[str], task: Task, split: str) -> Lines:
    tests = split.startswith("test")
    lines = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(file, 1))
    if task.columns and not tests:
        columns = list(task.columns)
    else:
        _, columns = next(lines, (0, [""]))
    wanted = [*task.texts, *([] if tests else [task.label])]
    if missing := [column for column in wanted if column not in columns]:
        raise UserError(f"{path}: line 1: has no column {missing[0]!r}; its columns are {', '.join(columns)}")
    rows, broken = [], []
    for number, cells in lines:
        if len(cells) != len(columns):
            broken.append(f"{path}: line {number}: {len(cells)} of {len(columns)} columns")
            if split != "train":
                raise UserError(f"{broken[0]}: an evaluation or test set must have all of its lines")
            continue
        values = dict(zip(columns, cells, strict=True))
        label = None if tests else _label(values[task.label], task, f"{path}: line {number}: {task.label}")
        index = values.get("index", values.get("id", str(len(rows)))) if tests else str(len(rows))
        rows.append(Row(tuple(values[text] for text in task.texts), label, index))
    if len(broken) > max(BROKEN * len(rows), 1):
        raise UserError(f"{broken[0]}, and {len(broken) - 1} more such lines")
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return Lines(rows, broken)


def _label(value: Any, task: Task, what: str) -> float:
    if task.labels:
        if value not in task.labels:
            raise UserError(f"{what} = {value!r}: must be one of {', '.join(task.labels)}")
        return task.labels.index(value)
    low, high = task.range
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not low <= number <= high:
        raise UserError(f"{what} = {value!r}: must be a number from {low:g} to {high:g}")
    return number


def _from_hub(rest: str, name: str, task: Task, split: str) -> Lines | None:
    """A data set whose configs are the tasks, as nyu-mll/glue has them; or a local folder of such."""
    import datasets

    path = rest or "nyu-mll/glue"
    theirs = HUB_SPLITS.get(split, split)
    if name == "mnli" and not split.endswith("mismatched"):
        theirs = {"train": "train", "eval": "validation_matched", "test": "test_matched"}[split]
    try:
        if name not in datasets.get_dataset_config_names(path):
            return None
        names = datasets.get_dataset_split_names(path, name)
    except Exception as error:  # of many kinds: no such name, no network
        raise UserError(f"hf:{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if theirs not in names:
        return None
    table = load_hugging_face(f"{path}:{name}", theirs, streaming=False)
    what = f"hf:{path}: {name}, {theirs}"
    rows = list(_hub_rows(table, name, task, what, labelled=not split.startswith("test")))
    if not rows:
        raise UserError(f"{what}: holds no rows")
    return Lines(rows, [])


def _hub_rows(table: Any, name: str, task: Task, what: str, *, labelled: bool) -> Iterator[Row]:
    """Classes go by their names, the hub's or the official files': a copy may number them in another order."""
    texts, names = HUB_TEXTS.get(name, task.texts), HUB_CLASSES.get(name, task.labels)
    if missing := [column for column in (*texts, "label") if column not in table.column_names]:
        raise UserError(f"{what}: has no column {missing[0]!r}")
    official = dict(zip(names, task.labels, strict=True))
    classes = getattr(table.features["label"], "names", None) or names  # bare numbers are the hub's
    if {official.get(each, each) for each in classes} != set(task.labels):
        raise UserError(f"{what}: classes {', '.join(classes)}: must be {', '.join(names) or 'numbers'}")
    for number, values in enumerate(table):
        where, label = f"{what}: row {number}", values["label"]
        if label in (None, -1):
            if labelled:
                raise UserError(f"{where}: has no label; only test sets go without")
            label = None
        else:
            label = classes[int(label)] if label in range(len(classes)) else label
            label = float(_label(official.get(str(label), label), task, f"{where}: label"))
        for text in texts:
            if not isinstance(values[text], str):
                raise UserError(f"{where}: {text} = {values[text]!r}: must be a text")
        yield Row(tuple(values[text] for text in texts), label, str(values.get("idx", number)))


GLUE_SOURCES: Mapping[str, Callable[[str, str, Task, str], Lines | None]] = {"tsv": _from_files, "hf": _from_hub}
