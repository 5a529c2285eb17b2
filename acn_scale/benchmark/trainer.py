"""Transformers' Trainer as its users run it: masked language modelling on packed sequences."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from acn_scale.benchmark import work
from acn_scale.benchmark.sides import Measure
from acn_scale.config import Config
from acn_scale.data.tokenizer import MASK


def hide_deepspeed() -> None:
    """Its users need not have DeepSpeed, and where it is found Transformers imports it. Call it before that."""
    sys.modules["deepspeed"] = None


def dataset(shards: Path) -> list[dict[str, Any]]:
    """The sequences of text shards, all in memory."""
    rows = work.tokens_of(shards)
    return [{"input_ids": row.tolist(), "special_tokens_mask": (row <= MASK).astype(int).tolist()} for row in rows]


def collator(folder: Path) -> Any:
    """It masks anew each time that a sequence comes."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(folder), mlm_probability=work.MASK_RATIO)


def build_trainer(cfg: Config, folder: Path, out: Path, *callbacks: Any, **arguments: Any) -> Any:
    """A Trainer on the network in `folder` with the settings of a run of ours."""
    hide_deepspeed()
    from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=int(cfg.train.length.removesuffix("step")),
        per_device_train_batch_size=cfg.train.global_batch_size,
        learning_rate=cfg.optim.lr,
        weight_decay=cfg.optim.weight_decay,
        max_grad_norm=cfg.train.clip_norm,
        bf16=cfg.train.precision == "bf16",
        lr_scheduler_type="cosine",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "dataloader_drop_last": True} | arguments,
    )
    return Trainer(
        model=AutoModelForMaskedLM.from_pretrained(folder),
        args=settings,
        train_dataset=dataset(Path(cfg.data.train)),
        data_collator=collator(folder),
        callbacks=list(callbacks),
    )


@contextmanager
def trainer_loop(cfg: Config, folder: Path, out: Path) -> Iterator[Measure]:
    """Seconds of a step, from the end of the first step to that of the last."""
    hide_deepspeed()
    from transformers import TrainerCallback

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    times = Times()

    def measure() -> float:
        build_trainer(cfg, folder, out, times).train()
        return (times.ends[-1] - times.ends[0]) / (len(times.ends) - 1)

    yield measure
