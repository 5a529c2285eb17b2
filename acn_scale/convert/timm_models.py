"""Residual ViT and Mixer <-> timm: a folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads."""

import logging
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from acn_scale.config import ImageModelConfig, MixerConfig, ModelConfig, Resize, ViTConfig
from acn_scale.convert.export import CONFIG_NAME, WEIGHTS_NAME, read_safetensors, save_weights
from acn_scale.convert.names import TIMM_MIXER, TIMM_VIT, TIMM_VIT_MEAN, Names, to_ours, to_theirs
from acn_scale.convert.network import Card, Images, Network, network, shapes_of
from acn_scale.convert.twins import check_eps, check_residual
from acn_scale.errors import UserError
from acn_scale.models.layers import EPS
from acn_scale.runs import read_json, write_json

log = logging.getLogger(__name__)

# (patch_size, num_blocks, embed_dim) of timm's Mixers.
MIXERS = {
    "mixer_s32_224": (32, 8, 512),
    "mixer_s16_224": (16, 8, 512),
    "mixer_b32_224": (32, 12, 768),
    "mixer_b16_224": (16, 12, 768),
    "mixer_l32_224": (32, 24, 1024),
    "mixer_l16_224": (16, 24, 1024),
}
CROP_MODES = {"crop": "center", "squash": "squash", "border": "border"}
MIXER_MODULE = "timm.models.mlp_mixer"


def write_timm(net: Network, folder: Path, dtype: str) -> None:
    """Raises UserError for what timm has no model for."""
    model = net.card.model
    names = _names(model)
    architecture, arguments = _arguments(model)
    pretrained: dict[str, Any] = {
        "input_size": [model.channels, model.image_size, model.image_size],
        "classifier": "head",
        "first_conv": "stem.proj" if isinstance(model, MixerConfig) else "patch_embed.proj",
    }
    if images := net.card.images:
        resize = images.resize or Resize(size=model.image_size)
        pretrained |= {"mean": images.mean, "std": images.std, "label_names": images.classes}
        pretrained |= {"crop_pct": resize.crop_pct(model.image_size), "interpolation": resize.interpolation}
        pretrained |= {"crop_mode": CROP_MODES[resize.fit]}
    save_weights(to_theirs(net.weights(dtype), names), folder)
    values = {"architecture": architecture, "num_classes": model.num_classes, "model_args": arguments}
    write_json(folder / CONFIG_NAME, values | {"pretrained_cfg": pretrained})


