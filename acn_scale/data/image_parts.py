"""Sources of images that lie many to a file: Parquet's row groups, webdataset's tars."""

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acn_scale.data.classes import class_names, class_number
from acn_scale.data.raw_images import EXTENSIONS, RandomAccess, RawImage
from acn_scale.data.sources import files_identity, find_files
from acn_scale.data.tar import Table
from acn_scale.errors import BadData, UserError


@dataclass
class Parts(RandomAccess):
    """Images in files that each hold many: finds the file of each and leaves reading these to others, once for all the
    images that are asked for."""

    classes: Sequence[str]
    identity: str
    sizes: Sequence[int]  # images in each part
    read_part: Callable[[int, Sequence[int]], Iterator[RawImage]]  # the images of these rows of a part
    labels_of: Callable[[int], Iterable[int]]  # all of a part

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.size = self.starts.pop()

    @property
    def labels(self) -> list[int]:
        return [label for part in range(len(self.sizes)) for label in self.labels_of(part)]

    def pick(self, indices: Sequence[int]) -> Iterator[RawImage]:
        for part, group in itertools.groupby(indices, lambda index: bisect.bisect_right(self.starts, index) - 1):
            yield from self.read_part(part, [index - self.starts[part] for index in group])


def parquet(rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> Parts:
    """Parquet files with a column of image bytes, or of the structs that Hugging Face writes, and one of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = find_files(rest)
    groups: list[tuple[Path, int]] = []
    sizes: list[int] = []
    try:
        schema = pq.read_schema(paths[0])
        image, label, names = _columns(paths[0], schema)
        for path in paths:
            metadata = pq.read_metadata(path)
            groups += [(path, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if classes is None:
            classes = names or _values_of_column(paths, label)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"parquet:{rest}: {str(error).splitlines()[0]}") from None
    numbers = {name: number for number, name in enumerate(classes)}

    def number(part: int, row: int, value: Any) -> int:
        path, group = groups[part]
        return class_number(value, numbers, f"{path.name}: row group {group}, row {row}")

    def read(part: int, rows: Sequence[int]) -> Iterator[RawImage]:
        path, group = groups[part]
        table = pq.ParquetFile(path).read_row_group(group, columns=[image, label])
        for row in rows:
            content, value = table[image][row].as_py(), table[label][row].as_py()
            content = content.get("bytes") if isinstance(content, dict) else content
            yield RawImage(content or b"", number(part, row, value), f"{path.stem}-{group}-{row}")

    def labels_of(part: int) -> Iterator[int]:
        path, group = groups[part]
        values = pq.ParquetFile(path).read_row_group(group, columns=[label])[label].to_pylist()
        return (number(part, row, value) for row, value in enumerate(values))

    return Parts(classes, files_identity(paths), sizes, read, labels_of)


def _columns(path: Path, schema: Any) -> tuple[str, str, list[str] | None]:
    """(image column, label column, class names where the file tells them)."""
    import pyarrow as pa

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})

    def is_image(field: Any) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field)]
    labels = [name for name in features if features[name].get("_type") == "ClassLabel"]
    labels += [name for name in ("label", "labels", "fine_label", "cls", "class") if name in schema.names]
    if not images or not labels:
        raise UserError(f"{path}: needs a column of image bytes and one named label; has {', '.join(schema.names)}")
    return images[0], labels[0], features.get(labels[0], {}).get("names")


def _values_of_column(paths: Sequence[Path], label: str) -> list[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    values = {value for path in paths for value in pc.unique(pq.read_table(path, columns=[label])[label]).to_pylist()}
    return class_names(values)


def webdataset(rest: str, split: str, classes: Sequence[str] | None, streaming: bool) -> Parts:
    """Webdataset tars with an image and a .cls (a class's number, or its name where `classes` are given)."""
    paths = find_files(rest)
    sizes, labels = [], set()
    for path in paths:
        try:
            table = Table(path)
        except BadData as error:
            raise UserError(f"{path}: {error}") from None
        sizes.append(len(table.places))
        if classes is None:
            labels |= {_label(table, record, path) for record in range(sizes[-1])}
    if classes is None and (words := [label for label in labels if not isinstance(label, int)]):
        raise UserError(f"wds:{rest}: label {words[0]!r}: --classes must name the classes in their order")
    numbers = {name: number for number, name in enumerate(classes or class_names(labels))}

    def number(table: Table, record: int, path: Path) -> int:
        return class_number(_label(table, record, path), numbers, f"{path}: {table.key(record)}")

    def read(part: int, records: Sequence[int]) -> Iterator[RawImage]:
        path = paths[part]
        table = Table(path)
        for record in records:
            label = number(table, record, path)
            try:
                files, problem = table.read(record), ""
            except BadData as error:
                files, problem = {}, str(error)
            extension = next((name for name in EXTENSIONS if name[1:] in files), "")
            yield RawImage(files.get(extension[1:], b""), label, table.key(record) + extension, problem)

    def labels_of(part: int) -> Iterator[int]:
        path = paths[part]
        table = Table(path)
        return (number(table, record, path) for record in range(sizes[part]))

    return Parts(list(numbers), files_identity(paths), sizes, read, labels_of)


def _label(table: Table, record: int, path: Path) -> int | str:
    try:
        files = table.read(record, only="cls") or table.read(record)
    except BadData as error:
        raise UserError(f"{path}: {table.key(record)}: {error}") from None
    if "cls" not in files:
        raise UserError(f"{path}: {table.key(record)}: has no .cls, but {', '.join(files)}")
    text = files["cls"].decode(errors="replace").strip()
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text
