"""The SentencePiece tokenizer: trained on a bounded sample of text, loaded again with what it was trained on."""

import heapq
import json
import signal
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from acn_scale.errors import UserError
from acn_scale.files import write_file

PAD, UNK, CLS, SEP, MASK = range(5)  # ids of the special pieces in every tokenizer
TOKENIZER_NAME = "tokenizer.model"
RECORD_NAME = "tokenizer.json"  # what it was trained on
LONGEST_LINE = 8192  # characters; SentencePiece takes no longer ones, so these are cut


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    folder: Path,
    *,
    model: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float = 0.9995,
    record: dict[str, Any] | None = None,
) -> Path:
    """Train a SentencePiece tokenizer (Kudo 2018, Sennrich et al. 2016) with [PAD] [UNK] [CLS] [SEP] [MASK] and write
    it to `folder`, with `record` beside it. Raises UserError where the text is too small for the vocabulary."""
    if vocab_size <= MASK + 1:
        raise UserError(f"--vocab-size {vocab_size}: must be more than the {MASK + 1} special pieces")
    buffer = BytesIO()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait until SentencePiece has ended
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=buffer,
            vocab_size=vocab_size,
            model_type=model,
            character_coverage=character_coverage,
            max_sentence_length=4 * LONGEST_LINE,  # bytes
            pad_id=PAD,
            unk_id=UNK,
            bos_id=CLS,
            eos_id=SEP,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            control_symbols=["[MASK]"],
            num_threads=1,  # more give other pieces from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]  # without the place in SentencePiece's source
        raise UserError(f"--vocab-size {vocab_size}: {reason}") from None
    finally:
        signal.signal(signal.SIGINT, interrupt)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    write_file(folder / RECORD_NAME, json.dumps(record or {}, indent=1).encode())
    return write_file(folder / TOKENIZER_NAME, buffer.getvalue())


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in document.splitlines():
            if line.strip():
                yield from (line[start : start + LONGEST_LINE] for start in range(0, len(line), LONGEST_LINE))


def sample_documents(documents: Iterable[str], characters: int, hash_of: Any) -> list[str]:
    """Those with the lowest hashes, `characters` in sum: a fair draw, the same in any order of the documents."""
    heap: list[tuple[int, int, str]] = []  # the highest hash first
    total = 0
    for number, document in enumerate(documents):
        heapq.heappush(heap, (-hash_of(document), number, document))
        total += len(document)
        while total > characters and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2])
    return [document for _, _, document in sorted(heap, key=lambda item: item[1])]


def load_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Raises UserError where the folder holds no tokenizer of ours."""
    path = Path(folder) / TOKENIZER_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; tools/train_tokenizer.py writes it")
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:
        raise UserError(f"{path}: not a SentencePiece model") from None
    if tokenizer.PieceToId("[MASK]") != MASK:
        raise UserError(f"{path}: has no [MASK] at id {MASK}; tools/train_tokenizer.py makes one that does")
    return tokenizer


def read_record(folder: Path) -> dict[str, Any]:
    """What the tokenizer in a folder was trained on; empty where nothing tells."""
    try:
        return json.loads((Path(folder) / RECORD_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
