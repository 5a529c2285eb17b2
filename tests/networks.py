"""Small networks without a zero among their weights, small runs, and what a conversion that is refused says."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from test_models import randomize

from acn_scale.cli import load_config
from acn_scale.config import BertConfig, Config, MixerConfig, ModelConfig, ViTConfig
from acn_scale.convert import convert
from acn_scale.convert.export import write_export
from acn_scale.convert.network import Card, Images, Network
from acn_scale.errors import UserError
from acn_scale.models import build_model

IMAGES = {"image_size": 8, "patch_size": 4, "num_classes": 5, "depth": 3, "dim": 16}

SMALL = ["model.depth=3", "model.dim=16", "model.num_heads=2", "model.patch_size=4", "data.streams=4"]
SHORT = ["train.length=40step", "train.log_every=5step", "checkpoint.every=20step", "eval.every=20step"]

TEXTS = {"vocab_size": 300, "max_tokens": 7, "num_heads": 2, "depth": 3, "dim": 16}

GREY = {"channels": 1, "num_classes": 10, "connectivity": "acn"}  # for the digits

CURVE = [0.1, 0.2, 0.59, 0.6]


def vit(**keys: Any) -> ViTConfig:
    return ViTConfig(**{"name": "vit", "connectivity": "residual", "num_heads": 2} | IMAGES | keys)


def mixer(**keys: Any) -> MixerConfig:
    widths = {"token_dim": 6, "channel_dim": 20}
    return MixerConfig(**{"name": "mixer", "connectivity": "residual"} | widths | IMAGES | keys)


def bert(**keys: Any) -> BertConfig:
    return BertConfig(**{"name": "bert", "connectivity": "residual"} | TEXTS | keys)


def network(model: ModelConfig, tokenizer: Mapping[str, bytes] = MappingProxyType({})) -> Network:
    """No weight is zero."""
    torch.manual_seed(0)
    module = build_model(model).eval().requires_grad_(False)
    randomize(module)
    images = None
    if not isinstance(model, BertConfig):
        channels = model.channels
        classes = [f"kind {number}" for number in range(model.num_classes)]
        images = Images(mean=[0.4] * channels, std=[0.2] * channels, classes=classes, resize=9)
    card = Card(model=model, source="here", full_depth=model.depth, accuracy=CURVE, evaluated_at=1, images=images)
    return Network(module, card, tokenizer)


def small(config: str, folder: Path, name: str, *overrides: str) -> Config:
    """Of a quickstart run, cut down to a second."""
    where = [f"run.dir={folder}/runs", f"run.name={name}"]
    path = Path(__file__).parents[1] / "configs" / "quickstart" / config
    return load_config(path, [*where, *SMALL, *SHORT, *overrides])


def same(one: Network, other: Network) -> bool:
    first, second = one.weights(), other.weights()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def described(model: ModelConfig) -> str:
    return f"{model.name}-{model.connectivity}-{model.num_classes}"


def complaint(source: Path | str, out: Path, to: str = "safetensors", **keys: Any) -> str:
    """What a conversion that cannot be done says, in one line; nothing is left of it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert(str(source), to, out, **keys)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def image_export(folder: Path, model: ModelConfig, **images: Any) -> Path:
    """Of a network whose weights are drawn; `images`: what its card says of them besides."""
    net = network(model)
    classes = [str(number) for number in range(model.num_classes)]
    known = Images(**net.card.images.model_dump() | {"classes": classes, "resize": None} | images)
    folder.mkdir(parents=True)
    write_export(Network(net.model, net.card.model_copy(update={"images": known})), folder, "fp32")
    return folder
