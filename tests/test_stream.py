"""One order of data, whatever reads it: ranks, loader workers, micro batches, restarts; bad samples or none."""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made import numbered_texts

from acn_scale.config import Config, ImageDataConfig
from acn_scale.data import build_stream
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.data.order import DiskOrder, Order
from acn_scale.data.samples import Batch, Decoder, Key, Samples
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import Evaluation, Stream
from acn_scale.errors import BadData, UserError

Folders = Callable[[tuple[int, ...]], Path]


class Numbers(Decoder):
    """Decodes a sample to its number in the data set, which its file holds; those in `bad` cannot be read."""

    def __init__(self, bad: Iterable[int]) -> None:
        self.bad = frozenset(bad)

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> int:
        number = int(files["txt"])
        assert number == key.sample
        if number in self.bad:
            raise BadData("bad")
        return number

    def collate(self, samples: list[int], keys: list[Key]) -> Batch:
        return {"numbers": torch.tensor(samples), "epochs": torch.tensor([key.epoch for key in keys])}


@dataclass(frozen=True)
class Data:
    """What decides on the order of samples."""

    sizes: tuple[int, ...]  # of the shards
    streams: int
    window: int
    group: int
    seed: int
    batch: int = 32  # global
    bad: frozenset[int] = frozenset()

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)

    @property
    def order(self) -> Order:
        sizes = np.array(self.sizes)
        return Order(sizes, seed=self.seed, streams=self.streams, window=self.window, group=self.group)


@dataclass(frozen=True)
class Leg:
    """A part of a run between two starts: who reads, and how many steps."""

    ranks: int
    micro_steps: int
    steps: int
    workers: int = 0

    def plan(self, rank: int, batch: int, group: int) -> BatchPlan:
        return BatchPlan(batch, batch // self.ranks // self.micro_steps, rank, self.ranks, group)


RANKS = st.sampled_from([1, 2, 4, 8])
LEGS = st.builds(Leg, RANKS, st.sampled_from([1, 2]), st.integers(1, 5))
PARTS = {
    "sizes": st.lists(st.integers(1, 30), min_size=1, max_size=12).map(tuple),
    "streams": st.integers(1, 9),
    "window": st.integers(1, 50),
    "group": st.sampled_from([1, 2]),
    "seed": st.integers(0, 3),
}
DATA = st.builds(Data, **PARTS, batch=st.sampled_from([32, 64, 96]))
BAD = st.frozensets(st.integers(0, 60), max_size=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Makes a folder of shards of these sizes, each once."""
    return functools.cache(lambda sizes: numbered_texts(tmp_path_factory.mktemp("numbers") / "shards", sizes))


def stream_of(data: Data, folders: Folders, leg: Leg, rank: int) -> Stream:
    folder = str(folders(data.sizes))
    cfg = ImageDataConfig(kind="images", train=folder, eval=folder, on_bad_sample="skip", workers=leg.workers)
    samples = Samples(ShardIndex.load(folder), Numbers(data.bad), cfg, seed=data.seed, order=data.order)
    return Stream(samples, cfg, leg.plan(rank, data.batch, data.group))


def relay(start: Callable[[Leg, int], Stream], legs: Iterable[Leg]) -> list[Batch]:
    """The global batches of a run that stops after each leg; the next one goes on from the state it left."""
    batches, state = [], None
    for leg in legs:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(contextlib.closing(start(leg, rank))) for rank in range(leg.ranks)]
            for stream in streams if state else ():
                stream.load_state_dict(json.loads(state))
            batches += [global_batch(streams) for _ in range(leg.steps)]
            state = json.dumps(streams[0].state_dict())
    return batches


def global_batch(streams: list[Stream]) -> Batch:
    """All ranks' samples of a step, in the order of positions."""
    step = streams[0].plan.place(streams[0].taken)[0]
    places = np.concatenate([stream.plan.positions(step).flatten() for stream in streams])
    parts = [next(stream) for stream in streams for _ in range(stream.plan.micro_steps(step))]
    return {name: torch.cat([part[name] for part in parts])[places.argsort()] for name in parts[0]}


def same(got: list[Batch], expected: list[Batch]) -> bool:
    pairs = zip(got, expected, strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a.keys() | b.keys())


def column(batches: list[Batch], name: str = "numbers") -> list[int]:
    return torch.cat([batch[name] for batch in batches]).tolist()


@settings(max_examples=60, deadline=None)
@given(DATA, BAD, st.lists(LEGS, min_size=1, max_size=4))
def test_any_ranks_and_restarts_give_one_sequence_of_batches(
    folders: Folders, data: Data, bad: frozenset[int], legs: list[Leg]
) -> None:
    """Also where bad samples are replaced: each by a good one, and nothing else changes."""
    assume(data.num_samples > 3 * len(bad))  # or no replacement might be found
    damaged = replace(data, bad=bad)
    unbroken = Leg(ranks=1, micro_steps=1, steps=sum(leg.steps for leg in legs))
    expected = relay(functools.partial(stream_of, damaged, folders), [unbroken])
    assert same(relay(functools.partial(stream_of, damaged, folders), legs), expected)

    whole = column(relay(functools.partial(stream_of, data, folders), [unbroken]))
    for got, good in zip(column(expected), whole, strict=True):
        assert got not in bad if good in bad else got == good


@pytest.mark.parametrize("bad", [(), (3, 40, 41)])
def test_loader_processes_change_nothing(folders: Folders, bad: tuple[int, ...]) -> None:
    start = functools.partial(stream_of, Data((30, 20, 10), 4, 8, 2, seed=0, bad=frozenset(bad)), folders)
    expected = relay(start, [Leg(1, 1, steps=9)])
    for workers in (1, 2, 3):
        assert same(relay(start, [Leg(2, 2, 2, workers), Leg(1, 4, 4, workers), Leg(4, 1, 3)]), expected)


def test_closing_a_stream_loses_nothing(folders: Folders) -> None:
    """Not even inside a step."""
    whole, closed = (stream_of(Data((30, 20, 10), 4, 8, 1, seed=0), folders, Leg(1, 4, 2), rank=0) for _ in range(2))
    for _ in range(8):
        assert torch.equal(next(whole)["numbers"], next(closed)["numbers"])
        closed.close()


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5, "cutmix": 0.5}])
def test_augmented_pixels_are_the_same_too(vit: Callable[..., Config], mixing: dict[str, float]) -> None:
    """Bit for bit, as real configs build the streams; 1,400 samples are 87.5 steps."""

    def start(leg: Leg, rank: int) -> Stream:
        micro = leg.plan(rank, 16, 1).micro_batch_size
        data = {"augment": "cifar", "workers": leg.workers} | mixing
        stream = build_stream(vit(train={"micro_batch_size": micro}, data=data), rank, leg.ranks)
        stream.load_state_dict(stream.state_dict() | {"samples": 86 * 16})
        return stream

    expected = relay(start, [Leg(1, 1, steps=5)])
    assert same(relay(start, [Leg(4, 2, 2), Leg(1, 2, 1, workers=3), Leg(2, 1, 2, workers=1)]), expected)


