"""What a run will take before it is started: memory, arithmetic, traffic, time, for any number of GPUs."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from acn_scale.config import Config, ModelConfig
from acn_scale.data.shards import ShardIndex
from acn_scale.depth import batch_of, step_flops
from acn_scale.durations import Horizon
from acn_scale.errors import UserError
from acn_scale.hardware import Device
from acn_scale.models import build_model
from acn_scale.report import aligned

STAGES = (0, 1, 2, 3)
RESERVE = 0.1  # share of a GPU's memory for its context, NCCL's buffers and what the allocator cannot use
BUCKET = 500_000_000  # elements of DeepSpeed's buffer for gradients, at most


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


def memory(cfg: Config, *, stage: int, gpus: int, micro_batch_size: int, recompute: bool) -> Memory:
    """After Rajbhandari et al. 2020 (ZeRO), table 1, and what DeepSpeed keeps besides."""
    model = cfg.model.model_copy(update={"recompute": recompute})
    count = parameters(model)
    half = cfg.train.precision != "fp32"
    width = 2 if half else 4
    share = 1 / gpus
    weights = count * width * (share if stage == 3 else 1)
    gradients = count * width * (share if stage >= 2 else 1)
    master = 4 * count if half or stage else 0
    optimizer = (master + 8 * count) * (share if stage else 1)
    if cfg.train.offload != "none":
        optimizer = 0.0
    if cfg.train.offload == "parameters":
        weights = 0.0
    activations = micro_batch_size * activation_bytes(model, width)
    return Memory(weights, gradients, optimizer, _buffers(count, width, stage, share), activations)


def _buffers(count: int, width: int, stage: int, share: float) -> float:
    """DeepSpeed's bucket of gradients, and the flat fp32 gradients and AdamW's two temporaries of an update."""
    bucket = min(BUCKET, count) * width
    return bucket + (3 * 4 * count * share if stage else 0.0)


@lru_cache
def parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model).parameters())


@lru_cache
def activation_bytes(model: ModelConfig, width: int, mask_ratio: float = 0.15) -> int:
    """Bytes that the forward pass of one sample leaves for the backward pass, each tensor counted once.

    With recomputing, also the tensors of the one block that is being recomputed.
    """
    whole = _saved(model, mask_ratio)
    if model.recompute:
        one = model.model_copy(update={"depth": 1, "recompute": False})
        none = model.model_copy(update={"depth": 1, "recompute": True})
        whole += max(0, _saved(one, mask_ratio) - _saved(none, mask_ratio))
    return whole * width // 4


def _saved(model: ModelConfig, mask_ratio: float) -> int:
    samples = 2
    seen = WeakTensorKeyDictionary()
    sizes: list[int] = []
    with torch.device("meta"):
        network = build_model(model)
        batch = batch_of(model, samples, mask_ratio)
        own = {id(parameter) for parameter in network.parameters()}
        kept = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            base = tensor._base if tensor._base is not None else tensor
            if id(base) not in own and base not in seen:
                seen[base] = True
                kept.append(base)
                sizes.append(storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(**batch)["loss"]
    return sum(sizes) // samples


def traffic(cfg: Config, *, stage: int, gpus: int) -> float:
    """Bytes that each GPU sends in a step (Rajbhandari et al. 2020, section 7): gradients once to be summed and, summed
    or as weights, once to be shared out; with ZeRO-3 the weights once more, for each of the two passes.
    """
    width = 4 if cfg.train.precision == "fp32" else 2
    rounds = 3 if stage == 3 else 2
    return rounds * parameters(cfg.model) * width * (gpus - 1) / gpus


def largest_micro_batch(cfg: Config, *, stage: int, gpus: int, recompute: bool, device: Device) -> int | None:
    """The most samples of one pass that fit and divide a GPU's share of the global batch; None where none do."""
    share, group = cfg.train.global_batch_size // gpus, cfg.data.group
    room = device.memory_gib * 2**30 * (1 - RESERVE)
    for micro in range(share, 0, -1):
        fits = share % micro == 0 and micro % group == 0
        if fits and memory(cfg, stage=stage, gpus=gpus, micro_batch_size=micro, recompute=recompute).total <= room:
            return micro
    return None


@dataclass(frozen=True)
class Pace:
    """How fast a number of GPUs is expected to be."""

    gpus: int
    step_seconds: float
    samples_per_second: float
    days: float
    gpu_hours: float


def pace(cfg: Config, steps: int, *, gpus: int, device: Device, mfu: float, link_gbytes: float) -> Pace:
    """From the arithmetic at `mfu` of the device's peak, and the traffic at `link_gbytes` (1e9 bytes a second a GPU).

    The backward pass, two thirds of the arithmetic, hides as much of the traffic as it is long.
    """
    mask_ratio = getattr(cfg.data, "mask_ratio", 0.15)
    flops = step_flops(cfg.model, mask_ratio) * cfg.train.global_batch_size
    compute = flops / gpus / (device.peak[cfg.train.precision] * mfu)
    sending = traffic(cfg, stage=cfg.train.zero_stage, gpus=gpus) / (link_gbytes * 1e9)
    seconds = compute + max(0.0, sending - 2 / 3 * compute)
    days = steps * seconds / 86_400
    return Pace(gpus, seconds, cfg.train.global_batch_size / seconds, days, days * 24 * gpus)


