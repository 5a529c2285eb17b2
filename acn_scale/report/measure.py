"""What is measured on a network: its scores at every depth in one pass, block influence, and the cost of each cut."""

import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from acn_scale.convert.network import Network
from acn_scale.data.stream import Evaluation
from acn_scale.depth import batch_of, cost, scored
from acn_scale.progress import bar

BATCH_SIZES = (1, 32)  # that are timed
WARM_UP = 3  # rounds that do not count
ROUNDS = (5, 50)  # at least and at most, of those that do
SECONDS = 2.0  # after which no more rounds begin, of each batch size


@dataclass(frozen=True)
class Readings:
    """Of each sample of the evaluation set, at depth 0, 1, ...: (samples, depths); and of block 1, 2, ..."""

    accuracy: np.ndarray
    loss: np.ndarray
    influence: list[float]


def take_readings(model: nn.Module, evaluation: Evaluation, device: torch.device, name: str) -> Readings:
    """One pass over the evaluation set, with a progress bar of this name. The model is in eval() and on the device.

    Block influence is 1 - E[cos(S_{k-1}, S_k)] over tokens and samples (ShortGPT, Men et al. 2024, arXiv 2403.03853),
    of the readouts S below and above block k: the partial sums of an ACN, the stream of a residual network.
    """
    parts: dict[str, list[np.ndarray]] = {"accuracy": [], "loss": []}
    cosines, below = [], []
    total, count = torch.zeros(len(model.trunk.blocks), dtype=torch.float64, device=device), 0

    def listen(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        """At the head, which gets the readout (batch, tokens, dim) of each depth in turn."""
        readout = inputs[0].float()
        if below:
            cosines.append(F.cosine_similarity(below.pop(), readout, dim=-1).mean(dim=1))
        below.append(readout)

    batches = bar(evaluation, f"{name}: evaluating", len(evaluation.counts))
    handle = model.head.register_forward_pre_hook(listen)
    try:
        for scores, counts in scored(model, batches, device):
            for key, values in parts.items():
                values.append(scores[key][:, counts].double().T.cpu().numpy())
            total += torch.stack(cosines)[:, counts].double().sum(dim=1)
            count += int(counts.sum())
            cosines.clear()
            below.clear()
    finally:
        handle.remove()
    accuracy, loss = (np.concatenate(parts[key]) for key in ("accuracy", "loss"))
    return Readings(accuracy, loss, (1 - total / count).tolist())


def costs(net: Network, depths: Sequence[int], mask_ratio: float, name: str) -> list[dict[str, Any]]:
    """Of the network cut at each of these depths, the last of them full depth: parameters, FLOPs, bytes of its export
    in fp32, the share of each that is saved, and measured times.

    Times are of the device that the model is on, medians over rounds in which all depths take turns.
    """
    cuts = [cut_copy(net.model, depth) for depth in depths]
    sizes = []
    for depth, model in zip(depths, cuts, strict=True):
        counted = cost(net.card.model, depth)
        stored = len(save(Network(model, net.card).weights(), {"format": "pt"}))
        sizes.append({"parameters": counted.parameters, "flops": counted.flops, "bytes": stored})
    times = [_times(cuts, net, size, mask_ratio, name) for size in BATCH_SIZES]
    return [
        {
            "depth": depth,
            **size,
            "saved": {key: 1 - value / sizes[-1][key] for key, value in size.items()},
            "times": list(each),
        }
        for depth, size, *each in zip(depths, sizes, *times, strict=True)
    ]


def _times(
    cuts: Sequence[nn.Module], net: Network, size: int, mask_ratio: float, name: str
) -> list[dict[str, float | list[float]]]:
    """Of a forward pass of each cut on a batch of this size."""
    with next(net.model.parameters()).device:
        batch = batch_of(net.card.model, size, mask_ratio)
    del batch["labels"]
    columns = in_turns([partial(cut, **batch) for cut in cuts], f"{name}: timing batch {size}")
    full = statistics.median(columns[-1])
    rows = []
    for seconds in columns:
        low, median, high = statistics.quantiles(seconds, n=4)
        row = {"batch": size, "seconds": median, "quartiles": [low, high], "samples_per_second": size / median}
        rows.append(row | {"speed_up": full / median, "rounds": len(seconds)})
    return rows


def cut_copy(model: nn.Module, depth: int) -> nn.Module:
    """The model cut at `depth`, with the same weights in memory; the model itself stays whole."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    cut = copy.deepcopy(model, shared)
    cut.trunk.truncate(depth)
    return cut


@torch.no_grad()
def in_turns(works: Sequence[Callable[[], Any]], description: str) -> list[list[float]]:
    """The seconds that each of these takes, in rounds in which all have a turn, with a progress bar."""

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for work in [*works] * WARM_UP:
        seconds(work)
    rounds = []
    start = time.perf_counter()
    for number in bar(range(ROUNDS[1]), description, ROUNDS[1], "round"):
        if number >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
            break
        rounds.append([seconds(work) for work in works])
    return [list(column) for column in zip(*rounds, strict=True)]


def describe(device: torch.device) -> dict[str, Any]:
    """What the times were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "precision": "fp32", "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}"
