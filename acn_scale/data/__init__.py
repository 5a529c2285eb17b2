"""The training stream and the evaluation pass that a config asks for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from acn_scale.config import Config, DataConfig, ImageDataConfig, ModelConfig, SentenceDataConfig
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.data.order import BucketedOrder, ChosenOrder, DiskOrder, LengthOrder, Order
from acn_scale.data.samples import Decoder, Samples
from acn_scale.data.sequence import TaskOrder, Turns, deal_classes, keep, samples_of_tasks
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import DeviceCopies, Evaluation, Share, Stream, alone
from acn_scale.durations import Horizon
from acn_scale.errors import UserError

if TYPE_CHECKING:
    from acn_scale.data.image_files import ImageFiles


def build_stream(
    cfg: Config, rank: int = 0, world_size: int = 1, share: Share = alone, device: torch.device | None = None
) -> Stream:
    """This rank's training stream. `share` gives all ranks' items to each (distributed.union). Its batches come on a
    GPU that is given as `device`, else in main memory.

    Raises UserError for shards that are missing or do not fit the model.
    """
    index = ShardIndex.load(cfg.data.train, cfg.data.remote)
    decoder = _decoder(cfg.data, cfg.model, index, index, training=True)
    horizon = Horizon.of(cfg.train.length, index.num_samples // cfg.continual.tasks, cfg.train.global_batch_size)
    order = _task_order(cfg, index, decoder, horizon) if cfg.continual.tasks > 1 else _order(cfg, index)
    samples = _probed(Samples(index, decoder, cfg.data, seed=cfg.run.seed, order=order))
    micro_batch_size = cfg.micro_batch_size(world_size)
    ramp = horizon.count(cfg.train.batch_ramp)
    plan = BatchPlan(cfg.train.global_batch_size, micro_batch_size, rank, world_size, cfg.data.group, ramp)
    copies = DeviceCopies(device) if device is not None and device.type == "cuda" else None
    return Stream(samples, cfg.data, plan, share, copies)


def build_evaluation(cfg: Config, rank: int = 0, world_size: int = 1, share: Share = alone) -> Evaluation:
    """This rank's evaluation pass. Raises UserError for shards that are missing or do not fit the model."""
    return evaluation_of(
        cfg.data, cfg.model, batch_size=cfg.eval.batch_size, rank=rank, world_size=world_size, share=share
    )


def evaluation_of(
    data: DataConfig,
    model: ModelConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share: Share = alone,
    noise: Any = None,
    files: "ImageFiles | None" = None,
    chosen: np.ndarray | None = None,
) -> Evaluation:
    """The same for a network that no run's config goes with. `noise`: what a decoder does to each sample. `files` are
    read in the place of the shards data.eval. `chosen`: numbers of the images to take; default: all.
    """
    index = files.index if files else ShardIndex.load(data.eval, data.remote)
    known = isinstance(data, ImageDataConfig) and data.mean and data.std
    train = index if known else ShardIndex.load(data.train, data.remote)
    decoder = _decoder(data, model, index, train, training=False, noise=noise)
    sizes = index.samples_per_shard
    order = DiskOrder(sizes) if chosen is None else ChosenOrder(sizes, chosen)
    if isinstance(data, SentenceDataConfig):
        order = LengthOrder(sizes, np.array(index.info["lengths"]))
    samples = Samples(index, decoder, data, seed=0, order=order, records=files)
    return Evaluation(_probed(samples), data, batch_size=batch_size, rank=rank, world_size=world_size, share=share)


def _order(cfg: Config, index: ShardIndex) -> Order:
    data = cfg.data
    keys = {"seed": cfg.run.seed, "streams": data.streams, "window": data.shuffle_window, "group": data.group}
    if isinstance(data, SentenceDataConfig) and data.buckets:
        lengths = np.array(index.info["lengths"])
        return BucketedOrder(index.samples_per_shard, lengths=lengths, batch=cfg.train.global_batch_size, **keys)
    return Order(index.samples_per_shard, **keys)


def _task_order(cfg: Config, index: ShardIndex, decoder: Decoder, horizon: Horizon) -> TaskOrder:
    """Raises UserError for a run that is too short, and for a task without samples."""
    continual, seed = cfg.continual, cfg.run.seed
    if horizon.steps < continual.tasks:
        raise UserError(f"train.length = {cfg.train.length}: {horizon.steps} steps for {continual.tasks} tasks")
    sizes = index.samples_per_shard
    labels = Samples(index, decoder, cfg.data, seed=seed, order=DiskOrder(sizes)).labels(range(index.num_samples))
    task_of, tasks = _tasks(cfg, labels, index.folder)
    turns = Turns(horizon.steps, continual.tasks)
    firsts = [turns.start(task) * cfg.train.global_batch_size for task in range(continual.tasks)]
    kept = keep(labels, task_of, continual.memory, seed) if continual.method == "replay" else ()
    return TaskOrder(sizes, tasks, firsts=firsts, seed=seed, kept=kept)


def _tasks(cfg: Config, labels: np.ndarray, folder: str | Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The task of each class, and the samples of each task. Raises UserError for one without any."""
    task_of = deal_classes(cfg.model.num_classes, cfg.continual.tasks, cfg.run.seed)
    tasks = samples_of_tasks(labels, task_of)
    for task, samples in enumerate(tasks):
        if not len(samples):
            raise UserError(f"continual.tasks = {cfg.continual.tasks}: {folder} has no samples of task {task}")
    return task_of, tasks


def evaluations_of_tasks(
    cfg: Config, data: DataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1, share: Share = alone
) -> list[Evaluation]:
    """An evaluation pass over the samples of each task among the shards data.eval. Raises UserError for a task without
    any.
    """
    keys = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "share": share}
    samples = evaluation_of(data, cfg.model, **keys).samples
    _, tasks = _tasks(cfg, samples.labels(range(samples.num_samples)), data.eval)
    return [evaluation_of(data, cfg.model, chosen=chosen, **keys) for chosen in tasks]


def _decoder(
    data: DataConfig, model: ModelConfig, index: ShardIndex, train: ShardIndex, *, training: bool, noise: Any = None
) -> Decoder:
    # Imported here: a run starts with the packages of its own kind of data alone.
    if isinstance(data, ImageDataConfig):
        from acn_scale.data.images import ImageDecoder  # with torchvision comes all of PyTorch's compiler

        return ImageDecoder(data, model, index, train.info, training=training, noise=noise)
    if isinstance(data, SentenceDataConfig):
        from acn_scale.data.sentences import SentenceDecoder

        return SentenceDecoder(data, model, index, noise)
    from acn_scale.data.text import TextDecoder

    return TextDecoder(data, model, index)


def _probed(samples: Samples) -> Samples:
    """Look for missing shards and read one sample now: what does not fit shows before anything is written."""
    if not samples.skip:
        if missing := samples.folder.missing():
            raise UserError(f"{samples.folder.location}/index.json: lists {missing[0]}, which is not there")
        loaded = samples.__getitems__([0])
        for problem in [*filter(None, [loaded.mistake]), *loaded.faults]:
            raise UserError(str(problem))
    return samples
