"""What a run will take before it is started: memory, arithmetic, traffic, time, for any number of GPUs."""

import bisect
import math
from dataclasses import dataclass

from acn_scale.averaging import bucket_size, dealt
from acn_scale.config import Config
from acn_scale.data.shards import ShardIndex
from acn_scale.depth import as_trained, step_flops
from acn_scale.durations import Horizon
from acn_scale.errors import UserError
from acn_scale.hardware import Device
from acn_scale.memory import memory, parameters, trained_weights
from acn_scale.tables import aligned

STAGES = (0, 1, 2, 3)
RESERVE = 0.1  # share of a GPU's memory for its context, NCCL's buffers and what the allocator cannot use
LATENCY = 0.05  # share of the time to sum a bucket of gradients over the ranks that may go by before bytes arrive


def traffic(cfg: Config, *, stage: int, gpus: int, micro_steps: int) -> float:
    """Bytes that each GPU sends in a step (Rajbhandari et al. 2020, section 7): gradients once to be summed and once,
    summed or as weights, to be shared out. From ZeRO-2 on they are summed in each of the `micro_steps`, and with ZeRO-3
    the weights are shared out in each of its two passes.
    """
    trained = parameters(cfg.model, cfg.train.freeze)
    sent = {0: 2 * trained, 1: 2 * trained, 2: (micro_steps + 1) * trained}
    sent[3] = micro_steps * (trained + 2 * parameters(cfg.model))
    return sent[stage] * _width(cfg) * (gpus - 1) / gpus


def _width(cfg: Config) -> int:
    """Bytes of a gradient."""
    return 4 if cfg.train.precision == "fp32" else 2


def largest_micro_batch(cfg: Config, *, stage: int, gpus: int, recompute: bool, device: Device) -> int:
    """The most samples of one pass that a GPU has room for; 0 where it has none for even one."""
    room = device.memory_gib * 2**30 * (1 - RESERVE)

    def fits(micro: int) -> bool:
        return memory(cfg, stage=stage, gpus=gpus, micro_batch_size=micro, recompute=recompute).total <= room

    return bisect.bisect(range(1, 2**20), False, key=lambda micro: not fits(micro))


@dataclass(frozen=True)
class Cluster:
    """What a run is to be planned for."""

    nodes: int
    gpus_per_node: int
    device: Device
    mfu: float  # share of the device's peak rate that the model reaches
    link: float  # bytes that each GPU sends in a second
    latency: float  # seconds until the first of a message's bytes arrives
    price: float  # of an hour of one GPU; 0 leaves it out

    def __post_init__(self) -> None:
        if self.mfu == 0:
            raise UserError("--mfu 0: must be above 0")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Pace:
    """How fast a number of GPUs is expected to be."""

    gpus: int
    sent: float  # bytes, by each GPU in a step
    step_seconds: float

    def days(self, steps: int) -> float:
        return steps * self.step_seconds / 86_400


def pace(cfg: Config, cluster: Cluster, gpus: int) -> Pace:
    """From the arithmetic at the cluster's share of the peak, and the traffic at the speed of its links."""
    total, stage, recompute = cfg.train.global_batch_size, cfg.train.zero_stage, cfg.model.recompute
    most = largest_micro_batch(cfg, stage=stage, gpus=gpus, recompute=recompute, device=cluster.device)
    micro_steps = math.ceil(total / gpus / max(1, most))
    sent = traffic(cfg, stage=stage, gpus=gpus, micro_steps=micro_steps)
    flops = step_flops(cfg.model, cfg.data.mask_ratio, frozen=cfg.train.freeze) * total
    compute = flops / gpus / (cluster.device.peak[cfg.train.precision] * cluster.mfu)
    moving = sent / cluster.link
    return Pace(gpus, sent, compute + max(0.0, moving - _hidden(cfg, stage, micro_steps, moving, 2 / 3 * compute)))


def _hidden(cfg: Config, stage: int, micro_steps: int, moving: float, backward: float) -> float:
    """Seconds of the traffic, `moving` in all, that go by in the backward passes, two thirds of the arithmetic: as many
    as these take with ZeRO-3, else of gradients that are summed while others are computed. The last bucket has none.
    """
    if stage == 3:
        return backward
    if stage and not cfg.train.overlap_comm:
        return 0.0
    summing = {0: 1.0, 1: 1 / 2, 2: micro_steps / (micro_steps + 1)}[stage]  # of the traffic; the rest are weights
    weights, trained = trained_weights(cfg.model, cfg.train.freeze), parameters(cfg.model, cfg.train.freeze)
    buckets = dealt(weights, bucket_size(cfg.train, stage, trained))
    last = sum(weight.numel() for weight in buckets[-1]) / trained
    return min(backward if stage == 2 else backward / micro_steps, summing * (1 - last) * moving)


def bucket_for(cfg: Config, cluster: Cluster) -> int:
    """Gradients of the smallest bucket that takes the GPUs no more than `LATENCY` of waiting to sum, or of the largest
    that averaging.py makes, if that is smaller. A larger one takes more memory and is hardly faster.

    In a ring of n GPUs each sends an n-th of the bucket 2 (n - 1) times, and waits for each.
    """
    size = cluster.gpus * cluster.latency * cluster.link * (1 / LATENCY - 1)
    train = cfg.train.model_copy(update={"bucket_size": math.ceil(size / _width(cfg))})
    return bucket_size(train, train.zero_stage, parameters(cfg.model, train.freeze))


