"""The models by name. They import with torch alone and know nothing of ranks, devices or data."""

from torch import nn

from acn_scale.config import ModelConfig
from acn_scale.models.bert import Bert
from acn_scale.models.mixer import Mixer
from acn_scale.models.vit import ViT

MODELS: dict[str, type[nn.Module]] = {"bert": Bert, "mixer": Mixer, "vit": ViT}


def build_model(cfg: ModelConfig) -> nn.Module:
    """The model with its initial weights, drawn from torch's global generator."""
    return MODELS[cfg.name](cfg)
