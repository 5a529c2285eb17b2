"""Text -> packed token sequences -> masked-language-model batches."""

from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from acn_scale.config import BertConfig, TextDataConfig
from acn_scale.data.shards import ShardIndex
from acn_scale.data.storage import read_file
from acn_scale.data.stream import Batch, Key
from acn_scale.errors import BadData, UserError

PAD, UNK, CLS, SEP, MASK = range(5)  # ids of the special pieces in every tokenizer
TOKENIZER_NAME = "tokenizer.model"


def train_tokenizer(documents: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a SentencePiece unigram tokenizer. Raises UserError where the text is too small for the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    model = BytesIO()
    lines = (line for document in documents for line in document.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=1.0,
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
        raise UserError(f"--vocab-size {vocab_size}: {str(error).splitlines()[-1]}") from None
    path = folder / TOKENIZER_NAME
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(model.getvalue())
    temporary.rename(path)
    return path


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


def pack(
    documents: Iterable[str], tokenizer: sentencepiece.SentencePieceProcessor, tokens: int
) -> Iterator[np.ndarray]:
    """Full sequences [CLS] text [SEP] of `tokens` ids without padding; documents follow one another, parted by [SEP].

    The last tokens, too few for a sequence, are left out.
    """
    dtype = np.uint16 if tokenizer.vocab_size() <= 2**16 else np.uint32
    body = tokens - 2
    buffer: list[int] = []
    for document in documents:
        buffer += [*tokenizer.EncodeAsIds(document), SEP]
        whole = len(buffer) - len(buffer) % body
        for start in range(0, whole, body):
            yield np.array([CLS, *buffer[start : start + body], SEP], dtype)
        del buffer[:whole]


def unigram_loss(train: Iterable[np.ndarray], held_out: Iterable[np.ndarray], vocab_size: int) -> float:
    """Cross-entropy (nats a token) on `held_out` of predicting each piece by its share of `train`, add-one smoothed.

    What a masked language model must beat: it is the best guess that ignores the context.
    """

    def count(sequences: Iterable[np.ndarray]) -> np.ndarray:
        counts = Counter(int(token) for sequence in sequences for token in sequence if token > MASK)
        return np.array([counts[piece] for piece in range(vocab_size)], dtype=np.float64)

    shares = count(train) + 1
    target = count(held_out)
    return float(-(target * np.log(shares / shares.sum())).sum() / target.sum())


class TextDecoder:
    """Masks the token sequences of one split (Devlin et al. 2019): a fixed number of tokens in each sequence is to be
    predicted; 80 % of these become [MASK], 10 % a random piece, 10 % stay. [CLS], [SEP] and [PAD] are never chosen.

    With `whole_words`, words are chosen in random order until the number is reached; the last one may be chosen in
    part. A word starts at a piece with SentencePiece's mark for a space.
    """

    def __init__(self, cfg: TextDataConfig, model: BertConfig, index: ShardIndex) -> None:
        info = index.info
        if info.get("kind") != "text":
            raise UserError(f"{index.folder}: holds {info.get('kind')} shards; model.name = {model.name} takes text")
        if info["vocab_size"] > model.vocab_size:
            raise UserError(f"model.vocab_size = {model.vocab_size}: {index.folder} has {info['vocab_size']} pieces")
        if info["tokens"] > model.max_tokens:
            raise UserError(f"model.max_tokens = {model.max_tokens}: {index.folder} has sequences of {info['tokens']}")
        self.vocab_size, self.tokens = info["vocab_size"], info["tokens"]
        self.num_masked = max(1, round(cfg.mask_ratio * info["tokens"]))
        self.starts_word = _word_starts(index, cfg) if cfg.whole_words else None

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens with masks (tokens,), masked positions (masked,), their true ids (masked,)). Raises BadData."""
        tokens = self._tokens(files, row)
        random = key.generator()
        masked = np.sort(self._choose(tokens, random))
        labels = tokens[masked]
        draw = random.random(self.num_masked)
        pieces = random.integers(MASK + 1, self.vocab_size, self.num_masked)
        tokens[masked] = np.where(draw < 0.8, MASK, np.where(draw < 0.9, pieces, labels))
        return tokens, masked, labels

    def _tokens(self, files: dict[str, bytes], row: int) -> np.ndarray:
        try:
            tokens = _npy_row(files["npy"], row).astype(np.int64)
        except (KeyError, ValueError, OverflowError) as error:
            raise BadData(f"no row of token ids: {error}") from None
        if len(tokens) != self.tokens or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise BadData(f"not {self.tokens} token ids below {self.vocab_size}")
        return tokens

    def _choose(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        candidates = np.flatnonzero(tokens > MASK)
        if len(candidates) < self.num_masked:
            if len(candidates) == 0:
                raise BadData("no token that could be masked")
            return random.choice(candidates, self.num_masked, replace=True)
        if self.starts_word is None:
            return random.choice(candidates, self.num_masked, replace=False)
        words = np.cumsum(self.starts_word[tokens])
        turn = random.permutation(words[-1] + 1)  # of each word
        return candidates[np.argsort(turn[words[candidates]], kind="stable")[: self.num_masked]]

    def collate(self, samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], keys: list[Key]) -> Batch:
        """ "tokens" (batch, tokens), "masked" and "labels" (batch, masked)."""
        columns = zip(*samples, strict=True)
        names = ("tokens", "masked", "labels")
        return {name: torch.from_numpy(np.stack(column)) for name, column in zip(names, columns, strict=True)}


def _word_starts(index: ShardIndex, cfg: TextDataConfig) -> np.ndarray:
    """For each piece whether a word starts with it; so do the special ones. (pieces,) bool."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(read_file(str(index.folder), TOKENIZER_NAME, cfg.remote))
    except (OSError, RuntimeError) as error:
        raise UserError(f"data.whole_words: needs {index.folder}/{TOKENIZER_NAME}: {error}") from None
    pieces = (tokenizer.IdToPiece(piece) for piece in range(tokenizer.vocab_size()))
    return np.array([number <= MASK or piece.startswith("\u2581") for number, piece in enumerate(pieces)])


def _npy_row(buffer: bytes, row: int) -> np.ndarray:
    """One row of a 2-D .npy file in memory, without unpickling. Raises ValueError for anything else."""
    header = BytesIO(buffer[:256])
    version = np.lib.format.read_magic(header)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(header)
    if len(shape) != 2 or dtype.kind not in "ui" or fortran:
        raise ValueError("not a plain array of whole numbers, row by row")
    return np.frombuffer(buffer, dtype, count=shape[1], offset=header.tell() + row * shape[1] * dtype.itemsize)
