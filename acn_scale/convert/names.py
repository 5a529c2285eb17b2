"""The names of weights in Transformers and timm: one table each, read in both directions, strict both ways."""

from collections.abc import Mapping

import torch
from torch import Tensor

from acn_scale.errors import UserError

# Ours -> theirs. "{}" stands for the block; a name without its last part stands for a weight and a bias;
# several names for tensors that ours holds as one, in this order.
Names = dict[str, str | tuple[str, ...]]


def _block(norm1: str, attention: str | tuple[str, ...], proj: str, norm2: str, fc1: str, fc2: str) -> Names:
    """A pre-LN block's."""
    op = "trunk.blocks.{}.blocks."
    return {
        op + "0.norm": norm1,
        op + "0.op.qkv": attention,
        op + "0.op.proj": proj,
        op + "1.norm": norm2,
        op + "1.op.fc1": fc1,
        op + "1.op.fc2": fc2,
    }


def _separate(prefix: str) -> tuple[str, ...]:
    return tuple(prefix + part for part in ("query", "key", "value"))


_LAYER = "bert.encoder.layer.{}."
HF_BERT: Names = {
    "embed.token": "bert.embeddings.word_embeddings",
    "embed.position": "bert.embeddings.position_embeddings",
    "embed.segment": "bert.embeddings.token_type_embeddings",
    "embed.norm": "bert.embeddings.LayerNorm",
    "trunk.blocks.{}.blocks.0.op.qkv": _separate(_LAYER + "attention.self."),
    "trunk.blocks.{}.blocks.0.op.proj": _LAYER + "attention.output.dense",
    "trunk.blocks.{}.norms.0": _LAYER + "attention.output.LayerNorm",
    "trunk.blocks.{}.blocks.1.op.fc1": _LAYER + "intermediate.dense",
    "trunk.blocks.{}.blocks.1.op.fc2": _LAYER + "output.dense",
    "trunk.blocks.{}.norms.1": _LAYER + "output.LayerNorm",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder.bias": "cls.predictions.bias",
    "head.pooler": "bert.pooler.dense",
    "head.linear": "classifier",
}

_LAYER = "vit.encoder.layer.{}."
HF_VIT: Names = {
    "embed.cls_token": "vit.embeddings.cls_token",
    "embed.pos_embed": "vit.embeddings.position_embeddings",
    "embed.proj": "vit.embeddings.patch_embeddings.projection",
    **_block(
        _LAYER + "layernorm_before",
        _separate(_LAYER + "attention.attention."),
        _LAYER + "attention.output.dense",
        _LAYER + "layernorm_after",
        _LAYER + "intermediate.dense",
        _LAYER + "output.dense",
    ),
    "head.norm": "vit.layernorm",
    "head.linear": "classifier",
}

_BLOCK = "blocks.{}."
TIMM_VIT: Names = {
    "embed.cls_token": "cls_token",
    "embed.pos_embed": "pos_embed",
    "embed.proj": "patch_embed.proj",
    **_block(
        *(_BLOCK + part for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
    ),
    "head.norm": "norm",
    "head.linear": "head",
}
TIMM_VIT_MEAN: Names = TIMM_VIT | {"head.norm": "fc_norm"}  # pool = "mean"

TIMM_MIXER: Names = {
    "embed.proj": "stem.proj",
    "trunk.blocks.{}.blocks.0.norm": _BLOCK + "norm1",
    "trunk.blocks.{}.blocks.0.op.fc1": _BLOCK + "mlp_tokens.fc1",
    "trunk.blocks.{}.blocks.0.op.fc2": _BLOCK + "mlp_tokens.fc2",
    "trunk.blocks.{}.blocks.1.norm": _BLOCK + "norm2",
    "trunk.blocks.{}.blocks.1.op.fc1": _BLOCK + "mlp_channels.fc1",
    "trunk.blocks.{}.blocks.1.op.fc2": _BLOCK + "mlp_channels.fc2",
    "head.norm": "norm",
    "head.linear": "head",
}

LEADING = {"embed.cls_token": 2, "embed.pos_embed": 1}  # axes of length 1 that theirs have in front


def to_theirs(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our weights under their names. Raises UserError for one that the table does not know."""
    theirs = {}
    for name, weight in weights.items():
        places = _places(name, names)
        weight = weight[(None,) * LEADING.get(name, 0)]
        theirs |= dict(zip(places, weight.chunk(len(places)), strict=True))
    return {name: weight.contiguous() for name, weight in theirs.items()}


def to_ours(
    theirs: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    names: Names,
    what: str,
    optional: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Their weights under our names, for a model of ours whose weights have these `shapes`.

    Raises UserError for one that is missing in theirs, unless its name begins with one of `optional`, or that has no
    place in ours. Shapes are not looked at.
    """
    ours, used = {}, set()
    for name, shape in shapes.items():
        places = _places(name, names)
        if missing := [place for place in places if place not in theirs]:
            if name.startswith(optional):
                continue
            raise UserError(f"{what}: lacks {missing[0]}")
        used |= set(places)
        weight = torch.cat([theirs[place] for place in places]) if len(places) > 1 else theirs[places[0]]
        while weight.dim() > len(shape) and len(weight) == 1:
            weight = weight[0]
        ours[name] = weight
    if left := theirs.keys() - used:
        raise UserError(f"{what}: has {min(left)}, which has no place in our {len(shapes)} weights")
    return ours


def _places(name: str, names: Names) -> tuple[str, ...]:
    """Where one of our weights is in theirs."""
    parts = name.split(".")
    block = parts[2] if parts[:2] == ["trunk", "blocks"] else ""
    template = ".".join(["trunk", "blocks", "{}", *parts[3:]]) if block else name
    stem, _, kind = template.rpartition(".")
    found, ending = (names[template], "") if template in names else (names.get(stem), f".{kind}")
    if found is None:
        raise UserError(f"{name}: has no counterpart there")
    return tuple(each.format(block) + ending for each in ((found,) if isinstance(found, str) else found))
