"""The groups of rows by name. What a group needs is looked for before the first is measured."""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import need
from acn_scale.benchmark.work import Scale, scale
from acn_scale.distributed import local_device
from acn_scale.errors import UserError
from acn_scale.runs import read_config

PEERS = {
    "data": ["timm", "webdataset"],
    "model": ["transformers", "timm"],
    "loop": ["transformers", "accelerate"],
    "inference": [],
    "checkpoint": ["transformers", "accelerate"],
}


@dataclass(frozen=True)
class Inputs:
    """What users may name. Without it, something is made."""

    images: Path | None  # class folders of JPEGs
    text: Path | None  # text shards, train and eval
    glue: Path | None  # official TSV files
    runs: tuple[Path, Path]  # of an ACN and its twin
    mosaicml: Path | None  # a Python that has mosaicml-streaming, which takes older packages than ours
    compile: bool  # the blocks of both sides, where a step's shapes are always the same (model, loop)


def measure(groups: Sequence[str], inputs: Inputs, rounds: int, threads: int | None) -> Iterator[list[Row]]:
    """The rows of one group after another. Raises UserError, before the first, for a peer or a run that is missing."""
    if threads:
        torch.set_num_threads(threads)
    for group in groups:
        need(*PEERS[group])
    if inputs.glue and "loop" in groups:
        from acn_scale.benchmark.finetuning import official_sentences

        official_sentences(inputs.glue)
    if inputs.mosaicml and "data" in groups:
        _check_mosaicml(inputs.mosaicml)
    if "inference" in groups:
        for run in inputs.runs:
            if not run.is_dir():
                raise UserError(f"{run}: no such run; make quickstart trains both, --runs names others")
            read_config(run)
    for group in groups:
        yield _rows(group, inputs, rounds)


def _check_mosaicml(python: Path) -> None:
    try:
        found = subprocess.run([python, "-c", "import streaming"], capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"--mosaicml {python}: {error.strerror}") from None
    if not found:
        raise UserError(f"--mosaicml {python}: cannot import streaming; pip install mosaicml-streaming for it")


def _rows(group: str, inputs: Inputs, rounds: int) -> list[Row]:
    """Imports what the group needs, and no more."""

    def here() -> Scale:
        return scale(local_device(), compiled=inputs.compile)

    match group:
        case "data":
            from acn_scale.benchmark.data import data_rows

            threads = torch.get_num_threads()
            rows = data_rows(inputs.images, inputs.mosaicml, rounds)
            torch.set_num_threads(threads)
            return rows
        case "inference":
            from acn_scale.benchmark.inference import inference_rows

            return inference_rows(*inputs.runs, rounds)
        case "model":
            from acn_scale.benchmark.model import model_rows

            return model_rows(inputs.text, rounds, here())
        case "loop":
            from acn_scale.benchmark.finetuning import finetuning
            from acn_scale.benchmark.loop import loop_rows

            return [*loop_rows(inputs.text, rounds, here()), finetuning(inputs.text, inputs.glue, rounds, here())]
        case "checkpoint":
            from acn_scale.benchmark.checkpoint import checkpoint_rows

            return checkpoint_rows(inputs.text, rounds, here())
    raise AssertionError(group)
