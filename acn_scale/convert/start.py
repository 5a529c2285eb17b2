"""Weights of another network as the start of a run, and of what it does not train when it goes on."""

import logging
from pathlib import Path

import torch
from torch import nn

from acn_scale.config import ModelConfig
from acn_scale.convert.network import fill
from acn_scale.convert.sources import read_model
from acn_scale.convert.zero import frozen
from acn_scale.errors import UserError
from acn_scale.models.connectivity import patterns

log = logging.getLogger(__name__)


@torch.no_grad()
def start_from(model: nn.Module, cfg: ModelConfig, source: str) -> list[str]:
    """Copy the weights of `source`, whatever read_model takes, into a model of `cfg`; return what kept its own start.

    That is the head where the number of classes is another, and the joins where the connectivity is. Raises UserError
    where any other name or shape differs.
    """
    net = read_model(source)
    theirs, ours = dict(net.model.named_parameters()), dict(model.named_parameters())
    kept = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
            ours[name].copy_(theirs[name])
        elif not _may_differ(name, cfg, net.card.model):
            shapes = [tuple(named[name].shape) if name in named else "not there" for named in (theirs, ours)]
            raise UserError(f"train.init_from = {source}: {name}: {shapes[0]} in it, {shapes[1]} in this run's model")
        elif name in ours:
            kept.append(name)
    log.info("weights taken from %s%s", source, f"; as they were: {', '.join(kept)}" if kept else "")
    return kept


@torch.no_grad()
def restore_frozen(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights that a run does not train back into its model, from a checkpoint of any layout."""
    named = dict(model.named_parameters())
    for name, pieces in frozen(checkpoint).items():
        fill(named[name].detach(), pieces, f"{checkpoint}: {name}")


def _may_differ(name: str, cfg: ModelConfig, other: ModelConfig) -> bool:
    joined = [patterns(each.connectivity, each.inner) for each in (cfg, other)]
    return (name.startswith("head.") and cfg.num_classes != other.num_classes) or (
        "joins" in name.split(".") and joined[0] != joined[1]
    )