def shards_per_node(cfg: Config, shards: int, nodes: int, gpus_per_node: int) -> int:
    """Shards that a node reads in an epoch: its part where the ranks divide the streams, else all of them."""
    ranks = nodes * gpus_per_node
    return math.ceil(shards / nodes) if cfg.data.streams % ranks == 0 else shards


def counts(cfg: Config) -> list[int]:
    """Numbers of GPUs from 1 to 4,096, doubling, that the global batch can be dealt to."""
    return [2**k for k in range(13) if cfg.train.global_batch_size % (2**k * cfg.data.group) == 0]


def plan(
    cfg: Config,
    *,
    nodes: int,
    gpus_per_node: int,
    device: Device,
    mfu: float,
    link_gbytes: float,
    price: float,
    samples: int | None,
) -> str:
    """All of it as tables. `samples`: of an epoch, where there are no shards to look at yet; `price` of a GPU's hour.

    Raises UserError for a global batch that cannot be dealt to the GPUs, and for shards that are not there.
    """  # fmt: skip
    gpus, total = nodes * gpus_per_node, cfg.train.global_batch_size
    if total % (gpus * cfg.data.group):
        raise UserError(f"train.global_batch_size = {total}: cannot be dealt to {gpus} GPUs")
    index = None if samples else ShardIndex.load(cfg.data.train, cfg.data.remote)
    steps = Horizon.of(cfg.train.length, samples or index.num_samples, total).steps
    mask_ratio = getattr(cfg.data, "mask_ratio", 0.15)
    flops = step_flops(cfg.model, mask_ratio)
    micro = cfg.micro_batch_size(gpus)
    parts = [
        f"{cfg.run.name}: {parameters(cfg.model):,} parameters, {cfg.train.precision}; "
        f"{steps:,} steps of {total} samples;\n"
        f"{flops / 1e9:,.1f} GFLOPs a sample forward and backward, {flops * total / 1e12:,.1f} TFLOPs a step;\n"
        f"on {nodes} x {gpus_per_node} GPUs of {device.memory_gib:.0f} GiB, {micro} samples a pass"
    ]
    rows = [
        ["GiB a GPU", "weights", "gradients", "optimizer", "buffers", "activations", "total", "largest micro batch"]
    ]
    for stage in STAGES:
        for recompute in (False, True):
            needs = memory(cfg, stage=stage, gpus=gpus, micro_batch_size=micro, recompute=recompute)
            largest = largest_micro_batch(cfg, stage=stage, gpus=gpus, recompute=recompute, device=device)
            values = needs.weights, needs.gradients, needs.optimizer, needs.buffers, needs.activations, needs.total
            this = stage == cfg.train.zero_stage and recompute == cfg.model.recompute
            name = f"ZeRO-{stage}{', recompute' if recompute else ''}{' (this config)' if this else ''}"
            rows.append([name, *(f"{value / 2**30:.2f}" for value in values), str(largest or "none fits")])
    parts.append(aligned(rows))
    parts.append(
        f"At {mfu:.0%} of the peak rate and {link_gbytes:g} GB/s for each GPU, with ZeRO-{cfg.train.zero_stage}:"
    )
    rows = [["GPUs", "step (s)", "samples/s", "sent a step (GB)", "efficiency", "days", "GPU hours"]]
    rows[0] += ["cost"] if price else []
    for count in sorted({*counts(cfg), gpus}):
        at = pace(cfg, steps, gpus=count, device=device, mfu=mfu, link_gbytes=link_gbytes)
        sent = traffic(cfg, stage=cfg.train.zero_stage, gpus=count)
        alone = pace(cfg, steps, gpus=1, device=device, mfu=mfu, link_gbytes=link_gbytes)
        efficiency = at.samples_per_second / alone.samples_per_second / count
        row = [
            f"{count:,}{' (this)' if count == gpus else ''}",
            f"{at.step_seconds:.3f}",
            f"{at.samples_per_second:,.0f}",
        ]
        row += [f"{sent / 1e9:.2f}", f"{efficiency:.0%}", f"{at.days:,.2f}", f"{at.gpu_hours:,.0f}"]
        rows.append(row + ([f"{at.gpu_hours * price:,.0f}"] if price else []))
    parts.append(aligned(rows))
    if index is not None:
        mine = shards_per_node(cfg, len(index.shards), nodes, gpus_per_node)
        parts.append(f"{mine:,} of {len(index.shards):,} shards are read by each node in an epoch")
    return "\n\n".join(parts)
