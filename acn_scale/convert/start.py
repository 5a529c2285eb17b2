"""Weights of another network as the start of a run."""

import logging

import torch
from torch import nn

from acn_scale.convert.sources import read_weights
from acn_scale.errors import UserError

log = logging.getLogger(__name__)

POSITIONS = "embed.position.weight"  # of text, a row for each


@torch.no_grad()
def start_from(model: nn.Module, source: str) -> list[str]:
    """Copy the weights of `source`, whatever read_weights takes, into `model`; return what kept its own start.

    That is what of the head and of the joins `source` has not in this shape. Of a longer table of text's positions the
    first are taken. Raises UserError where any other name or shape differs.
    """
    theirs, ours = read_weights(source), dict(model.named_parameters())
    said = f"weights taken from {source}"
    if {POSITIONS} <= ours.keys() & theirs.keys() and len(ours[POSITIONS]) < len(theirs[POSITIONS]):
        said += f"; the first {len(ours[POSITIONS])} of its {len(theirs[POSITIONS])} positions"
        theirs[POSITIONS] = theirs[POSITIONS][: len(ours[POSITIONS])]
    kept = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
            ours[name].copy_(theirs[name])
        elif not (name.startswith("head.") or "joins" in name.split(".")):
            shapes = [tuple(named[name].shape) if name in named else "not there" for named in (theirs, ours)]
            raise UserError(f"train.init_from = {source}: {name}: {shapes[0]} in it, {shapes[1]} in this run's model")
        elif name in ours:
            kept.append(name)
    log.info("%s%s", said, f"; as they were: {', '.join(kept)}" if kept else "")
    return kept
