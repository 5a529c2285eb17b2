"""Shards -> batches: the infinite, resumable training stream of a rank, and the finite evaluation pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from acn_scale.data.shards import Order, ShardIndex, ShardReader
from acn_scale.errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Key:
    """Names a sample wherever and whenever it is read; all randomness about it is drawn from this and nothing else."""

    seed: int
    epoch: int
    sample: int

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, self.sample])


class Decoder(Protocol):
    """Turns a record into a sample, and samples into a batch. `rows_per_record` comes from the shards' index."""

    def decode(self, files: dict[str, memoryview], row: int, key: Key) -> Any: ...

    def collate(self, samples: list[Any], keys: list[Key]) -> Batch: ...


class Samples(Dataset):
    """The samples of a folder of shards by global position: position // num_samples is the epoch."""

    def __init__(self, index: ShardIndex, decoder: Decoder, seed: int, order: Order | None) -> None:
        self.index, self.decoder, self.seed, self.order = index, decoder, seed, order
        self.num_samples = index.num_samples
        self.rows = index.info["rows_per_record"]
        self.ends = np.cumsum(index.samples_per_shard)
        self.reader = ShardReader(index)

    def __getitems__(self, positions: list[int]) -> Batch:
        keys, samples = [], []
        for position in positions:
            epoch, place = divmod(position, self.num_samples)
            shard, number = self.order.locate(epoch, place) if self.order else self._on_disk(place)
            record, row = divmod(number, self.rows)
            first = int(self.ends[shard - 1]) if shard else 0
            keys.append(Key(self.seed, epoch, first + number))
            try:
                samples.append(self.decoder.decode(self.reader.read(shard, record), row, keys[-1]))
            except UserError as error:
                raise UserError(f"{self.reader.path(shard)}: sample {number}: {error}") from None
        return self.decoder.collate(samples, keys)

    def _on_disk(self, place: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, place, side="right"))
        return shard, place - (int(self.ends[shard - 1]) if shard else 0)


def _loader(samples: Samples, batches: Any, workers: int) -> DataLoader:
    """The generator is the loader's own: it draws a number when it starts, which must not shift the model's dropout."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # nothing is sent over: open shards are not to be pickled
        collate_fn=_as_is,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Batch) -> Batch:
    return batch


class Stream:
    """An endless iterator of this rank's micro batches. Its order depends on the seed alone.

    Step t of the run is the global batch of positions t * global_batch_size onwards, whatever the number of ranks,
    loader workers and restarts. A batch may cross the end of an epoch; no sample is dropped or repeated there.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
    ) -> None:
        self.samples, self.workers = samples, workers
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.micro_steps = global_batch_size // (micro_batch_size * world_size)  # to one optimizer step
        self.taken = 0  # micro batches
        self._batches: Iterator[Batch] | None = None

    def positions(self, step: int) -> np.ndarray:
        """This rank's positions of a global batch, every world_size-th group: (micro_steps, micro_batch_size)."""
        group = self.samples.order.group
        positions = np.arange(self.global_batch_size).reshape(-1, self.world_size, group)
        mine = positions[:, self.rank].reshape(self.micro_steps, self.micro_batch_size)
        return step * self.global_batch_size + mine

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(_loader(self.samples, self._remaining(), self.workers))
        try:
            batch = next(self._batches)
        except UserError as error:  # from a loader process it comes with a traceback in its text
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("acn_scale.config.UserError: ")) from None
        self.taken += 1
        return batch

    def _remaining(self) -> Iterator[list[int]]:
        step, first = divmod(self.taken, self.micro_steps)
        while True:
            for positions in self.positions(step)[first:]:
                yield positions.tolist()
            step, first = step + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """A few numbers. Call it between optimizer steps, where they are the same on every rank."""
        order = self.samples.order
        return {
            "samples": self.taken * self.micro_batch_size * self.world_size,
            "fingerprint": self.samples.index.fingerprint,
            "order": [order.seed, order.streams, order.window, order.group],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken. Raises UserError where the data or their order are others now."""
        now = self.state_dict()
        for key, what in (("fingerprint", "other shards"), ("order", "another seed, streams or shuffle_window")):
            if state[key] != now[key]:
                raise UserError(f"data.train = {self.samples.index.folder}: not the data this run began with: {what}")
        self.taken = state["samples"] // (self.micro_batch_size * self.world_size)
        self._batches = None


class Evaluation:
    """The evaluation pass of one rank, as often as it is iterated over.

    Every sample comes once over all ranks, in disk order. All ranks get the same number of batches of the same sizes,
    so that collectives in the model meet; what fills up the last ones does not count. Random draws are keyed by the
    sample alone: each pass sees the same masks.
    """

    def __init__(self, samples: Samples, *, batch_size: int, rank: int, world_size: int, workers: int) -> None:
        self.samples, self.workers = samples, workers
        total = samples.num_samples
        mine = np.arange(-(-total // world_size)) * world_size + rank
        chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        self.positions = [np.minimum(chunk, total - 1).tolist() for chunk in chunks]
        self.counts = [int((chunk < total).sum()) for chunk in chunks]

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """(batch, how many of its first samples count)."""
        loader = _loader(self.samples, self.positions, self.workers)
        yield from zip(loader, self.counts, strict=True)
