"""What a fine-tuning run takes over from the network that it starts from: its model and its tokenizer."""

import functools
from pathlib import Path
from typing import Any

from acn_scale.checkpoint import STATE_NAME
from acn_scale.config import ModelConfig, RemoteConfig, SentenceDataConfig
from acn_scale.convert.hugging_face import read_parts
from acn_scale.convert.network import Images
from acn_scale.convert.sources import read_model
from acn_scale.data.encoders import TOKENIZER_FILES, load_encoder
from acn_scale.data.shards import INDEX_NAME, ShardIndex
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.errors import UserError
from acn_scale.runs import read_config


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config with [model] filled in from train.init_from and the classes of data.train, and with the
    source's tokenizer for sentences, or its mean and deviation for images. A config that names its model is left as it
    is.

    Raises UserError where keys are missing, data.tokenizer is not the source's, the source takes no sentences, or the
    data are not those of a task.
    """
    source, data = values.get("train", {}).get("init_from"), values.get("data", {})
    if data.get("kind") == "sentences":
        _check_task(data)
    if values.get("model", {}).get("name"):
        if data.get("kind") == "sentences" and isinstance(source, str) and isinstance(data.get("tokenizer"), str):
            _check_tokenizer(_tokenizer_beside(source), source, data["tokenizer"])
        return values
    for key, given in (("train.init_from", source), ("data.train", data.get("train"))):
        if not isinstance(given, str):
            raise UserError(f"{key}: missing; the model is found out from it")
    model, tokenizer, images = _known_of(source)
    if data.get("kind") == "sentences" and model.name != "bert":
        raise UserError(f"train.init_from = {source}: a {model.name}; data.kind = sentences takes a bert")
    classes = len(ShardIndex.load(data["train"], RemoteConfig()).info.get("classes", []))
    model = model.model_dump(mode="json") | {"num_classes": classes or 1} | values.get("model", {})
    if data.get("kind") == "sentences":
        data = {"tokenizer": data.get("tokenizer") or tokenizer_folder(source)} | data
        _check_tokenizer(tokenizer, source, data["tokenizer"])
    elif images is not None:
        data = {"mean": images.mean, "std": images.std} | data
    return values | {"model": model, "data": data}


def _check_task(data: dict[str, Any]) -> None:
    """What would end a run after its training, in the evaluation of all that lies beside data.eval."""
    places = [data.get(split) for split in ("train", "eval")]
    if not all(isinstance(place, str) for place in places):
        return  # said elsewhere
    if "://" in places[1]:
        raise UserError(f"data.eval = {places[1]}: must be a folder: all sets that lie beside it are evaluated")
    if not (Path(places[1]) / INDEX_NAME).exists():
        return
    one, other = (ShardIndex.load(place, RemoteConfig()).info.get("task") for place in places)
    if one != other:
        raise UserError(f"data.eval = {places[1]}: holds {other}; data.train = {places[0]} holds {one}")


@functools.cache  # a grid of runs asks again and again
def _known_of(source: str) -> tuple[ModelConfig, bytes | None, Images | None]:
    if source.startswith("hf:"):  # which may have no head
        card = read_parts(Path(source.removeprefix("hf:")))[0]
        return card.model, None, card.images
    net = read_model(source)
    return net.card.model, net.tokenizer.get(TOKENIZER_NAME), net.card.images


def tokenizer_folder(source: str) -> str:
    """Where the tokenizer of a network lies. Raises UserError where there is none."""
    if found := _find_tokenizer(source):
        return found
    raise UserError(f"train.init_from = {source}: has no tokenizer; name one with data.tokenizer")


def _find_tokenizer(source: str) -> str | None:
    path = Path(source.removeprefix("hf:"))
    if _has_tokenizer(path):
        return str(path)
    run = path.absolute().parents[1] if (path / STATE_NAME).exists() else path
    if not (run / "config.json").exists():
        return None
    data = read_config(run).data
    return data.tokenizer if isinstance(data, SentenceDataConfig) else data.train


def _tokenizer_beside(source: str) -> bytes | None:
    """Read without the network, which a run that goes on needs no more; None where it cannot be."""
    found = _find_tokenizer(source)
    path = Path(found or "") / TOKENIZER_NAME
    return path.read_bytes() if found and path.exists() and not source.startswith("hf:") else None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _check_tokenizer(tokenizer: bytes | None, source: str, folder: str) -> None:
    path = Path(folder) / TOKENIZER_NAME
    if tokenizer is not None:
        fits = path.exists() and path.read_bytes() == tokenizer
    else:  # of Hugging Face's, several files can hold one and the same
        theirs = Path(_find_tokenizer(source) or folder)
        fits = not _has_tokenizer(theirs) or _pieces(theirs) == _pieces(Path(folder))
    if not fits:
        raise UserError(f"data.tokenizer = {folder}: not the tokenizer that {source} was trained with")


def _pieces(folder: Path) -> list[str]:
    """What the ids stand for."""
    encoder = load_encoder(folder)
    return encoder.pieces(list(range(encoder.vocab_size)))
