"""Packed token sequences -> masked-language-model batches."""

from io import BytesIO

import numpy as np
import sentencepiece
import torch

from acn_scale.config import BertConfig, TextDataConfig
from acn_scale.data.samples import Batch, Decoder, Key
from acn_scale.data.shards import ShardIndex
from acn_scale.data.storage import read_file
from acn_scale.data.tokenizer import MASK, TOKENIZER_NAME
from acn_scale.errors import BadData, UserError


class TextDecoder(Decoder):
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
        self.starts_word = _word_starts(shards_tokenizer(index, cfg)) if cfg.whole_words else None

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


def shards_tokenizer(index: ShardIndex, cfg: TextDataConfig) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer that lies beside shards. Raises UserError where there is none."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(read_file(str(index.folder), TOKENIZER_NAME, cfg.remote))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{index.folder}/{TOKENIZER_NAME}: {error}; tools/make_text_shards.py writes it") from None
    return tokenizer


def _word_starts(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """For each piece whether a word starts with it; so do the special ones. (pieces,) bool."""
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
