"""Our training loop beside a bare PyTorch one and beside Transformers' Trainer, with everything but evaluations."""

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from acn_scale import distributed
from acn_scale.benchmark import work
from acn_scale.benchmark.model import describe
from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import Measure, Side, beside
from acn_scale.benchmark.startup import startup
from acn_scale.benchmark.trainer import TRAINER, trainer_loop
from acn_scale.config import Config, ViTConfig
from acn_scale.data import build_stream
from acn_scale.data.make_images import make_image_shards
from acn_scale.durations import Horizon
from acn_scale.engine import Step
from acn_scale.log import setup_logging
from acn_scale.models import build_model
from acn_scale.optim import build_optimizer, learning_rate
from acn_scale.pretrain import Trainer
from acn_scale.runs import open_run_folder
from acn_scale.stopping import StopSignals
from acn_scale.watchdog import Watchdog

STEPS = 20  # of a turn beside the bare loop; a step takes a few tenths of a second on one core
SMALL = ViTConfig(
    name="vit",
    connectivity="acn",
    depth=6,
    dim=192,
    num_heads=3,
    image_size=8,
    patch_size=2,
    channels=1,
    num_classes=10,
)


def loop_rows(text: Path | None, rounds: int, scale: work.Scale) -> Iterator[Row]:
    """Seconds of a step of the whole loop, and from a command to its first step.

    `text` is as for model_rows.
    """
    yield from _beside_bare(rounds, scale)
    yield from _beside_trainer(text, rounds, scale)
    yield startup(rounds)


def _beside_bare(rounds: int, scale: work.Scale) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "eval"):
            make_image_shards("digits", split, Path(folder) / split)
        plain = replace(scale, precision="fp32", compile=False)
        cfg = work.config(SMALL, Path(folder), Path(folder), plain, batch=64, steps=STEPS + 1)
        sides = {"ours": Side(our_loop, cfg), "bare PyTorch": Side(bare_loop, cfg)}
        yield from beside(f"loop of {describe(SMALL)} batch 64", sides, rounds)


def _beside_trainer(text: Path | None, rounds: int, scale: work.Scale) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = text or work.pydoc_shards(folder / "text", scale.bert.max_tokens)
        peer = work.write_peer("hf", scale.bert, folder / "peer", shards)
        batch, steps = scale.text_batch, 2 * scale.steps + 1
        cfg = work.config(scale.bert, shards, folder, scale, batch=batch, steps=steps)
        sides = {"ours": Side(our_loop, cfg), TRAINER: Side(trainer_loop, cfg, peer, folder / "trainer")}
        yield from beside(f"loop from shards of {describe(scale.bert)} batch {batch}", sides, rounds)


class _Timed(Trainer):
    """Notes when steps end. What comes after the last one is left out."""

    laps: work.Laps

    def take(self, step: int) -> Step:
        result = super().take(step)
        self.laps.end_step()
        return result

    def evaluate(self, step: int) -> int:
        return self.depth

    def save(self, step: int, depth: int) -> None:
        pass


@contextlib.contextmanager
def our_trainer(cfg: Config, device: torch.device) -> Iterator[_Timed]:
    """Our trainer, in a run folder of its own."""
    Path(cfg.run.dir).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cfg.run.dir) as folder:
        cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": folder})})
        stream = build_stream(cfg, share=distributed.union, device=device)
        horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
        with (
            open_run_folder(cfg, horizon.steps) as run,
            StopSignals() as signals,
            Watchdog(run, 0, 1, 600.0) as watchdog,
            contextlib.closing(stream),
        ):
            setup_logging(run, rank=1)  # warnings only
            trainer = _Timed(cfg, device, run, stream, (), horizon, signals, watchdog)
            trainer.laps = work.Laps(cfg)
            yield trainer


@contextlib.contextmanager
def our_loop(cfg: Config) -> Iterator[Measure]:
    """Seconds of a step of the whole trainer, with everything that it does but evaluating and saving."""
    with distributed.process_group() as device:

        def measure() -> float:
            gc.collect()  # DeepSpeed's engine of the turn before refers to itself
            with our_trainer(cfg, device) as trainer:
                trainer.run()
                return trainer.laps.seconds()

        yield measure


@contextlib.contextmanager
def bare_loop(cfg: Config) -> Iterator[Measure]:
    """The same with PyTorch alone; the loss is looked at once in a while."""
    device = distributed.local_device()

    def measure() -> float:
        torch.manual_seed(cfg.run.seed)
        model = build_model(cfg.model).to(device)
        optimizer = build_optimizer(model, cfg.optim)
        laps = work.Laps(cfg)
        with contextlib.closing(build_stream(cfg, device=device)) as stream:
            horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
            for step in range(horizon.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(cfg.optim, horizon, step)
                loss = model(**{name: values.to(device) for name, values in next(stream).items()})["loss"]
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                if step % 10 == 9:
                    loss.item()
                laps.end_step()
        return laps.seconds()

    yield measure
