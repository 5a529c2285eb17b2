"""The training stream and the evaluation pass that a config asks for."""

from acn_scale.config import Config, ImageDataConfig
from acn_scale.data.images import ImageDecoder
from acn_scale.data.shards import Order, ShardIndex
from acn_scale.data.stream import Decoder, Evaluation, Samples, Stream
from acn_scale.data.text import TextDecoder


def build_stream(cfg: Config, rank: int = 0, world_size: int = 1) -> Stream:
    """This rank's training stream. Raises UserError for shards that are missing or do not fit the model."""
    index = ShardIndex.load(cfg.data.train)
    order = Order(
        index.samples_per_shard,
        seed=cfg.run.seed,
        streams=cfg.data.streams,
        window=cfg.data.shuffle_window,
        group=cfg.data.group,
    )
    samples = _probed(Samples(index, _decoder(cfg, index, index, training=True), cfg.run.seed, order))
    return Stream(
        samples,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.micro_batch_size(world_size),
        rank=rank,
        world_size=world_size,
        workers=cfg.data.workers,
    )


def build_evaluation(cfg: Config, rank: int = 0, world_size: int = 1) -> Evaluation:
    """This rank's evaluation pass. Raises UserError for shards that are missing or do not fit the model."""
    index, train = ShardIndex.load(cfg.data.eval), ShardIndex.load(cfg.data.train)
    samples = _probed(Samples(index, _decoder(cfg, index, train, training=False), 0, None))
    return Evaluation(
        samples, batch_size=cfg.eval.batch_size, rank=rank, world_size=world_size, workers=cfg.data.workers
    )


def _decoder(cfg: Config, index: ShardIndex, train: ShardIndex, *, training: bool) -> Decoder:
    if isinstance(cfg.data, ImageDataConfig):
        return ImageDecoder(cfg.data, cfg.model, index, train.info, training=training)
    return TextDecoder(cfg.data, cfg.model, index)


def _probed(samples: Samples) -> Samples:
    """Read one sample now: what does not fit shows before anything is written."""
    samples.__getitems__([0])
    return samples