@settings(max_examples=100, deadline=None)
@given(DATA, st.integers(0, 3))
def test_each_sample_comes_once_an_epoch(data: Data, epoch: int) -> None:
    order = data.order
    seen = [order.locate(epoch, position) for position in range(order.num_samples)]
    assert sorted(seen) == [(shard, number) for shard, size in enumerate(data.sizes) for number in range(size)]


@settings(max_examples=60, deadline=None)
@given(DATA, st.integers(0, 3), st.integers(0, 40))
def test_ranks_that_divide_the_streams_read_shards_of_their_own(data: Data, epoch: int, turn: int) -> None:
    """A shard is read by two ranks only where the border between two streams cuts it."""
    ranks = [count for count in (2, 4, 8) if data.streams % count == 0]
    assume(ranks and (epoch == 0 or data.num_samples % data.group == 0))
    world_size = ranks[turn % len(ranks)]
    first, last = epoch * data.num_samples, (epoch + 1) * data.num_samples
    readers: dict[int, set[int]] = {}
    for rank in range(world_size):
        plan = Leg(world_size, 1, 1).plan(rank, data.batch, data.group)
        for step in range(first // data.batch, last // data.batch + 1):
            for position in plan.positions(step).flatten().tolist():
                if first <= position < last:
                    readers.setdefault(data.order.locate(epoch, position - first)[0], set()).add(rank)
    assert sum(len(ranks) - 1 for ranks in readers.values()) < data.streams


@pytest.mark.parametrize("shard_size", [1, 60])
def test_shards_and_windows_are_permuted_anew_for_each_seed_and_epoch(shard_size: int) -> None:
    """Sixty shards of one sample show how shards are permuted; one shard of sixty, how a window is."""
    data = Data((shard_size,) * (60 // shard_size), streams=1, window=61 - 60 // shard_size, group=1, seed=0)
    orders = [
        [order.locate(epoch, position) for position in range(60)]
        for order, epoch in itertools.product([data.order, replace(data, seed=1).order], [0, 1, 2])
    ]
    assert all(one != other for one, other in itertools.combinations([sorted(orders[0]), *orders], 2))
    assert data.order.locate(2, 7) == orders[2][7]


def test_windows_and_streams_are_permuted_each_in_its_own_way() -> None:
    order = Data((90,), streams=3, window=15, group=1, seed=0).order
    numbers = np.array([order.locate(0, position)[1] for position in range(90)])
    windows = [tuple(window - window.min()) for stream in range(3) for window in numbers[stream::3].reshape(2, 15)]
    assert len(set(windows)) == 6
    assert all(sorted(window) == list(range(15)) for window in windows)


@settings(max_examples=60, deadline=None)
@given(DATA, st.integers(0, 10**9), RANKS)
def test_seeking_costs_the_same_anywhere(folders: Folders, data: Data, step: int, ranks: int) -> None:
    """The first batch at any position takes no more permutations and open shards than it has samples."""
    assume(data.num_samples >= data.batch)
    stream = stream_of(data, folders, Leg(ranks, 1, 1), rank=0)
    stream.load_state_dict(stream.state_dict() | {"samples": step * data.batch})
    next(stream)
    order = stream.samples.order
    assert 1 <= order._permutation.cache_info().misses <= data.batch // ranks
    assert 1 <= order._shards_of_epoch.cache_info().misses <= 5  # of the epochs of the batch and of the windows ahead
    assert 1 <= stream.samples.reader._open.cache_info().misses <= data.batch // ranks


def test_resume_on_other_data_is_refused(vit: Callable[..., Config], digits: Path) -> None:
    state = build_stream(vit()).state_dict()
    for other in (vit(data={"train": f"{digits}/eval"}), vit(run={"seed": 1}), vit(data={"streams": 8})):
        with pytest.raises(UserError, match=r"^data\.train = "):
            build_stream(other).load_state_dict(state)


@settings(max_examples=100, deadline=None)
@given(RANKS, st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]), st.integers(0, 10**9))
def test_groups_stay_on_one_rank(ranks: int, micro_steps: int, groups: int, group: int, step: int) -> None:
    """In neighbouring rows of one micro batch: pairs that Mixup mixes. The ranks share a global batch out exactly."""
    batch = ranks * micro_steps * groups * group
    plans = [Leg(ranks, micro_steps, 1).plan(rank, batch, group) for rank in range(ranks)]
    positions = np.stack([plan.positions(step) for plan in plans])
    assert sorted(positions.flatten()) == list(range(step * batch, (step + 1) * batch))
    pairs = positions.reshape(-1, group)
    assert (pairs[:, 0] % group == 0).all()
    assert (pairs == pairs[:, :1] + np.arange(group)).all()


@settings(max_examples=40, deadline=None)
@given(PARTS["sizes"], BAD, st.integers(1, 5), st.integers(1, 50))
def test_evaluation_counts_each_good_sample_once(
    folders: Folders, sizes: tuple[int, ...], bad: frozenset[int], ranks: int, size: int
) -> None:
    """And gives all ranks as many batches, so that none waits for another in a collective: those of a single rank."""
    assume(sum(sizes) > 3 * len(bad))
    samples = stream_of(Data(sizes, 1, 1, 1, 0, bad=bad), folders, Leg(1, 1, 1), 0).samples
    samples.order = DiskOrder(np.array(sizes))
    cfg = ImageDataConfig(kind="images", train="-", eval="-", on_bad_sample="skip")
    passes = [list(Evaluation(samples, cfg, batch_size=size, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert len({len(one) for one in passes}) == 1
    alone = Evaluation(samples, cfg, batch_size=size, rank=0, world_size=1)
    together = [one[turn] for turn in range(len(passes[0])) for one in passes][: len(alone.positions)]
    assert all(
        torch.equal(batch["numbers"], other["numbers"]) for (batch, _), (other, _) in zip(together, alone, strict=True)
    )
    counted = [number for one in passes for batch, counts in one for number in batch["numbers"][counts].tolist()]
    assert sorted(counted) == sorted(set(range(sum(sizes))) - bad)
