"""Gradients averaged over the ranks while others are still computed, at ZeRO stage 0.

DeepSpeed begins when the backward pass has ended, and sums a copy of them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acn_scale import distributed

BUCKETS = 8  # at least: the last is summed when nothing is left to compute


def bucket_size(most: int, gradients: int) -> int:
    """Numbers of a bucket, where so many `gradients` are summed while others are computed, `most` of them at once."""
    return min(most, math.ceil(gradients / BUCKETS))


class Bucket:
    """Weights whose gradients lie side by side, to be summed at once."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.bounds = list(pairwise(accumulate((weight.numel() for weight in weights), initial=0)))
        self.empty()

    def empty(self) -> None:
        self.gradients: Tensor | None = None
        self.missing = set(range(len(self.weights)))
        self.work: dist.Work | None = None

    def take(self, place: int) -> None:
        """Move a weight's gradient here, zeros where it has none, so that all ranks sum the same."""
        weight, (start, end) = self.weights[place], self.bounds[place]
        if self.gradients is None:
            self.gradients = torch.empty(self.bounds[-1][1], dtype=weight.dtype, device=weight.device)
        gradient = self.gradients[start:end].view_as(weight)
        gradient.zero_() if weight.grad is None else gradient.copy_(weight.grad)
        weight.grad = gradient
        self.missing.remove(place)

    def send(self) -> None:
        self.work = dist.all_reduce(self.gradients, async_op=True)

    def receive(self) -> None:
        self.work.wait()
        self.gradients.mul_(1 / dist.get_world_size())
        self.empty()


class GradientAverage:
    """Averages the gradients of a model's weights over the ranks, at most so many at once."""

    def __init__(self, model: nn.Module, most: int) -> None:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        size = bucket_size(most, sum(weight.numel() for weight in trained))
        self.buckets = [Bucket(weights) for weights in _dealt(trained[::-1], size)]  # the top's come first
        self.sent = 0
        self.on = False
        for bucket in self.buckets:
            for place, weight in enumerate(bucket.weights):
                weight.register_post_accumulate_grad_hook(partial(self._arrived, bucket, place))

    @contextmanager
    def during(self) -> Iterator[None]:
        """The last backward pass of a step, on every rank; after it all gradients are the ranks' mean."""
        self.on = True
        try:
            yield
        finally:
            self.on = False
        for bucket in self.buckets:
            for place in sorted(bucket.missing):
                bucket.take(place)
        self._send()
        with distributed.waiting():
            for bucket in self.buckets:
                bucket.receive()
        self.sent = 0

    def _arrived(self, bucket: Bucket, place: int, weight: nn.Parameter) -> None:
        if self.on:
            bucket.take(place)
            self._send()

    def _send(self) -> None:
        """What is whole, in the order that all ranks keep."""
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self.buckets[self.sent].send()
            self.sent += 1


def _dealt(weights: Sequence[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """In their order, no more than `size` numbers, but for a larger weight by itself."""
    bucket: list[nn.Parameter] = []
    for weight in weights:
        held = sum(other.numel() for other in bucket)
        if bucket and held + weight.numel() > size:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket
