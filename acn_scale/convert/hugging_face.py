"""BERT and ViT of Transformers -> ours, and every network of ours -> a folder that Transformers' Auto classes load."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from acn_scale.config import BertConfig, ModelConfig, ViTConfig
from acn_scale.convert.custom_code import CODE_NAME, custom_code
from acn_scale.convert.export import CONFIG_NAME, WEIGHTS_NAME, read_safetensors, save_weights
from acn_scale.convert.image_processor import PROCESSOR_NAME, image_processor, read_image_processor
from acn_scale.convert.model_card import model_card
from acn_scale.convert.names import HF_BERT, HF_VIT, Names, to_ours, to_theirs
from acn_scale.convert.network import Card, Network, network, shapes_of
from acn_scale.convert.tokenizer_files import write_tokenizer
from acn_scale.convert.twins import check_eps, is_residual
from acn_scale.data.encoders import read_tokenizer
from acn_scale.errors import UserError
from acn_scale.models.bert import BERT_EPS
from acn_scale.models.layers import EPS
from acn_scale.runs import read_json, write_json

log = logging.getLogger(__name__)

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
# What no network of ours has: next-sentence prediction, a table of numbers, ViT's pooler.
LEFT_OUT = ("cls.seq_relationship.", "bert.embeddings.position_ids", "vit.pooler.")


def write_hugging_face(net: Network, folder: Path, dtype: str) -> None:
    """A residual twin as plain BERT or ViT, all else with its code beside it."""
    model = net.card.model
    plain = _is_plain(model)
    if plain:
        values, weights = _plain_config(model), to_theirs(net.weights(dtype), _names(model))
    else:
        values = _custom_config(model)
        weights = {f"network.{name}": weight for name, weight in net.weights(dtype).items()}
        (folder / CODE_NAME).write_text(custom_code())
    save_weights(weights, folder)
    values |= {"dtype": TORCH_NAMES[dtype]}
    if model.num_classes:
        classes = net.card.class_names()
        labels = [*classes, *(f"LABEL_{number}" for number in range(len(classes), model.num_classes))]
        values["id2label"] = {str(number): label for number, label in enumerate(labels)}
        values["label2id"] = {label: number for number, label in enumerate(labels)}
    write_json(folder / CONFIG_NAME, values)
    if net.card.images:
        write_json(folder / PROCESSOR_NAME, image_processor(net.card.images, model))
    if net.tokenizer:
        write_tokenizer(net.tokenizer, folder, model.max_tokens)
    (folder / "README.md").write_text(model_card(net.card, plain=plain, dtype=dtype))


def _is_plain(model: ModelConfig) -> bool:
    """Whether Transformers has this network itself."""
    if not is_residual(model):
        return False
    if isinstance(model, BertConfig):
        return model.norm == "post"
    return (
        isinstance(model, ViTConfig)
        and (model.pool, model.positions) == ("cls", "learned")
        and not (model.attention_norm or model.mlp_bypass)
    )


def _names(model: BertConfig | ViTConfig) -> Names:
    return HF_BERT if isinstance(model, BertConfig) else HF_VIT


def _plain_config(model: BertConfig | ViTConfig) -> dict[str, Any]:
    values = {
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": round(model.mlp_ratio * model.dim),
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
    }
    if isinstance(model, ViTConfig):
        values |= {"model_type": "vit", "architectures": ["ViTForImageClassification"], "layer_norm_eps": EPS}
        return values | {"image_size": model.image_size, "patch_size": model.patch_size, "num_channels": model.channels}
    task = "ForSequenceClassification" if model.num_classes else "ForMaskedLM"
    values |= {"model_type": "bert", "architectures": [f"Bert{task}"], "layer_norm_eps": BERT_EPS, "pad_token_id": 0}
    return values | {"vocab_size": model.vocab_size, "max_position_embeddings": model.max_tokens, "type_vocab_size": 2}


def _custom_config(model: ModelConfig) -> dict[str, Any]:
    module = CODE_NAME.removesuffix(".py")
    tasks = ["MaskedLM", "SequenceClassification"] if isinstance(model, BertConfig) else ["ImageClassification"]
    auto = {f"AutoModelFor{task}": f"{module}.AcnFor{task}" for task in tasks}
    auto |= {"AutoConfig": f"{module}.AcnConfig", "AutoModel": f"{module}.AcnModel"}
    task = tasks[-1] if model.num_classes else tasks[0]
    return {
        "model_type": "acn_scale",
        "architectures": [f"AcnFor{task}"],
        "auto_map": auto,
        "network": model.model_dump(mode="json"),
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "tie_word_embeddings": isinstance(model, BertConfig) and not model.num_classes,
    }


def read_hugging_face(folder: Path) -> Network:
    """A BERT or ViT folder with safetensors, or a pytorch_model.bin, which is read without running code.

    Raises UserError for other models, for options of theirs that ours have not, and for an encoder without a head.
    """
    card, weights = read_parts(folder)
    if not weights.keys() & {"head.linear.weight", "head.decoder.bias"}:
        raise UserError(f"{card.source}: an encoder without a head: only train.init_from can take it")
    shapes = shapes_of(card.model)
    if dropped := sorted(weights.keys() - shapes.keys()):
        log.info("%s: left out, our %s has no place for it: %s", card.source, card.model.name, ", ".join(dropped))
    pieces = {name: [weight] for name, weight in weights.items() if name in shapes}
    return network(card, pieces, read_tokenizer(folder))


def read_parts(folder: Path) -> tuple[Card, dict[str, Tensor]]:
    """What is known of such a folder, and its weights under our names: the encoder's, and of the heads what is there.

    Raises UserError as above.
    """
    source = f"hf:{folder}"
    values = read_json(folder / CONFIG_NAME)
    try:
        kind = values.get("model_type")
        if kind not in ("bert", "vit"):
            raise UserError(f"{source}: model_type = {kind!r}: must be bert or vit")
        theirs = _weights(folder, kind)
        model = _config(values, theirs, source)
        labels = values.get("id2label") or {}
        images = read_image_processor(folder, labels, model) if isinstance(model, ViTConfig) else None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error!r}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{folder / CONFIG_NAME}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    shapes = shapes_of(model)
    if isinstance(model, BertConfig):  # whose file may have a pooler beside the head of a masked language model
        other = model.model_copy(update={"num_classes": int(model.num_classes == 0)})
        shapes |= shapes_of(other)
    weights = to_ours(theirs, shapes, _names(model), source, optional=("head.",))
    return Card(model=model, source=source, full_depth=model.depth, images=images), weights


def _weights(folder: Path, kind: str) -> dict[str, Tensor]:
    """By the names in a model with a head, those of old files made today's, and without what is tied or has no use."""
    weights = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): weight
        for name, weight in _stored(folder).items()
    }
    if not any(name.startswith(f"{kind}.") for name in weights):  # a bare encoder's
        weights = {f"{kind}.{name}": weight for name, weight in weights.items()}
    decoder, bias = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
    token = "bert.embeddings.word_embeddings.weight"
    if decoder in weights and token in weights and not torch.equal(weights[decoder], weights[token]):
        raise UserError(f"{folder}: its decoder is not tied to the token embedding, as ours is")
    tied = {decoder, bias if "cls.predictions.bias" in weights else ""}
    return {name: weight for name, weight in weights.items() if name not in tied and not name.startswith(LEFT_OUT)}


