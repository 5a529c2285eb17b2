"""Gradients averaged over the ranks while others are still computed, at ZeRO stage 0.

DeepSpeed begins when the backward pass has ended, and sums a copy of them.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import nn

from acn_scale import distributed
from acn_scale.config import TrainConfig

BUCKETS = 8  # at least, where they are summed early: the last of them finds nothing left to be computed meanwhile


def bucket_size(cfg: TrainConfig, stage: int, gradients: int) -> int:
    """How many numbers of so many are summed at once at a ZeRO stage, but for a weight that has more."""
    early = stage == 0 or (stage < 3 and cfg.overlap_comm)
    return min(cfg.bucket_size, math.ceil(gradients / BUCKETS) if early else gradients)


def dealt(weights: Sequence[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """In their order to buckets of no more than `size` numbers, but for a larger weight by itself."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for weight in weights:
        if weight.numel() > room:
            buckets.append([])
            room = size
        buckets[-1].append(weight)
        room -= weight.numel()
    return buckets


class Bucket:
    """Weights whose gradients are moved to lie side by side, and summed at once."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.bounds = list(pairwise(accumulate((weight.numel() for weight in weights), initial=0)))
        self.missing = set(range(len(weights)))

    def take(self, place: int) -> None:
        """Move a weight's gradient here; it is a part of the bucket from then on. Where there is none, zeros: all ranks
        sum the same.
        """
        weight, (start, end) = self.weights[place], self.bounds[place]
        if len(self.missing) == len(self.weights):
            self.gradients = torch.empty(self.bounds[-1][1], dtype=weight.dtype, device=weight.device)
        gradient = self.gradients[start:end].view_as(weight)
        gradient.zero_() if weight.grad is None else gradient.copy_(weight.grad)
        weight.grad = gradient
        self.missing.remove(place)

    def send(self) -> None:
        """Begin the sum. On every rank, bucket by bucket in one order."""
        self.work = dist.all_reduce(self.gradients, async_op=True)

    def receive(self) -> None:
        """Wait for its end, and divide."""
        self.work.wait()
        self.gradients.mul_(1 / dist.get_world_size())


@contextmanager
def averaging(weights: Sequence[Sequence[nn.Parameter]]) -> Iterator[None]:
    """For the last backward pass of a step, on every rank: afterwards all gradients are the ranks' mean.

    `weights`: of each bucket, in about the order in which gradients come.
    """
    buckets = [Bucket(each) for each in weights]
    queue = deque(buckets)

    def send() -> None:
        while queue and not queue[0].missing:
            queue.popleft().send()

    def arrived(bucket: Bucket, place: int, weight: nn.Parameter) -> None:
        bucket.take(place)
        send()

    hooks = [
        weight.register_post_accumulate_grad_hook(partial(arrived, bucket, place))
        for bucket in buckets
        for place, weight in enumerate(bucket.weights)
    ]
    try:
        yield
    finally:
        for hook in hooks:  # one that stays would keep its weight, and all others, for ever
            hook.remove()
    for bucket in buckets:
        for place in sorted(bucket.missing):
            bucket.take(place)
    send()
    with distributed.waiting():
        for bucket in buckets:
            bucket.receive()
