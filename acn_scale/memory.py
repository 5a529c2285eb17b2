"""The memory of a GPU over a training step, found without one: tensors are counted as they come and go in a step that
computes nothing, and what DeepSpeed keeps beside them is added.
"""

import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acn_scale.averaging import bucket_size
from acn_scale.config import Config, ModelConfig
from acn_scale.curriculum import loss_weights
from acn_scale.depth import batch_of
from acn_scale.models import build_model
from acn_scale.models.layers import Attention
from acn_scale.optim import freeze, from_the_top

LIVE = 1_000_000_000  # elements of whole weights that ZeRO-3 holds at once, at most
GATHERED = 50_000_000  # elements of them that it brings together at once, at most


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # with all else that comes and goes: buffers, and temporaries of the update

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(cfg: Config, *, stage: int, gpus: int, micro_batch_size: int, recompute: bool) -> Memory:
    """Of a run with AdamW, with these in the place of what `cfg` says of them.

    What stays is that of Rajbhandari et al. 2020 (ZeRO), table 1. What comes and goes has three heights: in the passes,
    in the sum over the ranks, and in the update. On a GPU the update takes a little less than on a CPU.
    """
    model = cfg.model.model_copy(update={"recompute": recompute})
    frozen = cfg.train.freeze
    count, trained, share = parameters(model), parameters(model, frozen), 1 / gpus
    half = cfg.train.precision != "fp32"
    width = 2 if half else 4
    accumulates = cfg.train.global_batch_size > micro_batch_size * gpus
    weights = count * width * (share if stage == 3 else 1)
    gradients = trained * width * (share if stage else 1)
    master = 4 * trained if half or stage else 0
    optimizer = (master + 8 * trained) * (share if stage else 1) + (4 * trained * share if cfg.train.ema_decay else 0)
    # The passes, to which ZeRO-3 brings whole weights. Whole gradients wait to be summed: up to ZeRO-1 all of them,
    # unless they are summed early.
    heads = loss_weights(cfg.early_exit, model.depth, step=1, steps=2)  # as many as in any step
    passes = trace(model, width, cfg.data.mask_ratio, heads, frozen)
    bucket = bucket_size(cfg.train, stage, trained) * width
    largest = max(weight.numel() for weight in trained_weights(model, frozen)) * width
    piece = max(bucket, largest)
    waiting = piece if stage >= 2 else trained * width
    # Summed while others are computed they lie in a bucket from the start, or in one of DeepSpeed's two.
    ahead = bucket if stage == 0 and gpus > 1 else 0.0
    if stage in (1, 2) and cfg.train.overlap_comm:
        waiting = bucket + piece
    if stage < 2 and accumulates:  # to all of them, where a new one lies beside those that there are
        fullest = passes.peak(micro_batch_size) + trained * width + max(ahead, largest)
    else:
        fullest = passes.peak(micro_batch_size, waiting, ahead)
    held = gradients if stage == 3 or (stage == 2 and accumulates) else 0.0
    lasting = bucket + min(count, LIVE) * width if stage == 3 else 0.0
    if stage == 3 and gpus > 1:
        gathering = min(count, GATHERED) * width
        fullest = max(fullest, passes.forward_peak(micro_batch_size) + gathering)
    fullest += held + lasting
    # ZeRO sums a copy of them, for one rank too; without, a copy is moved into its bucket.
    summing = held + waiting + ((lasting or piece) if stage else largest * (gpus > 1))
    # The update: a copy of the gradients of the rank's flat part, or of 16-bit ones; AdamW itself works in place.
    temporary = 4 * trained * share if stage or half else 0.0
    update = gradients + temporary + (bucket if stage == 3 else 0.0)
    if cfg.train.offload != "none":
        optimizer, update = 0.0, gradients
    if cfg.train.offload == "parameters":
        weights = 0.0
    return Memory(weights, gradients, optimizer, max(fullest, summing, update) - gradients)


def parameters(model: ModelConfig, frozen: bool = False) -> int:
    """How many numbers are trained; `frozen`: all but the head is."""
    return sum(weight.numel() for weight in trained_weights(model, frozen))