def _stored(folder: Path) -> dict[str, Tensor]:
    """Of one file of safetensors, of several with an index, or of a pickle with nothing but tensors in it."""
    safe, index, binary = (folder / name for name in (WEIGHTS_NAME, INDEX_NAME, "pytorch_model.bin"))
    if safe.exists() or index.exists():
        parts = [WEIGHTS_NAME] if safe.exists() else _indexed(index)
        return {name: pieces[0] for part in parts for name, pieces in read_safetensors(folder / part).items()}
    if not binary.exists():
        raise UserError(f"{folder}: holds none of {WEIGHTS_NAME}, {INDEX_NAME} and pytorch_model.bin")
    try:
        return torch.load(binary, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{binary}: {str(error).splitlines()[0]}") from None


def _indexed(path: Path) -> list[str]:
    """The files that an index of weights names."""
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    names = list(places.values()) if isinstance(places, dict) else [None]
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{path}: {strange[0]}: must be the name of a file in this folder, of each weight")
    return sorted(set(names))


def _config(values: dict[str, Any], weights: dict[str, Tensor], source: str) -> BertConfig | ViTConfig:
    """Defaults are those of Transformers, whose files leave out what equals them."""
    kind = values["model_type"]
    expected = {"hidden_act": "gelu", "position_embedding_type": "absolute", "qkv_bias": True, "is_decoder": False}
    expected |= {"add_cross_attention": False, "type_vocab_size": 2}
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise UserError(f"{source}: {key} = {values[key]!r}: ours has {value!r} only")
    check_eps(values.get("layer_norm_eps", 1e-12), BERT_EPS if kind == "bert" else EPS, source)
    some = 0 if kind == "bert" else 2  # where there is no classifier: a number that ours can have
    classes = len(weights["classifier.weight"]) if "classifier.weight" in weights else some
    dim = values.get("hidden_size", 768)
    shape = {
        "connectivity": "residual",
        "depth": values.get("num_hidden_layers", 12),
        "dim": dim,
        "num_heads": values.get("num_attention_heads", 12),
        "mlp_ratio": values.get("intermediate_size", 3072) / dim,
        "dropout": values.get("hidden_dropout_prob", 0.1 if kind == "bert" else 0.0),
        "num_classes": classes,
    }
    if kind == "bert":
        sizes = {
            "vocab_size": values.get("vocab_size", 30522),
            "max_tokens": values.get("max_position_embeddings", 512),
        }
        return BertConfig(name="bert", **shape, **sizes)
    sizes = {"image_size": values.get("image_size", 224), "patch_size": values.get("patch_size", 16)}
    return ViTConfig(name="vit", **shape, **sizes, channels=values.get("num_channels", 3))
