"""Weights of another network as the start of a run."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from acn_scale.checkpoint import complete, trained
from acn_scale.config import Config
from acn_scale.convert.network import digest_of
from acn_scale.convert.sources import read_start
from acn_scale.errors import UserError
from acn_scale.runs import read_json, run_folder, write_json

log = logging.getLogger(__name__)

START = "start.json"  # in a run's folder: what it began from
POSITIONS = "embed.position.weight"  # of text, a row for each
OF_CLASSES = ("head.linear.bias", "head.linear.weight")  # a row for each class


@torch.no_grad()
def start_from(model: nn.Module, source: str, classes: Sequence[str] = (), note: Path | None = None) -> list[str]:
    """Copy the weights of `source`, whatever read_start takes, into `model`; return what kept its own start.

    That is what of the head and of the joins `source` has not in this shape, and OF_CLASSES where `source` is of a run
    that told other classes apart than these `classes`, as many as they may be. Of a longer table of text's positions
    the first are taken. To the folder `note` goes START, which weights they are: `source` may hold others later.
    Raises UserError where any other name or shape differs.
    """
    card, theirs = read_start(source)
    if note:
        write_json(note / START, {"source": source, "weights": digest_of(theirs), "data": card.data})
    ours, known = dict(model.named_parameters()), card.class_names()
    # What comes from elsewhere may name the same classes otherwise: timm numbers those of ImageNet.
    others = bool(card.run and known and classes) and known != [*classes]
    said = f"weights taken from {source}" + ", which told other classes apart" * others
    if {POSITIONS} <= ours.keys() & theirs.keys() and len(ours[POSITIONS]) < len(theirs[POSITIONS]):
        said += f"; the first {len(ours[POSITIONS])} of its {len(theirs[POSITIONS])} positions"
        theirs[POSITIONS] = theirs[POSITIONS][: len(ours[POSITIONS])]
    kept = []
    for name in sorted(ours.keys() | theirs.keys()):
        fits = name in ours and name in theirs and ours[name].shape == theirs[name].shape
        if fits and not (others and name in OF_CLASSES):
            ours[name].copy_(theirs[name])
        elif not (name.startswith("head.") or "joins" in name.split(".")):
            shapes = [tuple(named[name].shape) if name in named else "not there" for named in (theirs, ours)]
            raise UserError(f"train.init_from = {source}: {name}: {shapes[0]} in it, {shapes[1]} in this run's model")
        elif name in ours:
            kept.append(name)
    log.info("%s%s", said, f"; as they were: {', '.join(kept)}" if kept else "")
    return kept


def check_start(cfg: Config) -> None:
    """Raises UserError where a finished run began from other weights than its source holds now: what is evaluated would
    be taken for the new ones'. One that is not finished goes on, with a warning: its source may be a run that goes on
    as well. A source that is gone is passed over.
    """
    folder, source = run_folder(cfg), cfg.train.init_from
    if not source or not complete(folder) or not (folder / START).exists():
        return
    try:
        weights = _digest(source)
    except UserError:
        return
    if weights != read_json(folder / START)["weights"]:
        message = f"{folder}: began from other weights than {source} holds now"
        if trained(cfg):
            raise UserError(f"{message}; remove that folder to train it anew, or give this run another run.name")
        log.warning("%s", message)


@functools.cache  # a grid of runs asks again and again
def _digest(source: str) -> str:
    return digest_of(read_start(source)[1])