def shards_per_node(cfg: Config, shards: int, cluster: Cluster) -> int:
    """Shards that a node reads in an epoch: its part where the ranks divide the streams, else all of them."""
    return math.ceil(shards / cluster.nodes) if cfg.data.streams % cluster.gpus == 0 else shards


def plan(cfg: Config, cluster: Cluster, samples: int | None = None) -> str:
    """All of it as tables. `samples`: of an epoch, where there are no shards to look at yet.

    Raises UserError for a global batch that cannot be dealt to the GPUs, and for shards that are not there.
    """
    cfg.micro_batch_size(cluster.gpus)
    index = None if samples else ShardIndex.load(cfg.data.train, cfg.data.remote)
    samples = (samples or index.num_samples) // cfg.continual.tasks
    steps = Horizon.of(cfg.train.length, samples, cfg.train.global_batch_size).steps
    cfg = as_trained(cfg, index.info if index else {})
    parts = [_head(cfg, cluster, steps), _memory_table(cfg, cluster), _pace_table(cfg, cluster, steps)]
    parts.append(_buckets(cfg, cluster))
    if index is not None:
        mine = shards_per_node(cfg, len(index.shards), cluster)
        parts.append(f"{mine:,} of {len(index.shards):,} shards are read by each node in an epoch")
    return "\n\n".join(parts)


def _head(cfg: Config, cluster: Cluster, steps: int) -> str:
    total, flops = cfg.train.global_batch_size, step_flops(cfg.model, cfg.data.mask_ratio, frozen=cfg.train.freeze)
    return (
        f"{cfg.run.name}: {parameters(cfg.model):,} parameters, {cfg.train.precision}; "
        f"{steps:,} steps of {total:,} samples\n"
        f"{flops / 1e9:,.1f} GFLOPs a sample forward and backward, {flops * total / 1e12:,.1f} TFLOPs a step\n"
        f"on {cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.device.memory_gib:.0f} GiB, "
        f"{cfg.micro_batch_size(cluster.gpus)} samples a pass"
    )


def _memory_table(cfg: Config, cluster: Cluster) -> str:
    micro = cfg.micro_batch_size(cluster.gpus)
    rows = [["GiB a GPU", "weights", "gradients", "optimizer", "activations", "total", "largest micro batch"]]
    for stage in STAGES:
        for recompute in (False, True):
            setting = {"stage": stage, "gpus": cluster.gpus, "recompute": recompute}
            needs = memory(cfg, micro_batch_size=micro, **setting)
            largest = largest_micro_batch(cfg, device=cluster.device, **setting)
            this = stage == cfg.train.zero_stage and recompute == cfg.model.recompute
            name = f"ZeRO-{stage}{', recompute' if recompute else ''}{' (this config)' if this else ''}"
            values = needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.total
            rows.append(
                [name, *(f"{value / 2**30:.2f}" for value in values), f"{largest:,}" if largest else "none fits"]
            )
    return aligned(rows)


def _pace_table(cfg: Config, cluster: Cluster, steps: int) -> str:
    """From 1 to 4,096 GPUs, doubling, and the cluster at hand."""
    total = cfg.train.global_batch_size
    head = ["GPUs", "step (s)", "samples/s", "efficiency", "sent a step (GB)", "days", "GPU hours"]
    rows = [head + (["cost"] if cluster.price else [])]
    alone = pace(cfg, cluster, 1).step_seconds
    counts = sorted({*(2**power for power in range(13)), cluster.gpus})
    dealt = [gpus for gpus in counts if total % (gpus * cfg.data.group) == 0]
    for gpus in dealt:
        at = pace(cfg, cluster, gpus)
        hours = at.days(steps) * 24 * gpus
        cells = [f"{at.step_seconds:.3f}", f"{total / at.step_seconds:,.0f}", f"{alone / at.step_seconds / gpus:.0%}"]
        cells += [f"{at.sent / 1e9:.2f}", f"{at.days(steps):,.2f}", f"{hours:,.0f}"]
        cells += [f"{hours * cluster.price:,.0f}"] if cluster.price else []
        rows.append([f"{gpus:,}{' (this)' if gpus == cluster.gpus else ''}", *cells])
    rest = ", ".join(f"{gpus:,}" for gpus in counts if gpus not in dealt)
    speeds = f"{cluster.mfu:.0%} of the peak rate, {cluster.link / 1e9:g} GB/s for each GPU"
    last = f"\n{total:,} samples cannot be dealt to {rest} GPUs" if rest else ""
    return f"At {speeds}, ZeRO-{cfg.train.zero_stage}:\n{aligned(rows)}{last}"


def _buckets(cfg: Config, cluster: Cluster) -> str:
    size = bucket_for(cfg, cluster)
    waiting = cluster.gpus * cluster.latency
    waiting /= waiting + size * _width(cfg) / cluster.link
    return (
        f"train.bucket_size={size} (this config: {cfg.train.bucket_size}): {size * _width(cfg) / 2**30:.2f} GiB of "
        f"gradients, at {1e6 * cluster.latency:g} us a message {waiting:.0%} of the time to sum them is waiting"
    )
