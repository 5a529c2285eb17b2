"""A trained network by itself: the model with its weights, and a card that says what it is and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from acn_scale.config import ImageDataConfig, ModelConfig, Resize, Section
from acn_scale.depth import cutoff
from acn_scale.errors import UserError
from acn_scale.models import build_model
from acn_scale.zero import Pieces

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _as_resize(value: Any) -> Any:
    """A number alone: of the shorter side, before the centre crop."""
    return {"size": value} if isinstance(value, int) else value


class Images(Section):
    """How an image becomes the model's input: pixels in 0..1, per channel (pixel - mean) / std."""

    mean: list[float]
    std: list[float]
    classes: list[str]
    resize: Annotated[Resize | None, BeforeValidator(_as_resize)]  # None: images come in the model's size

    def data(self, shards: str) -> ImageDataConfig:
        """To evaluate on these shards."""
        keys = {"mean": self.mean, "std": self.std, "resize": self.resize}
        return ImageDataConfig(kind="images", train=shards, eval=shards, **keys)


class Masks(Section):
    """How tokens are chosen that a masked language model is to predict."""

    mask_ratio: float
    whole_words: bool


class Card(Section):
    """What is known of a network: config.json of an export, but for what is told of its file."""

    model: ModelConfig  # its depth is the one after the cut
    source: str  # the folder or name that it was read from
    full_depth: Annotated[int, Field(ge=1)]  # before the cut
    run: str | None = None
    step: int | None = None
    data: str | None = None  # what it was trained on
    average: bool = False  # whether these are the moving average of the weights
    accuracy: list[float] | None = None  # 0..1 at depth 0 ... full_depth, by the run's evaluation at this step
    evaluated_at: int | None = None  # the step of that evaluation
    images: Images | None = None  # None: for text, or not known
    classes: list[str] | None = None  # of sentences; None: for images, which `images` names, or not known
    masks: Masks | None = None  # None: not a masked language model, or not known

    def class_names(self) -> list[str]:
        """Of the first classes or all, as far as they are known."""
        return (self.images.classes if self.images else self.classes) or []

    def portable(self) -> "Card":
        """For others: without the absolute paths of this machine."""
        kind, colon, rest = self.source.rpartition(":")
        data = Path(self.data or "")
        update = {
            "source": self.run or (f"{kind}{colon}{Path(rest).name}" if Path(rest).is_absolute() else self.source)
        }
        return self.model_copy(update=update | ({"data": str(Path(*data.parts[-2:]))} if data.is_absolute() else {}))


@dataclass(frozen=True)
class Network:
    """`model` is in fp32, on the CPU and in evaluation mode. `tokenizer`: its files by name, for text."""

    model: nn.Module
    card: Card
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    def weights(self, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> dict[str, Tensor]:
        """By name; tied ones once."""
        named = self.model.named_parameters()
        return {name: weight.detach().to(DTYPES[dtype]).contiguous() for name, weight in named}

    def digest(self) -> str:
        """Of the weights: the same for a checkpoint and its export, whatever they lie in."""
        return digest_of(self.weights())

    def cut(self, depth: int) -> "Network":
        """The network that ends after `depth` blocks, with the same head. This one's model is used up.

        Raises UserError for a depth that is not 1 to the model's.
        """
        model = self.card.model
        if not 1 <= depth <= model.depth:
            raise UserError(f"--depth {depth}: must be 1 to {model.depth}, the number of blocks in {self.card.source}")
        self.model.trunk.truncate(depth)
        card = self.card.model_copy(update={"model": model.model_copy(update={"depth": depth})})
        return Network(self.model, card, self.tokenizer)

    def cut_within(self, tolerance: float) -> "Network":
        """Cut at the smallest depth, 1 or more, within `tolerance` points of full depth. Raises UserError where no
        accuracy by depth is known."""
        if not 0 <= tolerance <= 100:
            raise UserError(f"--tolerance {tolerance}: must be 0 to 100 points of accuracy")
        if self.card.accuracy is None:
            network = f"the average in {self.card.source}" if self.card.average else self.card.source
            raise UserError(f"--tolerance {tolerance}: {network} has no accuracy by depth of its own; give --depth")
        depth = max(1, cutoff(self.card.accuracy, tolerance))
        return self.cut(min(depth, self.card.model.depth))


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """weights: by name; of their values as fp32, whatever they are stored in."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode())
        found.update(weight.detach().float().contiguous().numpy())
    return found.hexdigest()[:16]


def shapes_of(model: ModelConfig) -> dict[str, torch.Size]:
    """Of a model's weights, without building it."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in build_model(model).named_parameters()}


def network(card: Card, weights: dict[str, Pieces], tokenizer: Mapping[str, bytes] = MappingProxyType({})) -> Network:
    """Build the model of a card with these weights, by name and piece by piece.

    Raises UserError where names or sizes are not the model's.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and written over
        model = build_model(card.model).eval().requires_grad_(False)
    named = dict(model.named_parameters())
    if strange := [*(named.keys() - weights.keys()), *(weights.keys() - named.keys())]:
        name = min(strange)
        place = f"lacks {name}" if name in named else f"has {name}, which this model has not"
        raise UserError(f"{card.source}: {place}; are these the weights of another model?")
    for name, parameter in named.items():
        _fill(parameter, weights[name], f"{card.source}: {name}")
    return Network(model, card, tokenizer)


def _fill(parameter: Tensor, pieces: Pieces, what: str) -> None:
    size, first = sum(piece.numel() for piece in pieces), pieces[0]
    whole = len(pieces) == 1
    if size < parameter.numel() or (whole and first.shape not in (parameter.shape, (parameter.numel(),))):
        given = tuple(first.shape) if whole else f"{size} numbers"
        raise UserError(f"{what} has {given}, and {tuple(parameter.shape)} in a model of this config")
    flat, start = parameter.view(-1), 0
    for piece in pieces:
        piece = piece.reshape(-1)[: len(flat) - start]
        flat[start : start + len(piece)] = piece
        start += len(piece)
