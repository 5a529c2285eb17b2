"""Labelled texts and pairs of texts -> padded batches."""

import json
from collections.abc import Callable

import numpy as np
import torch

from acn_scale.config import BertConfig, SentenceDataConfig
from acn_scale.data.encoders import load_encoder
from acn_scale.data.samples import Batch, Decoder, Key
from acn_scale.data.shards import ShardIndex
from acn_scale.errors import BadData, UserError

USUAL_TOKENS = 128  # of a sequence on GLUE
Sample = tuple[list[int], list[int], float]
TextNoise = Callable[[str, np.random.Generator], str]


class SentenceDecoder(Decoder):
    """Tokenizes the texts of one split, after `noise` has changed each, and pads a batch to its longest."""

    def __init__(
        self, cfg: SentenceDataConfig, model: BertConfig, index: ShardIndex, noise: TextNoise | None = None
    ) -> None:
        self.noise = noise
        info = index.info
        if info.get("kind") != "sentences":
            raise UserError(f"{index.folder}: holds {info.get('kind')} shards; data.kind = sentences takes sentences")
        classes = len(info["classes"]) or 1
        if classes != model.num_classes:
            what = f"{classes} classes" if info["classes"] else "numbers: model.num_classes must be 1"
            raise UserError(f"model.num_classes = {model.num_classes}: {index.folder} has {what}")
        self.encoder, self.classes = load_encoder(cfg.tokenizer), classes
        self.max_tokens = cfg.max_tokens or min(USUAL_TOKENS, model.max_tokens)
        if self.encoder.vocab_size > model.vocab_size:
            pieces = self.encoder.vocab_size
            raise UserError(f"data.tokenizer = {cfg.tokenizer}: {pieces} pieces; model.vocab_size = {model.vocab_size}")

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> Sample:
        """(token ids, segments, label; 0 where a test set has none). Raises BadData."""
        try:
            values = json.loads(files["json"])
            texts, label = tuple(values["texts"]), values["label"]
            if self.noise:
                random = key.generator()
                texts = tuple(self.noise(text, random) for text in texts)
            ids, segments = self.encoder.sequence(texts, self.max_tokens)
        except (KeyError, ValueError, TypeError) as error:
            raise BadData(f"no texts with a label: {error!r}") from None
        if label is not None and self.classes > 1 and label not in range(self.classes):
            raise BadData(f"label {label}: must be a class 0 to {self.classes - 1}")
        return ids, segments, 0.0 if label is None else float(label)

    def collate(self, samples: list[Sample], keys: list[Key]) -> Batch:
        """ "tokens", "segments" (batch, tokens), "mask" (batch, tokens), False at padding, and "labels" (batch,)."""
        lengths = torch.tensor([len(ids) for ids, _, _ in samples])
        shape = len(samples), int(lengths.max())
        tokens, segments = torch.full(shape, self.encoder.pad), torch.zeros(shape, dtype=torch.long)
        for row, (ids, parts, _) in enumerate(samples):
            tokens[row, : len(ids)], segments[row, : len(ids)] = torch.tensor(ids), torch.tensor(parts)
        mask = torch.arange(shape[1]) < lengths[:, None]
        labels = torch.tensor([label for *_, label in samples], dtype=torch.long if self.classes > 1 else torch.float)
        return {"tokens": tokens, "segments": segments, "mask": mask, "labels": labels}
