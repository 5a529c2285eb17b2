"""A training step beside Transformers' BERT and timm's ViT and Mixer."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from acn_scale import distributed
from acn_scale.benchmark import work
from acn_scale.benchmark.rows import Row, row
from acn_scale.benchmark.sides import Measure, Side, compare
from acn_scale.benchmark.trainer import hide_deepspeed, masked_tokens
from acn_scale.config import Config, ImageModelConfig, ModelConfig
from acn_scale.data import build_stream
from acn_scale.depth import step_flops
from acn_scale.engine import build_engine, train_step
from acn_scale.errors import UserError
from acn_scale.hardware import peak_rate
from acn_scale.models import build_model


def model_rows(text: Path | None, rounds: int, scale: work.Scale) -> Iterator[Row]:
    """Seconds of a step of our engine, and of the peer's model with PyTorch's AdamW, from the batch to the update; on
    several ranks of our ZeRO-0 and the peer's DistributedDataParallel.

    `text` is a folder of text shards with train and eval; without it some are made.
    """
    with tempfile.TemporaryDirectory() as folder:
        shards = text or work.pydoc_shards(Path(folder) / "text", scale.bert.max_tokens)
        for model in (scale.bert, scale.vit, scale.mixer):
            text_model = model is scale.bert
            twins = [model, model.model_copy(update={"connectivity": "acn"})]
            batch = scale.ranks * (scale.text_batch if text_model else scale.image_batch)
            cfgs = [work.config(twin, shards, Path(folder), scale, batch=batch) for twin in twins]
            to, theirs, peer = ("hf", transformers_step, "Transformers") if text_model else ("timm", timm_step, "timm")
            peer_folder = work.write_peer(to, model, Path(folder) / model.name, shards if text_model else None)
            sides = {cfg.model.connectivity: Side(our_step, cfg, scale.steps, ranks=scale.ranks) for cfg in cfgs}
            sides["peer"] = Side(theirs, cfgs[0], peer_folder, scale.steps, ranks=scale.ranks)
            yield from _rows(sides, cfgs, peer, rounds, scale)


def _rows(sides: dict[str, Side], cfgs: list[Config], peer: str, rounds: int, scale: work.Scale) -> Iterator[Row]:
    figures, peaks = compare(sides, rounds)
    one = peak_rate(distributed.local_device(), scale.precision)
    rate = one and scale.ranks * one
    on = f" on {scale.ranks} ranks" if scale.ranks > 1 else ""
    for cfg in cfgs:
        name = cfg.model.connectivity
        yield row(
            f"{name} {describe(cfg.model)} training step, batch {cfg.train.global_batch_size}{on}",
            peer,
            "s",
            figures[name],
            figures["peer"],
            more_is_better=False,
            peaks=(peaks[name], peaks["peer"]),
            least=rate and step_flops(cfg.model, cfg.data.mask_ratio) * cfg.train.global_batch_size / rate,
        )


def describe(model: ModelConfig) -> str:
    size = f"{model.depth} x {model.dim}"
    if isinstance(model, ImageModelConfig):
        return f"{model.name} {size}, {model.image_size} px in patches of {model.patch_size},"
    return f"{model.name} {size}, {model.max_tokens} tokens, vocabulary {model.vocab_size:,},"


def _images(cfg: Config, device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's, on the device already: how they get there is the work of loaders."""
    model, batch = cfg.model, cfg.micro_batch_size(distributed.world_size())
    images = torch.randn(batch, model.channels, model.image_size, model.image_size, device=device)
    return {"images": images, "labels": torch.randint(model.num_classes, (batch,), device=device)}


@contextmanager
def our_step(cfg: Config, steps: int) -> Iterator[Measure]:
    """Our stream of masked text, or one batch of images, through our engine."""
    with distributed.process_group() as device:
        torch.manual_seed(0)
        if isinstance(cfg.model, ImageModelConfig):
            stream = repeat(_images(cfg, device))
        else:
            stream = build_stream(cfg, distributed.rank(), distributed.world_size(), device=device)
        engine = build_engine(build_model(cfg.model), cfg, device, distributed.world_size())
        yield partial(work.seconds, partial(train_step, engine, stream, work.LR), steps)


@contextmanager
def _peer_ranks() -> Iterator[torch.device]:
    """The process group of a peer, which convolves as PyTorch does by default; ours are set to be exact."""
    with distributed.process_group() as device:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
        yield device


@contextmanager
def transformers_step(cfg: Config, folder: Path, steps: int) -> Iterator[Measure]:
    """The same sequences, masked anew by Transformers' collator."""
    hide_deepspeed()
    with _peer_ranks() as device:
        task = masked_tokens(Path(cfg.data.train), folder)
        loader = torch.utils.data.DataLoader(
            task.rows,
            batch_size=cfg.micro_batch_size(distributed.world_size()),
            sampler=torch.utils.data.DistributedSampler(task.rows, drop_last=True),
            drop_last=True,
            collate_fn=task.collator,
            num_workers=cfg.data.workers,
            pin_memory=device.type == "cuda",
            persistent_workers=cfg.data.workers > 0,
        )
        if not len(loader):
            raise UserError(f"{len(task.rows)} sequences: too few for a batch on each rank; name more with --text")
        batches = (batch for _ in repeat(None) for batch in loader)
        yield bare_step(task.model, lambda model, batch: model(**batch).loss, batches, cfg, steps, device)


@contextmanager
def timm_step(cfg: Config, folder: Path, steps: int) -> Iterator[Measure]:
    from acn_scale.convert.timm_models import load_timm

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["images"]), batch["labels"])

    with _peer_ranks() as device:
        torch.manual_seed(0)
        yield bare_step(load_timm(folder), loss, repeat(_images(cfg, device)), cfg, steps, device)


def bare_step(model, loss, batches, cfg: Config, steps: int, device: torch.device) -> Measure:
    """A bare PyTorch loop's step, in bf16 by autocast."""
    model.train().to(device)
    if cfg.train.compile:
        work.compile_blocks(model)
    if distributed.world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.LR, weight_decay=work.WEIGHT_DECAY, fused=True)

    def step() -> None:
        batch = {name: values.to(device, non_blocking=True) for name, values in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bf16"):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return partial(work.seconds, step, steps)