@lru_cache
def trained_weights(model: ModelConfig, frozen: bool) -> tuple[nn.Parameter, ...]:
    """Without their values, from the top down."""
    with torch.device("meta"):
        network = build_model(model)
    if frozen:
        freeze(network)
    return tuple(from_the_top(network))


@dataclass(frozen=True)
class Trace:
    """Bytes alive after each operation of a forward and a backward pass, weights and their gradients left out."""

    fixed: np.ndarray  # (operations,)
    by_sample: np.ndarray  # (operations,)
    gradients: np.ndarray  # (operations,) bytes of the weights' gradients
    forward: int  # operations of the forward pass

    def peak(self, samples: int, waiting: float = 0.0, ahead: float = 0.0) -> float:
        """With a batch of `samples`, and of the gradients `waiting` bytes at most, for which there is room `ahead`."""
        gradients = np.minimum(self.gradients + ahead * (self.gradients > 0), waiting)
        return float((self.fixed + samples * self.by_sample + gradients).max())

    def forward_peak(self, samples: int) -> float:
        return float((self.fixed + samples * self.by_sample)[: self.forward].max())


@lru_cache
def trace(
    model: ModelConfig, width: int, mask_ratio: float, heads: tuple[float, ...] = (), frozen: bool = False
) -> Trace:
    """`width`: bytes of a number in the passes, 4 or 2. `heads`: weights of the losses at every depth, as in Network.
    `frozen`: all but the head is. What grows with the batch is told apart by two batches.
    """
    setting = width, mask_ratio, heads, frozen
    (few, gradients, forward), (many, *_) = (_alive(model, samples, *setting) for samples in (2, 4))
    slope = (many - few) / 2
    return Trace(few - 2 * slope, slope, gradients, forward)


def _alive(
    model: ModelConfig, samples: int, width: int, mask_ratio: float, heads: tuple[float, ...], frozen: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """(operations,) bytes of all but the weights and their gradients, and of those gradients; operations forward."""
    before = torch.get_default_dtype()
    with FakeTensorMode():  # which takes the kernels of attention that a device has, and meta tensors do not
        try:
            torch.set_default_dtype(torch.float32 if width == 4 else torch.bfloat16)
            network = build_model(model)
        finally:
            torch.set_default_dtype(before)
        network.loss_weights = heads
        for module in network.modules():
            if isinstance(module, Attention):
                module.dropout.p = 0.0  # a GPU's kernel keeps no mask of it; a CPU's own way keeps all weights
        if frozen:
            freeze(network)
        batch = batch_of(model, samples, mask_ratio)
        with _Storages(network) as storages:
            loss = network(**batch)["loss"]
            forward = storages.operations
            loss.backward()
        trained = (parameter for parameter in network.parameters() if parameter.requires_grad)
        alive, gradients = storages.alive({id(each.grad.untyped_storage()) for each in trained})
        return alive, gradients, forward


class _Storages(TorchDispatchMode):
    """Notes when the memory of each tensor that an operation returns comes and when it goes; not that of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        tensors = [*network.parameters(), *network.buffers()]
        self.network = {id(tensor.untyped_storage()) for tensor in tensors}
        self.operations = 0
        self.born: dict[int, tuple[int, int]] = {}  # operation and bytes, of those that are alive, by id
        self.spans: list[tuple[int, int, int, int]] = []  # id, first operation, last, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.born and id(storage) not in self.network:
                    self.born[id(storage)] = self.operations, storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage))
        return result

    def _gone(self, key: int) -> None:
        first, size = self.born.pop(key)
        self.spans.append((key, first, self.operations, size))

    def alive(self, kept: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """(operations,) bytes of all but those whose ids at the end are `kept`, and of those."""
        changes = np.zeros((2, self.operations + 2))
        still = [(key, first, self.operations, size) for key, (first, size) in self.born.items()]
        for key, first, last, size in self.spans + still:
            row = int(key in kept and last == self.operations)
            changes[row, first] += size
            changes[row, last + 1] -= size
        others, those = np.cumsum(changes, axis=1)[:, 1 : self.operations + 1]
        return others, those
