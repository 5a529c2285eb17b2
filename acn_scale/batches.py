"""A run's batch of one step, built again alone, for people to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from matplotlib.figure import Figure

from acn_scale.cli import load_config
from acn_scale.config import ImageDataConfig, TextDataConfig
from acn_scale.data import build_stream
from acn_scale.data.samples import Batch, Samples
from acn_scale.data.sentences import SentenceDecoder
from acn_scale.data.text import shards_tokenizer
from acn_scale.errors import UserError
from acn_scale.runs import read_config
from acn_scale.tables import aligned

COLUMNS = 8  # of the contact sheet


def inspect_batch(
    source: Path, step: int, *, overrides: Sequence[str] = (), out: Path | None = None, most: int = 64
) -> str:
    """Write what the first `most` samples of an optimizer step look like as the model sees them: a contact sheet, or
    text with masks marked. Returns a table of them. Step 1 is the first, as in metrics.jsonl.

    `source` is a run's folder or a config. Raises UserError for one that is neither, and for data that cannot be read.
    """
    cfg = read_config(source) if source.is_dir() else load_config(source, overrides)
    stream = build_stream(cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": None})}))
    samples, size, first = stream.samples, stream.plan.size(step - 1), stream.plan.start(step - 1)
    most = min(size, -(-most // cfg.data.group) * cfg.data.group)  # pairs stay together
    loaded = [_load(samples, position) for position in range(first, first + most)]
    keys = [key for key, _, _ in loaded]
    batch = samples.decoder.finish(samples.decoder.collate([sample for _, sample, _ in loaded], keys))
    text = not isinstance(cfg.data, ImageDataConfig)
    folder = source / "report" if source.is_dir() else Path()
    out = out or folder / f"batch_{step:08d}.{'txt' if text else 'png'}"
    if text:
        masked = isinstance(cfg.data, TextDataConfig)
        lines = (
            marked(batch, shards_tokenizer(samples.index, cfg.data)) if masked else sequences(batch, samples.decoder)
        )
        picture = "\n\n".join(f"sample {key.sample}: {line}" for key, line in zip(keys, lines, strict=True)) + "\n"
    else:
        picture = contact_sheet(batch, [key.sample for key in keys], samples)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, str):
            out.write_text(picture, encoding="utf-8")
        else:
            picture.savefig(out, dpi=100)
    except (OSError, ValueError) as error:  # a folder that is closed, a kind of picture that is not known
        raise UserError(f"--out {out}: {error}") from None
    return f"{_table(samples, loaded, batch)}\n\nstep {step}, {most} of {size} samples: {out}"


def _load(samples: Samples, position: int) -> tuple[Any, Any, list[Any]]:
    """(key, sample, faults of the samples that it stands in for)."""
    found, faults, mistake = samples.load(position)
    if found is None:
        raise UserError(mistake or str(faults[-1]))
    return *found, faults


def _table(samples: Samples, loaded: list[tuple[Any, Any, list[Any]]], batch: Batch) -> str:
    rows = [["row", "epoch", "sample", "shard", "number", "key", "label", ""]]
    labels = batch["labels"].tolist() if batch["labels"].ndim == 1 else None
    for number, (key, _, faults) in enumerate(loaded):
        shard, place = samples.place(key.sample)
        name = samples.reader.key(shard, place // samples.rows)
        label = f"{labels[number]:g}" if labels else ""
        note = f"stands in for {faults[0]}" if faults else ""
        values = number, key.epoch, key.sample, samples.index.shards[shard].name, place, name, label, note
        rows.append([str(value) for value in values])
    return aligned(rows, numbers=False)


def contact_sheet(batch: Batch, ids: list[int], samples: Samples) -> Figure:
    """The images with their sample ids and classes; of mixed ones the two classes and their shares."""
    names = samples.index.info["classes"]
    rows = -(-len(ids) // COLUMNS)
    figure = Figure(figsize=(1.6 * COLUMNS, 1.9 * rows), layout="constrained")
    pixels = samples.decoder.pixels(batch["images"]).permute(0, 2, 3, 1).numpy()
    axes = figure.subplots(rows, COLUMNS, squeeze=False).reshape(-1)
    for number, place in enumerate(axes):
        place.set_axis_off()
        if number < len(ids):
            place.imshow(pixels[number].squeeze(), cmap="gray", vmin=0, vmax=255)
            place.set_title(f"{ids[number]}\n{_label(batch['labels'][number].numpy(), names)}", fontsize=6)
    return figure


def _label(label: np.ndarray, names: list[str]) -> str:
    if label.ndim == 0:
        return names[int(label)][:24]
    return " + ".join(f"{names[number][:12]} {label[number]:.2f}" for number in np.flatnonzero(label))


def marked(batch: Batch, tokenizer: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Each sequence as text. What is to be predicted stands as [true piece -> what the model sees]."""
    texts = []
    for tokens, masked, labels in zip(*(batch[name].tolist() for name in ("tokens", "masked", "labels")), strict=True):
        pieces = [tokenizer.IdToPiece(token) for token in tokens]
        for place, label in zip(masked, labels, strict=True):
            pieces[place] = f"\u2581[{tokenizer.IdToPiece(label)} -> {pieces[place]}]".replace("[\u2581", "[")
        texts.append("".join(pieces).replace("\u2581", " ").strip())
    return texts


def sequences(batch: Batch, decoder: SentenceDecoder) -> list[str]:
    """Each sequence as its pieces, without padding."""
    rows = zip(batch["tokens"].tolist(), batch["mask"].sum(dim=1).tolist(), strict=True)
    return [" ".join(decoder.encoder.pieces(tokens[:length])) for tokens, length in rows]
