"""The groups of rows by name. What a group needs is looked for before the first is measured."""

from collections.abc import Sequence
from pathlib import Path

import torch

from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import need
from acn_scale.benchmark.work import scale
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


def measure(
    groups: Sequence[str],
    *,
    images: Path | None,
    text: Path | None,
    runs: tuple[Path, Path],
    rounds: int,
    threads: int | None,
) -> list[Row]:
    """`images`: a folder of class folders of JPEGs; `text`: a folder of text shards, train and eval; `runs`: of an ACN
    and its twin. Raises UserError for a peer or a run that is missing."""
    if threads:
        torch.set_num_threads(threads)
    for group in groups:
        need(*PEERS[group])
    if "inference" in groups:
        for run in runs:
            if not run.is_dir():
                raise UserError(f"{run}: no such run; make quickstart trains both, --runs names others")
            read_config(run)
    rows = []
    for group in groups:
        rows += _rows(group, images, text, runs, rounds)
    return rows


def _rows(group: str, images: Path | None, text: Path | None, runs: tuple[Path, Path], rounds: int) -> list[Row]:
    """Imports what the group needs, and no more."""
    match group:
        case "data":
            from acn_scale.benchmark.data import data_rows

            threads = torch.get_num_threads()
            rows = data_rows(images, rounds)
            torch.set_num_threads(threads)
            return rows
        case "inference":
            from acn_scale.benchmark.inference import inference_rows

            return inference_rows(*runs, rounds)
        case "model":
            from acn_scale.benchmark.model import model_rows as text_rows
        case "loop":
            from acn_scale.benchmark.loop import loop_rows as text_rows
        case "checkpoint":
            from acn_scale.benchmark.checkpoint import checkpoint_rows as text_rows
    return text_rows(text, rounds, scale(local_device()))
