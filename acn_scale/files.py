"""Files that are there whole, or not at all."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from acn_scale.errors import UserError


def write_file(path: Path, content: bytes) -> Path:
    """Under a temporary name first, and on the disk, so that a kill or a power cut leaves what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary.replace(path)


def whole_lines(path: Path) -> list[str]:
    """Without a last one that a killed process left unfinished, or that one is just writing."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; none where there is no file."""
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def csv_lines(rows: Iterable[Sequence[object]], delimiter: str = ",") -> bytes:
    """A line for each row, its values between delimiters; None is empty."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Each is there whole, and none where not all can be written: what was there before then stays.

    Makes the folder. Raises UserError.
    """
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in temporary.items():
            path.write_bytes(files[name])
        for name, path in temporary.items():
            path.replace(folder / name)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror or error}") from None
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink()


def check_writable(out: Path, option: str = "--out") -> None:
    """Before an evaluation of hours."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"{option} {out}: {place} is no folder that can be written to")


def check_new(path: Path, option: str = "--out") -> None:
    """Whether new_folder(path) has a place."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{option} {path}: is there already; name a folder that is new or empty")
    check_writable(path, option)


@contextmanager
def new_folder(path: Path, option: str = "--out", *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that gets its name when the block ends, and is removed when it fails.

    With `replace`, it takes the place of a folder that holds nothing that it does not hold too. Raises UserError where
    there is something else under that name, or the folder cannot be written.
    """
    replace = replace and path.is_dir()
    if replace:
        check_writable(path, option)
    else:
        check_new(path, option)
    temporary = path.absolute().with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if replace:
            old, new = ({each.relative_to(folder) for each in folder.rglob("*")} for folder in (path, temporary))
            if other := sorted(old - new):
                raise UserError(f"{option} {path}: is there already, with {other[0]}, which would be lost; remove it, "
                                "or name a folder that is new or empty")  # fmt: skip
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
