"""What the sources of images and of text share: their names, files by pattern, lines, Hugging Face data sets."""

import glob
import gzip
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import braceexpand

from acn_scale.errors import UserError

EVAL_NAMES = ("eval", "validation", "valid", "val", "test")  # what data sets call the part for evaluation
PARQUET_BRANCH = "refs/convert/parquet"  # of the hub, for data sets that are scripts: these are never run

# Data sets that people know by a shorter name than the hub does.
ALIASES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "bookcorpus": ("bookcorpus/bookcorpus", None),
    "imagenet-1k": ("ILSVRC/imagenet-1k", None),
    "cifar10": ("uoft-cs/cifar10", None),
    "cifar100": ("uoft-cs/cifar100", None),
}


def find_source(source: str, sources: Mapping[str, Callable[..., Any]]) -> tuple[Callable[..., Any], str]:
    """What opens "kind:rest", and the rest. Raises UserError for a kind that is not among the sources."""
    kind, _, rest = source.partition(":")
    if kind not in sources:
        raise UserError(f"--source {source}: must start with one of {', '.join(f'{name}:' for name in sources)}")
    return sources[kind], rest


def find_files(pattern: str) -> list[Path]:
    """The files of a pattern such as "wiki/*.txt" or "shard-{000..146}.tar", sorted. Raises UserError if there are
    none, or it is no such pattern."""
    try:
        patterns = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"{pattern}: each {{ must have its }}, as in {{000..146}}") from None
    files = sorted({Path(name) for each in patterns for name in glob.glob(each, recursive=True)})
    files = [path for path in files if path.is_file()]
    if not files:
        raise UserError(f"{pattern}: no such file")
    return files


def text_lines(path: Path) -> Iterator[str]:
    """Of a text file, also one packed by gzip. Raises UserError for bytes that are no UTF-8."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number}: not UTF-8: {error.reason}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: after line {number}: {error}") from None


def files_identity(paths: Iterable[Path]) -> str:
    """Changes when a file's name or size does."""
    return hashlib.sha256(repr([(path.name, path.stat().st_size) for path in paths]).encode()).hexdigest()


def split_name(split: str, names: Collection[str]) -> str:
    """The split as the data set calls it; "eval" is any of the usual names. Raises UserError where it has none."""
    found = next((name for name in (EVAL_NAMES if split == "eval" else (split,)) if name in names), None)
    if found is None:
        raise UserError(f"--split {split}: there are {', '.join(sorted(names)) or 'none'}")
    return found


def load_hugging_face(name: str, split: str, *, streaming: bool) -> Any:
    """A split of a data set "name[:config]" on the hub, or of one in a local folder. Raises UserError."""
    import datasets

    path, _, config = name.partition(":")
    if not Path(path).exists():
        path, usual = ALIASES.get(path, (path, None))
        config = config or usual
    options = {"path": path, "name": config or None, "streaming": streaming}
    try:
        try:
            return _load(datasets, split, options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            return _load(datasets, split, options | {"revision": PARQUET_BRANCH})
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such name, no network, no permission, files of another kind
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"hf:{name}: {lines[0]}") from None


def _load(datasets: Any, split: str, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if split == "eval":
            keys = ("path", "name", "revision")
            names = [options.get(key) for key in keys]
            found = datasets.get_dataset_split_names(names[0], names[1], revision=names[2])
            split = split_name(split, found)
        return datasets.load_dataset(**options, split=split)
