"""An epoch of fine-tuning an encoder on sentences, as of SST-2, beside Transformers' Trainer."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from acn_scale.benchmark import work
from acn_scale.benchmark.loop import our_loop
from acn_scale.benchmark.model import describe
from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import Side, beside
from acn_scale.benchmark.trainer import TRAINER, trainer_loop
from acn_scale.data import glue_sources
from acn_scale.data.make_glue import write_split
from acn_scale.data.tasks import TASKS
from acn_scale.data.text_sources import TextSources
from acn_scale.errors import UserError

TASK = "sst2"
SENTENCES = 1024  # of an epoch: as many seconds on one core as two sides of a round may take
BATCH = 32


def finetuning(text: Path | None, glue: Path | None, rounds: int, scale: work.Scale) -> Iterator[Row]:
    """Seconds of a step, over a whole epoch. Both put sentences of like length into a batch and pad it to its longest.

    `text` is as for model_rows; of `glue`, official TSV files, the first sentences of SST-2 are taken, without it some
    of pydoc's. Raises UserError.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = text or work.pydoc_shards(folder / "text", scale.encoder.max_tokens)
        rows = official_sentences(glue) if glue else pydoc_sentences(SENTENCES)
        for split in ("train", "eval"):
            write_split(folder / split, rows, {"task": TASK, "split": split, "classes": TASKS[TASK].labels})
        peer = work.write_peer("hf", scale.encoder, folder / "peer", shards)
        steps = len(rows) // BATCH + 1  # the first one is not timed
        here = replace(scale, compile=False)  # batches are of many lengths
        cfg = work.config(scale.encoder, folder, folder, here, batch=BATCH, steps=steps, tokenizer=str(peer))
        sides = {"ours": Side(our_loop, cfg), TRAINER: Side(trainer_loop, cfg, peer, folder / "trainer")}
        work_of = (
            f"fine-tuning on {'SST-2' if glue else 'sentences'}, an epoch of {len(rows):,}, {describe(scale.encoder)}"
        )
        yield from beside(f"{work_of} batch {BATCH}", sides, rounds)


def official_sentences(folder: Path) -> Sequence[glue_sources.Row]:
    """The first of SST-2. Raises UserError."""
    lines = glue_sources.read_split(f"tsv:{folder}", TASK, TASKS[TASK], "train")
    if lines is None:
        raise UserError(f"--glue {folder}: has no {TASKS[TASK].folder}/{TASKS[TASK].splits['train']}")
    return lines.rows[:SENTENCES]


def pydoc_sentences(number: int) -> Sequence[glue_sources.Row]:
    """The clauses of Python's language reference, whose lengths are about those of SST-2; labels by their lengths."""
    documents = (" ".join(document.split()) for _, document in TextSources(["pydoc"]).documents())
    clauses = (clause for document in documents for clause in re.split(r"(?<=[.,:;]) ", document))
    chosen = [clause for clause in clauses if 2 <= len(clause.split()) <= 50][:number]
    return [glue_sources.Row((clause,), float(len(clause) % 2), str(row)) for row, clause in enumerate(chosen)]
