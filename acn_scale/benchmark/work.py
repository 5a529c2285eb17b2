"""What both sides of a row are given: the same network with the same weights, the same text, the same settings."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acn_scale.config import BertConfig, Config, MixerConfig, ModelConfig, ViTConfig
from acn_scale.convert import TARGETS
from acn_scale.convert.network import Card, Network
from acn_scale.data.encoders import read_tokenizer
from acn_scale.data.make_text import make_text_shards, train_source_tokenizer
from acn_scale.data.text_sources import TextSources
from acn_scale.models import build_model

LR, WEIGHT_DECAY, CLIP_NORM, MASK_RATIO = 1e-4, 0.01, 1.0, 0.15
VOCABULARY = 32_768  # of the network
PIECES = 4_096  # of the tokenizer: pydoc's text has too few words for more


@dataclass(frozen=True)
class Scale:
    """How large the work is: small for a CPU, of the usual size for a GPU."""

    bert: BertConfig
    encoder: BertConfig  # to be fine-tuned on sentences of two classes
    vit: ViTConfig
    mixer: MixerConfig
    text_batch: int  # sequences of a step
    image_batch: int
    precision: str
    steps: int  # of a turn
    workers: int  # loader processes of each side
    compile: bool  # both sides by torch.compile, block by block
    ranks: int  # of each side of model, each with so large a batch


def scale(device: torch.device, *, compiled: bool, ranks: int = 1) -> Scale:
    """Both sides of a row are the residual network, which the peers have too."""
    bert = {"name": "bert", "connectivity": "residual", "vocab_size": VOCABULARY, "depth": 12, "dropout": 0.1}
    encoder = bert | {"depth": 6, "num_classes": 2}
    vit = {"name": "vit", "connectivity": "residual", "num_classes": 1000}
    mixer = {"name": "mixer", "connectivity": "residual", "num_classes": 1000}
    if device.type == "cuda":
        wide = {"depth": 12, "dim": 768, "token_dim": 384, "channel_dim": 3072, "image_size": 224, "patch_size": 16}
        return Scale(
            BertConfig(**bert, dim=768, num_heads=12, max_tokens=512),
            BertConfig(**encoder, dim=768, num_heads=12, max_tokens=128),
            ViTConfig(**vit, size="B", image_size=224, patch_size=16),
            MixerConfig(**mixer, **wide),
            text_batch=64,
            image_batch=128,
            precision="bf16",
            steps=10,
            workers=4,
            compile=compiled,
            ranks=ranks,
        )
    wide = {"depth": 16, "dim": 128, "token_dim": 64, "channel_dim": 512, "image_size": 32, "patch_size": 4}
    return Scale(
        BertConfig(**bert, dim=256, num_heads=4, max_tokens=128),
        BertConfig(**encoder, dim=384, num_heads=12, max_tokens=128),
        ViTConfig(**vit, size="Ti", image_size=32, patch_size=4),
        MixerConfig(**mixer, **wide),
        text_batch=32,
        image_batch=64,
        precision="fp32",
        steps=1,
        workers=0,
        compile=compiled,
        ranks=ranks,
    )


def config(
    model: ModelConfig, data: Path, runs: Path, here: Scale, *, batch: int, steps: int = 1, **more: Any
) -> Config:
    """Of a run that neither evaluates nor saves before its end. `data` has the shards, in train and eval; `more` are
    other keys of [data]."""
    kind = "images"
    if isinstance(model, BertConfig):
        kind = "sentences" if model.num_classes else "text"
    shards = {"kind": kind, "train": f"{data}/train", "eval": f"{data}/eval"}
    shards |= {"workers": here.workers} | more
    never = {"every": f"{steps}step"}
    return Config.model_validate(
        {
            "run": {"name": "benchmark", "dir": str(runs)},
            "model": model.model_dump(),
            "data": shards | ({"mask_ratio": MASK_RATIO} if kind == "text" else {}),
            "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY},
            "train": {"length": f"{steps}step", "global_batch_size": batch, "precision": here.precision}
            | {"clip_norm": CLIP_NORM, "log_every": "10step", "compile": here.compile},
            "eval": never,
            "checkpoint": never,
        }
    )


def pydoc_shards(folder: Path, tokens: int) -> Path:
    """Shards of the documentation that comes with Python: train, eval and tokenizer."""
    sources = TextSources(["pydoc"])
    train_source_tokenizer(sources, PIECES, folder / "tokenizer", character_coverage=1.0, eval_share=0.1)
    make_text_shards(sources, folder / "tokenizer", folder, tokens=tokens)
    return folder


def sentences_of(shards: Path) -> Iterator[dict[str, Any]]:
    """The rows of a folder of shards of sentences: texts, label."""
    return (record["json"] for record in _records(shards))


def tokens_of(shards: Path) -> Iterator[np.ndarray]:
    """The sequences of a folder of text shards, without masks."""
    return (row for record in _records(shards) for row in record["npy"])


def _records(shards: Path) -> Iterator[dict[str, Any]]:
    from webdataset import WebDataset

    files = sorted(str(path) for path in shards.glob("*.tar"))
    yield from WebDataset(files, shardshuffle=False, nodesplitter=None).decode()  # all of them on every rank


def write_peer(to: str, model: ModelConfig, folder: Path, shards: Path | None = None) -> Path:
    """The network that a run of ours starts from, as `to`, "hf" (with the shards' tokenizer) or "timm", loads it."""
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = read_tokenizer(shards / "train") if shards else {}
    net = Network(build_model(model), Card(model=model, source="benchmark", full_depth=model.depth), tokenizer)
    TARGETS[to](net, folder, "fp32")
    return folder


def compile_blocks(model: torch.nn.Module) -> None:
    """As train.compile does it, of a network of Transformers' or timm's."""
    names = (".layer", "blocks")  # of an encoder's layers; of timm's blocks
    blocks = next(module for name, module in model.named_modules() if name.endswith(names))
    for block in blocks:
        block.compile()


def seconds(step: Callable[[], Any], steps: int) -> float:
    """Of one of these steps, on a GPU until it is done."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (_now() - start) / steps


class Laps:
    """Seconds of a step of a loop, from the end of its first step to that of its last; a GPU is waited for at these
    two alone."""

    def __init__(self, cfg: Config) -> None:
        self.steps = int(cfg.train.length.removesuffix("step"))
        self.ended = 0

    def end_step(self) -> None:
        self.ended += 1
        if self.ended == 1:
            self.first = _now()
        elif self.ended == self.steps:
            self.last = _now()

    def seconds(self) -> float:
        return (self.last - self.first) / (self.steps - 1)


def _now() -> float:
    """When a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
