"""Raw data -> shards: what the tools make_image_shards, train_tokenizer and make_text_shards call."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image
from tqdm import tqdm

from acn_scale.data import sources
from acn_scale.data.shards import INDEX_NAME, Shard, ShardIndex
from acn_scale.data.text import load_tokenizer, pack, train_tokenizer, unigram_loss

ROWS_PER_RECORD = 64  # token sequences in one .npy record
EVAL_SHARE = 0.1  # of the documents, drawn by their hash

IMAGE_SOURCES = {"digits": sources.digits}
TEXT_SOURCES = {"pydoc": sources.pydoc}


def make_image_shards(source: str, split: str, folder: Path, *, shard_size: int) -> ShardIndex:
    """Write the images of a source as PNG with their classes. The index holds the pixels' mean and deviation."""
    images = list(IMAGE_SOURCES[source](split))
    pixels = np.stack([image for image, _ in images]) / 255
    classes = sorted({label for _, label in images})
    info = {
        "kind": "images",
        "source": source,
        "split": split,
        "classes": [str(label) for label in classes],
        "mean": [float(pixels.mean())],
        "std": [float(pixels.std())],
    }
    records = (
        {"__key__": f"{number:08d}", "png": _png(image), "cls": str(label).encode()}
        for number, (image, label) in enumerate(tqdm(images, desc=f"{folder}", unit="image"))
    )
    return write_shards(records, folder, records_per_shard=shard_size, info=info)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def train_source_tokenizer(source: str, vocab_size: int, folder: Path) -> Path:
    """Train the tokenizer on a source's training documents."""
    return train_tokenizer(source_documents(source, "train"), vocab_size, folder)


def make_text_shards(
    source: str, split: str, tokenizer_folder: Path, folder: Path, *, tokens: int, shard_size: int
) -> ShardIndex:
    """Write packed sequences of `tokens` ids as .npy records. The index holds the loss of guessing by frequency."""
    tokenizer = load_tokenizer(tokenizer_folder)
    train = list(pack(source_documents(source, "train"), tokenizer, tokens))
    sequences = train if split == "train" else list(pack(source_documents(source, split), tokenizer, tokens))
    info = {
        "kind": "text",
        "source": source,
        "split": split,
        "tokens": tokens,
        "vocab_size": tokenizer.vocab_size(),
        "unigram_loss": unigram_loss(train, sequences, tokenizer.vocab_size()),
    }
    groups = [sequences[start : start + ROWS_PER_RECORD] for start in range(0, len(sequences), ROWS_PER_RECORD)]
    records = (
        {"__key__": f"{number:08d}", "npy": np.stack(group)}
        for number, group in enumerate(tqdm(groups, desc=f"{folder}", unit="record"))
    )
    records_per_shard = max(1, shard_size // ROWS_PER_RECORD)
    return write_shards(
        records, folder, records_per_shard=records_per_shard, rows_per_record=ROWS_PER_RECORD, info=info
    )


def source_documents(source: str, split: str) -> Iterator[str]:
    """The documents of a split. A document's own hash decides, so that it never changes sides."""
    for document in TEXT_SOURCES[source]():
        share = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) / 2**64
        if (share < EVAL_SHARE) == (split == "eval"):
            yield document


def write_shards(
    records: Iterable[dict[str, Any]],
    folder: Path,
    *,
    records_per_shard: int,
    rows_per_record: int = 1,
    info: dict[str, Any],
) -> ShardIndex:
    """Write webdataset records as shards and, last of all, their index, without which the folder counts as unfinished.

    A record is {"__key__": str, extension: bytes or what webdataset encodes}; with several rows to a record, the
    rows of its ".npy" array are its samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    shards = []
    for number, group in enumerate(_groups(records, records_per_shard)):
        name = f"shard-{number:06d}.tar"
        temporary = folder / (name + ".tmp")
        with wds.TarWriter(str(temporary), mtime=0) as tar:
            for record in group:
                tar.write(record)
        samples = sum(len(record["npy"]) if rows_per_record > 1 else 1 for record in group)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        shards.append(Shard(name, samples, temporary.stat().st_size, digest))
        temporary.rename(folder / name)
    index = ShardIndex(folder, shards, {**info, "rows_per_record": rows_per_record})
    index.save()
    return index


def _groups(records: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    group = []
    for record in records:
        group.append(record)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
