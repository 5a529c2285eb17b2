"""CIFAR-10 and CIFAR-100 from the files of their python version (Krizhevsky 2009), without running what is in them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from acn_scale.data.sources import split_name
from acn_scale.errors import UserError


def read_cifar(place: Path, split: str) -> tuple[np.ndarray, list[int], list[str]]:
    """(images (n, 32, 32, 3) uint8, classes of each, their names), of CIFAR-100 the fine ones. `place` is the folder of
    the files, or the one that it lies in. Raises UserError."""
    folder = next((path for path in (place, *sorted(place.glob("cifar-*-*"))) if _files(path, "train")), None)
    if folder is None:
        raise UserError(f"cifar:{place}: holds neither data_batch_1 ... 5 (CIFAR-10) nor train and test (CIFAR-100)")
    batches = [_unpickle(path) for path in _files(folder, split_name(split, ("train", "test")))]
    key, names = (b"fine_labels", b"fine_label_names") if (folder / "meta").exists() else (b"labels", b"label_names")
    try:
        meta = _unpickle(folder / ("meta" if key == b"fine_labels" else "batches.meta"))
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [int(label) for batch in batches for label in batch[key]]
        found = [name.decode() for name in meta[names]]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not the python version of CIFAR: {error!r}") from None
    if pixels.dtype != np.uint8 or len(labels) != len(pixels) or not set(labels) <= set(range(len(found))):
        raise UserError(f"{folder}: not the python version of CIFAR: {len(pixels)} images, {len(labels)} labels")
    return np.ascontiguousarray(pixels), labels, found


def _files(folder: Path, split: str) -> list[Path]:
    if (folder / "data_batch_1").is_file():
        return sorted(folder.glob("data_batch_[0-9]")) if split == "train" else [folder / "test_batch"]
    return [folder / split] if (folder / split).is_file() and (folder / "meta").is_file() else []


class _ArraysOnly(pickle.Unpickler):
    """Makes containers, numbers, text and numpy arrays; whatever else a pickle asks for could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "_reconstruct": np._core.multiarray._reconstruct,
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": _latin1,  # how Python 3 writes bytes for Python 2
        }
        modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs")
        if module in modules and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _latin1(text: str, codec: str) -> bytes:
    return text.encode("latin1")


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            values = _ArraysOnly(file, encoding="bytes").load()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # damaged pickles fail in every way
        raise UserError(f"{path}: not a file of CIFAR's python version: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a file of CIFAR's python version")
    return values
