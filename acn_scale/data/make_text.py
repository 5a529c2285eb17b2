"""Documents of any source -> packed token sequences, a training and an evaluation part."""

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from tqdm import tqdm

from acn_scale.data.make import Making, in_order
from acn_scale.data.shards import ShardIndex
from acn_scale.data.storage import Shard
from acn_scale.data.tar import Table
from acn_scale.data.text_sources import Counts, TextSources, split_documents
from acn_scale.data.tokenizer import (
    CLS,
    MASK,
    SEP,
    TOKENIZER_NAME,
    load_tokenizer,
    read_record,
    sample_documents,
    train_tokenizer,
)
from acn_scale.errors import UserError

ROWS_PER_RECORD = 64  # token sequences in one .npy record
CHUNK = 2**20  # characters that a worker tokenizes at a time
EVAL_SHARE = 0.01  # of the documents, drawn by their hash

Chunk = tuple[list[str], list[str]]  # documents for training and for evaluation


def train_source_tokenizer(
    sources: TextSources,
    vocab_size: int,
    folder: Path,
    *,
    model: Literal["unigram", "bpe"] = "unigram",
    sample_mb: float = 200.0,
    character_coverage: float = 0.9995,
    eval_share: float = EVAL_SHARE,
) -> Path:
    """Train the tokenizer on a random sample of the training documents, `sample_mb` million characters at most."""
    counts = Counts()
    documents = (text for held_out, text in _progress(split_documents(sources, eval_share, counts)) if not held_out)
    sample = sample_documents(documents, int(sample_mb * 1e6), _hash)
    if not sample:
        raise UserError(f"--source {' '.join(sources.names)}: holds no text to train on")
    size = f"{len(sample):,} of {counts.train:,} documents, {sum(map(len, sample)) / 1e6:.1f} million characters"
    print(f"training {vocab_size:,} pieces on {size}; SentencePiece says nothing until it ends", file=sys.stderr)
    record = {"source": list(sources.names), "weights": sources.weights, "vocab_size": vocab_size, "model": model}
    record |= {"eval_share": eval_share, "sample_characters": sum(map(len, sample)), "sample_documents": len(sample)}
    return train_tokenizer(
        sample, vocab_size, folder, model=model, character_coverage=character_coverage, record=record
    )


def _hash(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[16:24])


