"""Text as people have it -> documents: each once, on one side of the split, several sources mixed by weight."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from acn_scale.data.sources import files_identity, find_files, find_source, load_hugging_face, text_lines
from acn_scale.errors import UserError

# The hub's bookcorpus has a sentence in each row: so many in a row make up a document.
ROWS_PER_DOCUMENT = {"bookcorpus": 256, "bookcorpus/bookcorpus": 256}


@dataclass(frozen=True)
class TextSources:
    """What to read. `weights` are shares of the characters; without them, all documents of all sources are read."""

    names: Sequence[str]
    weights: Sequence[float] | None = None
    column: str = "text"  # of JSONL, Parquet and Hugging Face rows
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.names):
            raise UserError(f"--weights: {len(self.weights)} of them for {len(self.names)} sources")
        if self.weights is not None and not all(0 < weight < float("inf") for weight in self.weights):
            raise UserError(f"--weights {' '.join(map(str, self.weights))}: must be above 0")
        for name in self.names:
            find_source(name, TEXT_SOURCES)

    def documents(self) -> Iterator[tuple[int, str]]:
        """(source, document), in an order that depends on nothing else."""
        readers = [self._read(name) for name in self.names]
        if self.weights is None:
            for number, reader in enumerate(readers):
                yield from ((number, document) for document in reader)
            return
        taken = [0] * len(readers)
        while True:  # whoever is furthest behind its share; until one has no more, so that the shares hold
            number = min(range(len(readers)), key=lambda each: (taken[each] / self.weights[each], each))
            document = next(readers[number], None)
            if document is None:
                return
            taken[number] += len(document)
            yield number, document

    def identity(self) -> str:
        """Of the files that are read, by their names and sizes. (Data sets of the hub have versions of their own.)"""
        kinds = [name.partition(":") for name in self.names]
        return files_identity(path for kind, _, rest in kinds if kind in FILES for path in find_files(rest))

    def _read(self, name: str) -> Iterator[str]:
        opener, rest = find_source(name, TEXT_SOURCES)
        return (document for document in opener(rest, self) if document.strip())


@dataclass
class Counts:
    """What became of the documents of all sources."""

    read: int = 0
    duplicates: int = 0
    train: int = 0
    eval: int = 0
    characters: dict[str, int] = field(default_factory=dict)  # by source, without duplicates


def split_documents(sources: TextSources, eval_share: float, counts: Counts) -> Iterator[tuple[bool, str]]:
    """(whether it is for evaluation, document): exact duplicates left out, all counted; half characters become "?".

    A document's own hash decides on its side, so that it never changes it, whatever it comes with. The hashes of all
    documents are kept, in about 100 bytes each.
    """
    seen: set[int] = set()
    for number, document in sources.documents():
        encoded = document.encode(errors="replace")  # JSON can hold half of a surrogate pair, which no tokenizer takes
        digest = hashlib.sha256(encoded).digest()
        counts.read += 1
        identity = int.from_bytes(digest[8:16])
        if identity in seen:
            counts.duplicates += 1
            continue
        seen.add(identity)
        name = sources.names[number]
        counts.characters[name] = counts.characters.get(name, 0) + len(document)
        held_out = int.from_bytes(digest[:8]) / 2**64 < eval_share
        if held_out:
            counts.eval += 1
        else:
            counts.train += 1
        yield held_out, encoded.decode()


def plain_text(rest: str, sources: TextSources) -> Iterator[str]:
    """Documents with blank lines between them; or WikiExtractor's <doc ...> ... </doc>, whole with blank lines."""
    for path in find_files(rest):
        lines: list[str] = []
        inside = False
        for line in text_lines(path):
            if line.startswith("<doc "):
                inside = True
            elif line.startswith("</doc>"):
                inside = False
            elif line.strip() or inside:
                lines.append(line)
                continue
            if lines:
                yield "".join(lines)
                lines = []
        if lines:
            yield "".join(lines)


def json_lines(rest: str, sources: TextSources) -> Iterator[str]:
    for path in find_files(rest):
        for number, line in enumerate(text_lines(path), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}: line {number}: not JSON: {error}") from None
                yield _text(row, sources.column, f"{path}: line {number}")


def parquet(rest: str, sources: TextSources) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in find_files(rest):
        try:
            file = pq.ParquetFile(path)
            if sources.column not in file.schema_arrow.names:
                raise UserError(_no_column(path, sources.column, file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=256, columns=[sources.column]):
                yield from (_text({sources.column: value}, sources.column, path) for value in batch[0].to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def hugging_face(rest: str, sources: TextSources) -> Iterator[str]:
    data = load_hugging_face(rest, "train", streaming=sources.streaming)
    if data.features and sources.column not in data.features:
        raise UserError(_no_column(f"hf:{rest}", sources.column, data.features))
    rows = (_text(row, sources.column, f"hf:{rest}") for row in data)
    together = ROWS_PER_DOCUMENT.get(rest.partition(":")[0])
    if together is None:
        yield from rows
        return
    group: list[str] = []
    for row in rows:
        group.append(row)
        if len(group) == together:
            yield "\n".join(group)
            group = []
    yield "\n".join(group)


def _text(row: Any, column: str, where: Any) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    if isinstance(row, dict) and column in row and value is None:
        return ""  # a row without text
    raise UserError(_no_column(where, column, row if isinstance(row, dict) else []))


def _no_column(where: Any, column: str, names: Any) -> str:
    return f"{where}: no text in {column!r}; --column must name one of {', '.join(map(str, names)) or 'its keys'}"


def pydoc(rest: str, sources: TextSources) -> Iterator[str]:
    """The topics of Python's language reference, a document each."""
    from pydoc_data.topics import topics

    yield from topics.values()


TEXT_SOURCES: dict[str, Callable[[str, TextSources], Iterator[str]]] = {
    "text": plain_text,
    "jsonl": json_lines,
    "parquet": parquet,
    "hf": hugging_face,
    "pydoc": pydoc,
}
FILES = ("text", "jsonl", "parquet")  # the sources that are patterns of files
