"""One order of data, whatever reads it: ranks, loader workers, restarts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acn_scale.config import Config
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.order import Order
from acn_scale.data.stream import Stream
from acn_scale.errors import UserError

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 9), st.integers(1, 50), st.integers(1, 3), st.integers(0, 3))
def test_each_sample_comes_once_an_epoch(
    samples_per_shard: list[int], streams: int, window: int, group: int, epoch: int
) -> None:
    order = Order(np.array(samples_per_shard), seed=3, streams=streams, window=window, group=group)
    seen = [order.locate(epoch, position) for position in range(order.num_samples)]
    assert sorted(seen) == [(shard, sample) for shard, size in enumerate(samples_per_shard) for sample in range(size)]


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from([1, 2, 4, 8]), st.integers(1, 50))
def test_ranks_that_divide_the_streams_read_shards_of_their_own(
    samples_per_shard: list[int], world_size: int, window: int
) -> None:
    """A shard is read by two ranks only where the border between two streams cuts it."""
    order = Order(np.array(samples_per_shard), seed=0, streams=8, window=window)
    readers: dict[int, set[int]] = {}
    for position in range(order.num_samples):
        readers.setdefault(order.locate(0, position)[0], set()).add(position % world_size)
    shared = sum(len(ranks) - 1 for ranks in readers.values())
    assert shared <= 7  # borders


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        order = Order(np.full(10, 30), seed=seed, streams=4, window=50)
        return [order.locate(number, position) for position in range(order.num_samples)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0)[:30] != sorted(epoch(0, 0)[:30])


def test_shards_are_permuted_anew_in_each_epoch() -> None:
    order = Order(np.full(10, 1), seed=0, streams=1, window=1)
    epochs = [[order.locate(epoch, position)[0] for position in range(10)] for epoch in range(3)]
    assert epochs[0] != list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]


def global_batches(cfg: Config, world_size: int, steps: int, first: int = 0) -> list[torch.Tensor]:
    """The images of each step, put together from all ranks and brought into the order of positions."""
    streams = [build_stream(cfg, rank, world_size) for rank in range(world_size)]
    for stream in streams:
        stream.load_state_dict(stream.state_dict() | {"samples": first * cfg.train.global_batch_size})
    batches = []
    for step in range(first, first + steps):
        images, places = [], []
        for stream in streams:
            places.append(torch.from_numpy(stream.plan.positions(step).flatten()))
            images += [next(stream)["images"] for _ in range(stream.plan.micro_steps)]
        batches.append(torch.cat(images)[torch.cat(places).argsort()])
    return batches


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5, "cutmix": 0.5, "augment": "crop_flip"}])
@pytest.mark.parametrize(
    ("world_size", "micro", "workers"), [(2, None, 0), (4, 2, 0), (8, None, 0), (2, 4, 2), (1, 8, 3)]
)
def test_global_batches_do_not_depend_on_ranks_and_workers(
    vit: Callable[..., Config], world_size: int, micro: int | None, workers: int, mixing: dict
) -> None:
    """Nor on where the stream was resumed: here in the middle, 90 steps of 16 past the end of the epoch of 1,400."""
    expected = global_batches(vit(data=mixing), 1, 3, first=86)
    cfg = vit(train={"micro_batch_size": micro}, data={"workers": workers} | mixing)
    for got, want in zip(global_batches(cfg, world_size, 3, first=86), expected, strict=True):
        assert torch.equal(got, want)


def test_resume_continues_bit_for_bit(vit: Callable[..., Config]) -> None:
    cfg = vit(data={"augment": "cifar", "workers": 2})
    unbroken = build_stream(cfg)
    for _ in range(4):
        next(unbroken)
    state = unbroken.state_dict()
    resumed = build_stream(cfg)
    resumed.load_state_dict(state)
    for _ in range(3):
        expected, got = next(unbroken), next(resumed)
        assert torch.equal(expected["images"], got["images"])
        assert torch.equal(expected["labels"], got["labels"])


def test_resume_on_other_data_is_refused(vit: Callable[..., Config], digits: Path) -> None:
    state = build_stream(vit()).state_dict()
    for other in (vit(data={"train": f"{digits}/eval"}), vit(run={"seed": 1}), vit(data={"streams": 8})):
        with pytest.raises(UserError, match=r"^data\.train = "):
            build_stream(other).load_state_dict(state)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 100), (2, 33), (3, 64), (5, 7)])
def test_evaluation_sees_each_sample_once(vit: Callable[..., Config], world_size: int, batch_size: int) -> None:
    """And gives all ranks batches of the same sizes, so that none waits for another in a collective."""
    cfg = vit(eval={"batch_size": batch_size})
    passes = [list(build_evaluation(cfg, rank, world_size)) for rank in range(world_size)]
    shapes = {tuple(len(batch["labels"]) for batch, _ in one) for one in passes}
    assert len(shapes) == 1
    labels = torch.cat([batch["labels"][counts] for one in passes for batch, counts in one])
    everything = torch.cat([batch["labels"][counts] for batch, counts in build_evaluation(cfg)])
    assert torch.equal(labels.sort().values, everything.sort().values)
    assert len(labels) == 397


def test_pairs_that_are_mixed_stay_on_one_rank(vit: Callable[..., Config]) -> None:
    stream: Stream = build_stream(vit(data={"mixup": 0.2}, train={"micro_batch_size": 2}), rank=1, world_size=2)
    for pair in stream.plan.positions(5):
        assert pair[0] % 2 == 0
        assert pair[1] == pair[0] + 1
