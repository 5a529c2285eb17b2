"""Transformers' Trainer as its users run it: masked tokens of packed sequences, or sentences of classes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acn_scale.benchmark import work
from acn_scale.benchmark.sides import Measure
from acn_scale.config import Config
from acn_scale.data.tokenizer import MASK

TRAINER = "Transformers Trainer"


def hide_deepspeed() -> None:
    """Its users need not have DeepSpeed, and where it is found Transformers imports it. Call it before that."""
    sys.modules["deepspeed"] = None


@dataclass(frozen=True)
class Work:
    """What a Trainer is given: rows in memory, what makes batches of them, and the network."""

    model: Any
    rows: list[dict[str, Any]]
    collator: Any


def masked_tokens(shards: Path, folder: Path) -> Work:
    """The sequences of text shards, masked anew each time that one comes."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        {"input_ids": row.tolist(), "special_tokens_mask": (row <= MASK).astype(int).tolist()}
        for row in work.tokens_of(shards)
    ]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=work.MASK_RATIO)
    return Work(AutoModelForMaskedLM.from_pretrained(folder), rows, collator)


def sentences(shards: Path, folder: Path, max_tokens: int) -> Work:
    """The sentences of shards, tokenized once and for all; a batch is padded to its longest."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        dict(tokenizer(*row["texts"], truncation=True, max_length=max_tokens)) | {"labels": int(row["label"])}
        for row in work.sentences_of(shards)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return Work(model, rows, DataCollatorWithPadding(tokenizer))


def build_trainer(cfg: Config, folder: Path, out: Path, *callbacks: Any, **arguments: Any) -> Any:
    """A Trainer on the network in `folder` with the settings of a run of ours."""
    hide_deepspeed()
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=int(cfg.train.length.removesuffix("step")),
        per_device_train_batch_size=cfg.train.global_batch_size,
        learning_rate=cfg.optim.lr,
        weight_decay=cfg.optim.weight_decay,
        max_grad_norm=cfg.train.clip_norm,
        bf16=cfg.train.precision == "bf16",
        dataloader_num_workers=cfg.data.workers,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length" if cfg.model.num_classes else "random",  # as ours batches sentences
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", "dataloader_drop_last": True} | arguments,
    )
    shards = Path(cfg.data.train)
    task = sentences(shards, folder, cfg.model.max_tokens) if cfg.model.num_classes else masked_tokens(shards, folder)
    if cfg.train.compile:
        work.compile_blocks(task.model)
    return Trainer(task.model, settings, task.collator, task.rows, callbacks=list(callbacks))


@contextmanager
def trainer_loop(cfg: Config, folder: Path, out: Path) -> Iterator[Measure]:
    """Seconds of a step."""
    hide_deepspeed()
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def __init__(self) -> None:
            self.laps = work.Laps(cfg)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.laps.end_step()

    def measure() -> float:
        timed = Timed()
        build_trainer(cfg, folder, out, timed).train()
        return timed.laps.seconds()

    yield measure
