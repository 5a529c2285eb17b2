"""What our training loop costs over a bare PyTorch loop, on the same model, data and optimizer, in one process."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from acn_scale import distributed
from acn_scale.benchmark.rows import Row, in_turns, row
from acn_scale.checkpoint import Checkpoints
from acn_scale.config import Config
from acn_scale.data import build_stream
from acn_scale.data.make_images import make_image_shards
from acn_scale.durations import Horizon
from acn_scale.log import setup_logging
from acn_scale.models import build_model
from acn_scale.optim import build_optimizer, learning_rate
from acn_scale.pretrain import Trainer
from acn_scale.runs import open_run_folder
from acn_scale.stopping import StopSignals
from acn_scale.watchdog import Watchdog

STEPS = 20  # of a round, between the first step and the last


def loop_rows(rounds: int) -> list[Row]:
    """Seconds of a step, and how long a checkpoint holds training up. A ratio of 1 is no overhead."""
    with tempfile.TemporaryDirectory() as folder, distributed.process_group() as device:
        for split in ("train", "eval"):
            make_image_shards("digits", split, Path(folder) / split)
        figures = in_turns({"ours": lambda: ours(config(folder), device), "bare": lambda: bare(config(folder))}, rounds)
        stalls = in_turns({"stall": lambda: stall(config(folder), device)}, rounds)["stall"]
    work = f"a step of ViT, 6 blocks of width 192, on {device.type}"
    return [
        row(work, "bare PyTorch", "s", figures["ours"], figures["bare"], more_is_better=False),
        row("a checkpoint of it: training waits", "one step", "s", stalls, figures["ours"], more_is_better=False),
    ]


def config(folder: str) -> Config:
    """A step takes a few tenths of a second on one core."""
    model = {"name": "vit", "connectivity": "acn", "depth": 6, "dim": 192, "num_heads": 3, "image_size": 8}
    return Config.model_validate(
        {
            "run": {"name": "loop", "dir": f"{folder}/runs"},
            "model": model | {"patch_size": 2, "channels": 1, "num_classes": 10},
            "data": {"kind": "images", "train": f"{folder}/train", "eval": f"{folder}/eval"},
            "optim": {"lr": 1e-3},
            "train": {"length": f"{STEPS + 1}step", "global_batch_size": 64, "clip_norm": 1.0, "log_every": "10step"},
            "eval": {"every": "1000step"},
            "checkpoint": {"every": "1000step"},
        }
    )


class _Timed(Trainer):
    """Notes when each step began. What comes after the last one is left out."""

    def take(self, step: int):
        self.times = [*getattr(self, "times", []), time.perf_counter()]
        return super().take(step)

    def evaluate(self, step: int) -> int:
        return self.depth

    def save(self, step: int, depth: int) -> None:
        pass


@contextlib.contextmanager
def _trainer(cfg: Config, device: torch.device) -> Iterator[_Timed]:
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": folder})})
        stream = build_stream(cfg, share=distributed.union, device=device)
        horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
        run = open_run_folder(cfg, horizon.steps)
        setup_logging(run, rank=1)  # warnings only
        with StopSignals() as signals, Watchdog(run, 0, 1, 600.0) as watchdog, contextlib.closing(stream):
            yield _Timed(cfg, device, run, stream, (), horizon, signals, watchdog)


def ours(cfg: Config, device: torch.device) -> float:
    """Seconds of a step of the whole trainer, with everything that it does but evaluating and saving."""
    with _trainer(cfg, device) as trainer:
        trainer.run()
        return (trainer.times[-1] - trainer.times[0]) / STEPS


def bare(cfg: Config) -> float:
    """The same with PyTorch alone; the loss is looked at once in a while."""
    device = distributed.local_device()
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model).to(device)
    optimizer = build_optimizer(model, cfg.optim)
    stream = build_stream(cfg, device=device)
    horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
    times = []
    for step in range(STEPS + 1):
        times.append(time.perf_counter())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, horizon, step)
        loss = model(**next(stream))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            loss.item()
    return (times[-1] - times[0]) / STEPS


def stall(cfg: Config, device: torch.device) -> float:
    """Seconds that training waits for a checkpoint, the one before it being done."""
    with _trainer(cfg, device) as trainer:
        trainer.run()
        checkpoints = Checkpoints(trainer.folder, keep=1, keep_every=None)
        waits = []
        for step in range(1, 4):
            waits.append(checkpoints.save(trainer.engine, trainer.stream, step, {}))
            checkpoints.finish()
        return statistics.median(waits)