def _progress(documents: Iterator[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
    with tqdm(desc="reading", unit="character", unit_scale=True) as bar:
        for item in documents:
            bar.update(len(item[1]))
            yield item


def make_text_shards(
    sources: TextSources,
    tokenizer_folder: Path,
    folder: Path,
    *,
    tokens: int = 128,
    shard_size: int = 8192,
    eval_share: float | None = None,
    workers: int = 1,
) -> dict[str, ShardIndex]:
    """Write folder/train and folder/eval: sequences [CLS] text [SEP] of `tokens` ids without padding, .npy records of
    64 sequences each. Documents follow one another, parted by [SEP]; the last tokens, too few for a sequence, are left
    out. `eval_share` of the documents are for evaluation; by default as when the tokenizer was trained.

    The same shards come whatever `workers` is. Raises UserError.
    """
    if tokens < 3:
        raise UserError(f"--tokens {tokens}: must be 3 or more, for [CLS], [SEP] and what is between them")
    tokenizer = load_tokenizer(tokenizer_folder)
    eval_share = _eval_share(eval_share, tokenizer_folder)
    model = (Path(tokenizer_folder) / TOKENIZER_NAME).read_bytes()
    plan = {"source": list(sources.names), "weights": sources.weights, "column": sources.column, "tokens": tokens}
    plan |= {"files": sources.identity()}  # shards of an earlier run are of no use where the text is another
    plan |= {"shard_size": shard_size, "eval_share": eval_share, "tokenizer": hashlib.sha256(model).hexdigest()}
    names = ("train", "eval") if eval_share > 0 else ("train",)

    def tokenize(chunk: Chunk) -> list[np.ndarray]:
        return [_token_stream(tokenizer, documents) for documents in chunk]

    counts = Counts()
    with ExitStack() as stack:
        makings = [stack.enter_context(Making(folder / name, plan | {"split": name})) for name in names]
        if not all(making.index for making in makings):
            packings = [Packing(making, tokens, shard_size) for making in makings]
            first = min(packing.chunk for packing in packings)
            chunks = islice(_chunks(_progress(split_documents(sources, eval_share, counts))), first, None)
            for number, parts in enumerate(in_order(tokenize, chunks, workers), first):
                for packing, part in zip(packings, parts, strict=False):
                    packing.add(number, part)
            shards = [packing.close() for packing in packings]
            for name, made in zip(names, shards, strict=True):
                if not made:
                    for making in makings:
                        making.discard()
                    raise UserError(f"--eval-share {eval_share}: leaves less than {tokens} tokens for {name}")
            occurring = [piece_counts(folder / name, made, tokenizer) for name, made in zip(names, shards, strict=True)]
            for making, made, pieces in zip(makings, shards, occurring, strict=True):
                shutil.copyfile(Path(tokenizer_folder) / TOKENIZER_NAME, making.folder / TOKENIZER_NAME)
                info = {"kind": "text", "source": list(sources.names), "split": making.folder.name, "tokens": tokens}
                info |= {"vocab_size": tokenizer.vocab_size(), "rows_per_record": ROWS_PER_RECORD}
                info |= {"unigram_loss": unigram_loss(occurring[0], pieces), "documents": asdict(counts)}
                if making.index is None:
                    making.finish(made, info)
        return {making.folder.name: making.index for making in makings}


def _eval_share(given: float | None, tokenizer_folder: Path | None) -> float:
    """As the tokenizer was trained, unless it is given: no text that it was trained on is for evaluation."""
    if given is not None:
        return given
    return (read_record(tokenizer_folder) if tokenizer_folder else {}).get("eval_share", EVAL_SHARE)


def _token_stream(tokenizer: sentencepiece.SentencePieceProcessor, documents: list[str]) -> np.ndarray:
    """The ids of documents one after another, with [SEP] after each, in the smallest type that holds them."""
    ids = tokenizer.EncodeAsIds(documents, num_threads=1) if documents else []
    dtype = np.uint16 if tokenizer.vocab_size() <= 2**16 else np.uint32
    return np.array([piece for document in ids for piece in (*document, SEP)], dtype)


def _chunks(documents: Iterable[tuple[bool, str]]) -> Iterator[Chunk]:
    """Documents by the million characters or so; where a chunk ends depends on nothing but them."""
    chunk: Chunk = ([], [])
    size = 0
    for held_out, text in documents:
        chunk[held_out].append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = ([], []), 0
    yield chunk


class Packing:
    """Turns one part's stream of tokens into shards, from where an earlier run stopped.

    All shards but the last hold the same number of tokens, so that a shard's place in the stream is known. With each
    one is noted in which chunk of documents it ends, and how many tokens come before that chunk.
    """

    def __init__(self, making: Making, tokens: int, shard_size: int) -> None:
        self.making, self.tokens = making, tokens
        self.records = max(1, shard_size // ROWS_PER_RECORD)  # in a shard
        self.span = self.records * ROWS_PER_RECORD * (tokens - 2)  # tokens of the stream in a shard
        self.shards: list[Shard] = []
        self.chunk, self.seen = 0, 0  # the chunk that comes next, and the tokens before it
        self.rest = np.zeros(0, np.uint16)  # not written yet
        if making.index:
            self.shards, self.chunk = making.index.shards, sys.maxsize
        else:
            while done := making.done(len(self.shards)):
                self.shards.append(done[0])
                self.chunk, self.seen = done[1]["chunk"], done[1]["before"]

    def add(self, chunk: int, part: np.ndarray) -> None:
        """The part's tokens in a chunk of documents; chunks come in order."""
        if chunk < self.chunk:
            return
        before, written = self.seen, len(self.shards) * self.span
        self.seen += len(part)
        self.rest = np.concatenate([self.rest, part[max(0, written - before) :]])
        while len(self.rest) >= self.span:
            self._write(self.rest[: self.span], {"chunk": chunk, "before": before})
            self.rest = self.rest[self.span :]
        self.last = {"chunk": chunk, "before": before}

    def close(self) -> list[Shard]:
        """Write what is left, but for the tokens that fill no sequence. Returns all shards."""
        if len(self.rest) >= self.tokens - 2:
            self._write(self.rest, self.last)
        return self.shards

    def _write(self, stream: np.ndarray, notes: dict[str, int]) -> None:
        number = len(self.shards)
        sequences = pack(stream, self.tokens)
        records = (
            {"__key__": f"{number * self.records + start // ROWS_PER_RECORD:08d}", "npy": rows}
            for start in range(0, len(sequences), ROWS_PER_RECORD)
            for rows in [sequences[start : start + ROWS_PER_RECORD]]
        )
        shard = self.making.write(number, records)
        self.making.record(number, shard, notes)
        self.shards.append(shard)


def pack(stream: np.ndarray, tokens: int) -> np.ndarray:
    """Full sequences [CLS] text [SEP]: (sequences, tokens). The last tokens, too few for a sequence, are left out."""
    body = tokens - 2
    rows = stream[: len(stream) // body * body].reshape(-1, body)
    return np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))


def piece_counts(folder: Path, shards: list[Shard], tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """How often each piece occurs in the sequences, the special ones left out: (vocab_size,)."""
    counts = np.zeros(tokenizer.vocab_size(), dtype=np.int64)
    for shard in tqdm(shards, desc=f"counting pieces of {folder.name}", unit="shard", leave=False):
        table = Table(folder / shard.name, shard.table)
        for record in range(len(table.places)):
            array = np.load(BytesIO(table.read(record)["npy"]))
            counts += np.bincount(array.reshape(-1), minlength=len(counts))
    counts[: MASK + 1] = 0
    return counts


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Cross-entropy (nats a token) on `held_out` of predicting each piece by its share of `train`, add-one smoothed;
    both are counts of pieces. What a masked language model must beat: the best guess that ignores the context."""
    shares = (train + 1) / (train + 1).sum()
    return float(-(held_out * np.log(shares)).sum() / held_out.sum())


def describe_text(
    sources: TextSources, eval_share: float | None, tokenizer_folder: Path | None = None, tokens: int = 128
) -> str:
    """What the first documents of the sources are like, up to ten million characters. Raises UserError."""
    counts, first, parts = Counts(), "", ([], [])
    eval_share = _eval_share(eval_share, tokenizer_folder)
    for held_out, text in split_documents(sources, eval_share, counts):
        first = first or text
        parts[held_out].append(text)
        if sum(counts.characters.values()) > 10e6:
            break
    total = sum(counts.characters.values())
    lines = [f"{counts.read} documents read, {counts.duplicates} duplicates; {counts.train} train, {counts.eval} eval"]
    lines += [f"{name}: {characters:,} characters" for name, characters in counts.characters.items()]
    if tokenizer_folder and total:
        tokenizer = load_tokenizer(tokenizer_folder)
        found = [len(_token_stream(tokenizer, part)) for part in parts]
        lines.append(
            f"{total / max(1, sum(found)):.2f} characters a token; {found[0] // (tokens - 2)} sequences of "
            f"{tokens} for training, {found[1] // (tokens - 2)} for evaluation"
        )
    return "\n".join([*lines, f"The first document: {first[:200]!r}"])