def read_timm(name: str) -> Network:
    """Of a folder in timm's form, a safetensors file in one, or a pretrained model by its name in timm.

    Raises UserError for any but its plain ViT and Mixer.
    """
    source, path = f"timm:{name}", Path(name)
    try:
        theirs = load_timm(path.parent if path.is_file() else path, name)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such name, no network, a file that does not fit
        raise UserError(f"{source}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    model = _config(theirs, source)
    weights = to_ours(theirs.state_dict(), shapes_of(model), _names(model), source)
    card = Card(model=model, source=source, full_depth=model.depth, images=_images(theirs, model, source))
    return network(card, {key: [weight] for key, weight in weights.items()})


def _images(theirs: nn.Module, model: ImageModelConfig, source: str) -> Images | None:
    """As timm itself prepares images for this network, with its defaults for what the network does not say; those are
    for colour."""
    from timm.data import resolve_model_data_config

    given = resolve_model_data_config(theirs)
    classes = theirs.pretrained_cfg.get("label_names") or [str(number) for number in range(model.num_classes)]
    fits = {mode: fit for fit, mode in CROP_MODES.items()}
    try:
        if len(given["mean"]) != model.channels:
            return None
        resize = {"size": math.floor(model.image_size / given["crop_pct"]), "like": "timm"}
        resize |= {"interpolation": given["interpolation"], "fit": fits.get(given["crop_mode"])}
        keys = {name: list(given[name]) for name in ("mean", "std")}
        return Images(**keys, classes=list(classes), resize=Resize(**resize))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{source}: {first['loc'][-1]} = {first['input']!r}: {first['msg']}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: its pretrained_cfg does not say how images are prepared: {error}") from None


def load_timm(folder: Path, name: str = "") -> nn.Module:
    """The model in a folder in timm's form; where it is none, timm's own of this name."""
    import timm  # here: it takes seconds
    from timm.models.mlp_mixer import MlpMixer

    if not folder.is_dir():
        return timm.create_model(name, pretrained=True)
    values = read_json(folder / CONFIG_NAME)
    if values.get("architecture") != MIXER_MODULE:
        read_safetensors(folder / WEIGHTS_NAME)  # what is damaged is told by us
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    mixer = MlpMixer(**values["model_args"], num_classes=values["num_classes"])
    mixer.load_state_dict({key: pieces[0] for key, pieces in read_safetensors(folder / WEIGHTS_NAME).items()})
    mixer.pretrained_cfg = values["pretrained_cfg"]
    return mixer


def _names(model: ModelConfig) -> Names:
    check_residual(model, "timm")
    if isinstance(model, MixerConfig):
        if model.pool != "mean" or model.wrapper:
            raise UserError("timm: its Mixer takes model.pool = 'mean' and no model.wrapper")
        return TIMM_MIXER
    if not isinstance(model, ViTConfig):
        raise UserError(f"timm: has no counterpart of model.name = {model.name}")
    if model.positions != "learned" or model.pool == "mean_all" or model.attention_norm or model.mlp_bypass:
        raise UserError(
            "timm: its ViT takes learned positions, pool = 'cls' or 'mean', no attention_norm and no mlp_bypass"
        )
    return TIMM_VIT_MEAN if model.pool == "mean" else TIMM_VIT


def _arguments(model: ViTConfig | MixerConfig) -> tuple[str, dict[str, Any]]:
    """The architecture, and what has to be said of the model besides."""
    shape = {"img_size": model.image_size, "in_chans": model.channels}
    if isinstance(model, MixerConfig):
        ratios = {"mlp_ratio": [_ratio(width, model.dim) for width in (model.token_dim, model.channel_dim)]}
        size = {"patch_size": model.patch_size, "num_blocks": model.depth, "embed_dim": model.dim}
        name = next((name for name, fixed in MIXERS.items() if fixed == tuple(size.values())), None)
        if name is not None:  # which sets the size, and does not let others set it
            return name, shape | ratios
        log.warning("timm.create_model has no Mixer of %s; %s.MlpMixer(**model_args, num_classes=%d) takes the weights",
                    size, MIXER_MODULE, model.num_classes)  # fmt: skip
        return MIXER_MODULE, shape | ratios | size
    pool = {"global_pool": "token"} if model.pool == "cls" else {"global_pool": "avg", "class_token": False}
    shape |= {"patch_size": model.patch_size, "embed_dim": model.dim}
    shape |= {"depth": model.depth, "num_heads": model.num_heads}
    shape["mlp_ratio"] = _ratio(round(model.mlp_ratio * model.dim), model.dim)
    return "vit_base_patch16_224", shape | pool


def _ratio(width: int, dim: int) -> float:
    """timm takes int(ratio * dim), which must be `width` whatever rounding does."""
    return width / dim if int(width / dim * dim) == width else (width + 0.5) / dim


def _config(theirs: nn.Module, source: str) -> ViTConfig | MixerConfig:
    """The config of a model of timm's, as far as its names do not tell: those are checked later."""
    from timm.models.mlp_mixer import MixerBlock, MlpMixer
    from timm.models.vision_transformer import Block, VisionTransformer

    kind = type(theirs).__name__
    plain = {VisionTransformer: Block, MlpMixer: MixerBlock}.get(type(theirs))
    if plain is None or any(type(block) is not plain for block in theirs.blocks):
        raise UserError(f"{source}: a {kind}; only timm's plain ViT and Mixer have a counterpart here")
    vit = isinstance(theirs, VisionTransformer)
    first, patches = theirs.blocks[0], theirs.patch_embed if vit else theirs.stem
    if not isinstance((first.mlp if vit else first.mlp_tokens).act, nn.GELU):
        raise UserError(f"{source}: its activation is not GELU")
    check_eps(first.norm1.eps, EPS, source)
    height, width = patches.img_size
    patch_height, patch_width = patches.patch_size
    if height != width or patch_height != patch_width or not theirs.num_classes:
        raise UserError(f"{source}: only square images and patches, and a classifier, have a counterpart here")
    shape = {"connectivity": "residual", "depth": len(theirs.blocks), "dim": theirs.embed_dim}
    shape |= {"image_size": height, "patch_size": patch_height, "channels": patches.proj.in_channels}
    shape |= {"num_classes": theirs.num_classes}
    if not vit:
        widths = {"token_dim": first.mlp_tokens.fc1.out_features, "channel_dim": first.mlp_channels.fc1.out_features}
        return MixerConfig(name="mixer", **shape, **widths)
    if theirs.global_pool not in ("token", "avg") or (theirs.global_pool == "token") == (theirs.cls_token is None):
        raise UserError(f"{source}: pools by {theirs.global_pool}, which has no counterpart here")
    pool = "cls" if theirs.global_pool == "token" else "mean"
    ratio = first.mlp.fc1.out_features / theirs.embed_dim
    return ViTConfig(name="vit", **shape, pool=pool, num_heads=first.attn.num_heads, mlp_ratio=ratio)
