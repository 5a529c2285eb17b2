"""The training stream and the evaluation pass that a config asks for."""

import torch

from acn_scale.config import Config, ImageDataConfig
from acn_scale.data.images import ImageDecoder
from acn_scale.data.order import DiskOrder, Order
from acn_scale.data.samples import Decoder, Samples
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import BatchPlan, DeviceCopies, Evaluation, Share, Stream, alone
from acn_scale.data.text import TextDecoder
from acn_scale.durations import Horizon
from acn_scale.errors import UserError


def build_stream(
    cfg: Config, rank: int = 0, world_size: int = 1, share: Share = alone, device: torch.device | None = None
) -> Stream:
    """This rank's training stream. `share` gives all ranks' items to each (distributed.union). Its batches come on a
    GPU that is given as `device`, else in main memory.

    Raises UserError for shards that are missing or do not fit the model.
    """
    index = ShardIndex.load(cfg.data.train, cfg.data.remote)
    order = Order(
        index.samples_per_shard,
        seed=cfg.run.seed,
        streams=cfg.data.streams,
        window=cfg.data.shuffle_window,
        group=cfg.data.group,
    )
    decoder = _decoder(cfg, index, index, training=True)
    samples = _probed(Samples(index, decoder, cfg.data, seed=cfg.run.seed, order=order))
    micro_batch_size = cfg.micro_batch_size(world_size)
    horizon = Horizon.of(cfg.train.length, index.num_samples, cfg.train.global_batch_size)
    ramp = horizon.count(cfg.train.batch_ramp)
    plan = BatchPlan(cfg.train.global_batch_size, micro_batch_size, rank, world_size, cfg.data.group, ramp)
    copies = DeviceCopies(device) if device is not None and device.type == "cuda" else None
    return Stream(samples, cfg.data, plan, share, copies)


def build_evaluation(cfg: Config, rank: int = 0, world_size: int = 1, share: Share = alone) -> Evaluation:
    """This rank's evaluation pass. Raises UserError for shards that are missing or do not fit the model."""
    index, train = (ShardIndex.load(folder, cfg.data.remote) for folder in (cfg.data.eval, cfg.data.train))
    decoder = _decoder(cfg, index, train, training=False)
    return Evaluation(
        _probed(Samples(index, decoder, cfg.data, seed=0, order=DiskOrder(index.samples_per_shard))),
        cfg.data,
        batch_size=cfg.eval.batch_size,
        rank=rank,
        world_size=world_size,
        share=share,
    )


def _decoder(cfg: Config, index: ShardIndex, train: ShardIndex, *, training: bool) -> Decoder:
    if isinstance(cfg.data, ImageDataConfig):
        return ImageDecoder(cfg.data, cfg.model, index, train.info, training=training)
    return TextDecoder(cfg.data, cfg.model, index)


def _probed(samples: Samples) -> Samples:
    """Look for missing shards and read one sample now: what does not fit shows before anything is written."""
    if not samples.skip:
        if missing := samples.folder.missing():
            raise UserError(f"{samples.folder.location}/index.json: lists {missing[0]}, which is not there")
        loaded = samples.__getitems__([0])
        for problem in [*filter(None, [loaded.mistake]), *loaded.faults]:
            raise UserError(str(problem))
    return samples
