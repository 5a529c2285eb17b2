"""Our own export: a folder with model.safetensors, config.json and, for text, the tokenizer."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acn_scale.convert.network import Card, Network, network
from acn_scale.data.encoders import read_tokenizer
from acn_scale.errors import UserError
from acn_scale.pruning import sparsity
from acn_scale.runs import read_json, write_json
from acn_scale.zero import Pieces

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
FORMAT = {"format": "acn_scale", "version": 2}


def write_export(net: Network, folder: Path, dtype: Literal["fp32", "bf16", "fp16"]) -> None:
    """Into a folder that is there and empty."""
    save_weights(net.weights(dtype), folder)
    for name, content in net.tokenizer.items():
        (folder / name).write_bytes(content)
    entry = {"dtype": dtype, "sha256": _sha256(folder / WEIGHTS_NAME), "sparsity": sparsity(net.model)["sparsity"]}
    write_json(folder / CONFIG_NAME, FORMAT | entry | net.card.model_dump(mode="json"))


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """To model.safetensors, which others may read: safetensors itself makes it its owner's alone."""
    save_file(weights, folder / WEIGHTS_NAME, {"format": "pt"})
    (folder / WEIGHTS_NAME).chmod(0o644)


def is_export(folder: Path) -> bool:
    """Whether a folder's config.json says so."""
    path = folder / CONFIG_NAME
    if not path.exists():
        return False
    values = read_json(path)
    return isinstance(values, dict) and values.get("format") == FORMAT["format"]


def read_export(folder: Path) -> Network:
    """Raises UserError for a folder of another version, and for weights that are damaged."""
    values = read_json(folder / CONFIG_NAME)
    if values.get("version") != FORMAT["version"]:
        version = values.get("version")
        raise UserError(
            f"{folder / CONFIG_NAME}: version = {version}: must be {FORMAT['version']}, or another acn_scale"
        )
    checksum = values.get("sha256")
    known = {name: value for name, value in values.items() if name not in (*FORMAT, "dtype", "sha256", "sparsity")}
    try:
        card = Card.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{folder / CONFIG_NAME}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    path = folder / WEIGHTS_NAME
    pieces = read_safetensors(path)
    if _sha256(path) != checksum:
        raise UserError(f"{path}: its sha256 is not the one in {CONFIG_NAME}")
    return network(card, pieces, read_tokenizer(folder))


def read_safetensors(path: Path) -> dict[str, Pieces]:
    """All tensors of a file. Raises UserError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: [file.get_tensor(name)] for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
