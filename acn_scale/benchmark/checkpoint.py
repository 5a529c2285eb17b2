"""How long a checkpoint holds training up, and how soon a run goes on from one, beside Transformers' Trainer."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from acn_scale import distributed
from acn_scale.benchmark import work
from acn_scale.benchmark.loop import our_trainer
from acn_scale.benchmark.model import describe
from acn_scale.benchmark.rows import Row
from acn_scale.benchmark.sides import Measure, Side, beside
from acn_scale.benchmark.startup import startup
from acn_scale.benchmark.trainer import TRAINER, build_trainer, hide_deepspeed
from acn_scale.config import Config
from acn_scale.saving import Checkpoints

BATCH = 4  # a checkpoint does not depend on it


def checkpoint_rows(text: Path | None, rounds: int, scale: work.Scale) -> Iterator[Row]:
    """Seconds. `text` is as for model_rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = text or work.pydoc_shards(folder / "text", scale.bert.max_tokens)
        peer = work.write_peer("hf", scale.bert, folder / "peer", shards)
        cfg = work.config(scale.bert, shards, folder, replace(scale, compile=False), batch=BATCH)
        sides = {"ours": Side(our_stall, cfg), TRAINER: Side(trainer_stall, cfg, peer, folder / "trainer")}
        yield from beside(f"training waits for a checkpoint of {describe(scale.bert)}", sides, rounds)
    yield startup(rounds, resumed=True)


@contextmanager
def our_stall(cfg: Config) -> Iterator[Measure]:
    """Seconds that training waits, the checkpoint before being on the disk."""
    with distributed.process_group() as device, our_trainer(cfg, device) as trainer:
        trainer.run()
        checkpoints = Checkpoints(trainer.folder, keep=1, keep_every=None)
        steps = iter(range(1, 10**8))

        def measure() -> float:
            waited = checkpoints.save(trainer.engine, trainer.stream, next(steps), {})
            checkpoints.finish()
            return waited

        yield measure


@contextmanager
def trainer_stall(cfg: Config, folder: Path, out: Path) -> Iterator[Measure]:
    """Seconds from the end of a step to the end of its checkpoint."""
    hide_deepspeed()
    from transformers import TrainerCallback

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_save(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    times = Times()

    def measure() -> float:
        build_trainer(cfg, folder, out, times, save_strategy="steps", save_steps=1, save_total_limit=1).train()
        return times.seconds

    yield measure
