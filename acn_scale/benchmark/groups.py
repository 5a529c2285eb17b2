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
    ranks: int  # of each side of model


def measure(
    groups: Sequence[str], inputs: Inputs, rounds: int, threads: int | None
) -> Iterator[tuple[list[Row], UserError | None]]:
    """The rows of one group after another, each with what kept that group from more.

    Raises UserError, before the first, for a peer or a run that is missing, and for more ranks than there are GPUs.
    """
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
    if (gpus := torch.cuda.device_count()) and inputs.ranks > gpus:
        raise UserError(f"--ranks {inputs.ranks}: each takes a GPU, and there are {gpus}")
    for group in groups:
        rows, mistake = [], None
        try:
            for each in _rows(group, inputs, rounds):
                rows.append(each)
        except UserError as error:
            mistake = error
        yield rows, mistake


def _check_mosaicml(python: Path) -> None:
    try:
        found = subprocess.run([python, "-c", "import streaming"], capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"--mosaicml {python}: {error.strerror}") from None
    if not found:
        raise UserError(f"--mosaicml {python}: cannot import streaming; pip install mosaicml-streaming for it")


def _rows(group: str, inputs: Inputs, rounds: int) -> Iterator[Row]:
    """Imports what the group needs, and no more."""

    def here() -> Scale:
        return scale(local_device(), compiled=inputs.compile, ranks=inputs.ranks)

    match group:
        case "data":
            from acn_scale.benchmark.data import data_rows

            yield from data_rows(inputs.images, inputs.mosaicml, rounds)
        case "inference":
            from acn_scale.benchmark.inference import inference_rows

            yield from inference_rows(*inputs.runs, rounds)
        case "model":
            from acn_scale.benchmark.model import model_rows

            yield from model_rows(inputs.text, rounds, here())
        case "loop":
            from acn_scale.benchmark.finetuning import finetuning
            from acn_scale.benchmark.loop import loop_rows

            yield from loop_rows(inputs.text, rounds, here())
            yield from finetuning(inputs.text, inputs.glue, rounds, here())
        case "checkpoint":
            from acn_scale.benchmark.checkpoint import checkpoint_rows

            yield from checkpoint_rows(inputs.text, rounds, here())
        case _:
            raise AssertionError(group)
