"""Which of our networks are the same thing elsewhere: residual twins, with the patterns that others know."""

import logging

from acn_scale.config import ModelConfig
from acn_scale.errors import UserError
from acn_scale.models.connectivity import patterns

log = logging.getLogger(__name__)


def is_residual(model: ModelConfig) -> bool:
    """Whether it is the standard residual network: a skip round each sublayer and none round the block."""
    return patterns(model.connectivity, model.inner) == ("feedforward", "residual")


def check_residual(model: ModelConfig, where: str) -> None:
    if not is_residual(model):
        raise UserError(
            f"{where}: has residual networks only; this one is model.connectivity = {model.connectivity}, "
            f"model.inner = {model.inner}"
        )


def check_eps(theirs: float, ours: float, source: str) -> None:
    """Their eps of LayerNorm is not taken over: say so where it differs."""
    if theirs != ours:
        log.warning("%s: LayerNorm's eps is %g there and %g here: outputs will differ slightly", source, theirs, ours)
