"""Shards -> decoded samples by position, with others in the place of those that cannot be read."""

import hashlib
import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from acn_scale.config import StreamConfig
from acn_scale.data.order import DiskOrder, Order
from acn_scale.data.shards import ShardIndex, ShardReader
from acn_scale.data.storage import open_folder
from acn_scale.errors import BadData, UserError

TRIES = 64  # at replacing a sample
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Key:
    """Names a sample wherever and whenever it is read; all randomness about it is drawn from this and nothing else."""

    seed: int
    epoch: int
    sample: int

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, self.sample])

    def number(self, purpose: int) -> int:
        """A random number 0 ... 2**63 - 1 that seeds a generator. What one purpose draws tells nothing of another's."""
        packed = struct.pack("<4q", self.seed, self.epoch, self.sample, purpose)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Fault:
    """A sample that could not be read."""

    shard: str
    number: int  # in the shard
    key: str | None  # in the tar, where it is known
    sample: int  # in the data set
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.number}{f' (key {self.key})' if self.key else ''}: {self.reason}"


class Loaded(NamedTuple):
    """What comes from a loader process. It raises nothing there: what crosses processes should be plain data."""

    batch: Batch | None  # None where it could not be filled
    stand_ins: list[int]  # rows of the batch that hold another sample than they should
    faults: list[Fault]
    mistake: str | None  # a user's, such as a full disk


class Decoder(Protocol):
    """Turns a record into a sample, and samples into a batch. `decode` raises BadData, or UserError for a mistake.

    What `collate` makes travels to the device; `finish` makes of it there what the model takes.
    """

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> Any: ...

    def collate(self, samples: list[Any], keys: list[Key]) -> Batch: ...

    def finish(self, batch: Batch) -> Batch:
        return batch


class Records(Protocol):
    """What is read in the place of a folder of shards: records by shard and number. `read` raises BadData."""

    location: str

    def missing(self) -> list[str]: ...

    def read(self, shard: int, record: int, only: str | None = None) -> dict[str, bytes]: ...

    def key(self, shard: int, record: int) -> str | None: ...


class Samples(Dataset):
    """The samples of a folder of shards by global position: position // num_samples is the epoch.

    With `records`, `index` describes these instead of shards. A sample that cannot be read is replaced by one that
    (seed, epoch, position) decide on, on every rank alike.
    """

    def __init__(
        self,
        index: ShardIndex,
        decoder: Decoder,
        cfg: StreamConfig,
        *,
        seed: int,
        order: Order | DiskOrder,
        records: Records | None = None,
    ) -> None:
        self.index, self.decoder, self.seed, self.order = index, decoder, seed, order
        self.skip = cfg.on_bad_sample == "skip"
        self.num_samples = order.num_samples
        self.rows = index.info["rows_per_record"]
        self.starts = np.concatenate([[0], np.cumsum(index.samples_per_shard)])
        if records is None:
            self.folder = open_folder(str(index.folder), index.shards, cfg.remote, verify=cfg.verify_checksums)
            self.reader = ShardReader(self.folder)
        else:
            self.folder = self.reader = records

    def key(self, position: int) -> tuple[Key, int, int]:
        """The name of the sample at a position, its shard and its number in there."""
        epoch, place = divmod(position, self.num_samples)
        shard, number = self.order.locate(epoch, place)
        return Key(self.seed, epoch, int(self.starts[shard]) + number), shard, number

    def place(self, sample: int) -> tuple[int, int]:
        """The shard of a sample of the data set, and its number in there."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def labels(self, samples: Iterable[int]) -> np.ndarray:
        """The classes of these samples of the data set. Raises UserError for a label that is none."""
        found = []
        for sample in samples:
            try:
                found.append(int(self.reader.read(*self.place(sample), only="cls")["cls"]))
            except (BadData, KeyError, ValueError) as error:
                raise UserError(f"{self.folder.location}: sample {sample}: no label: {error}") from None
        return np.array(found, dtype=np.int64)

    def __getitems__(self, positions: list[int]) -> Loaded:
        keys, samples, stand_ins, faults = [], [], [], []
        for row, position in enumerate(positions):
            found, failed, mistake = self.load(position)
            faults += failed
            if found is None:
                return Loaded(None, [], faults, mistake)
            stand_ins += [row] if failed else []
            keys.append(found[0])
            samples.append(found[1])
        return Loaded(self.decoder.collate(samples, keys), stand_ins, faults, None)

    def load(self, position: int) -> tuple[tuple[Key, Any] | None, list[Fault], str | None]:
        """(key and sample, the faults met on the way, a mistake); no sample where there is a mistake, or no way."""
        faults: list[Fault] = []
        epoch, place = divmod(position, self.num_samples)
        others = (epoch * self.num_samples + other for other in self.order.replacements(epoch, place))
        for candidate in itertools.chain([position], itertools.islice(others, TRIES if self.skip else 0)):
            key, shard, number = self.key(candidate)
            record, row = divmod(number, self.rows)
            try:
                return (key, self.decoder.decode(self.reader.read(shard, record), row, key)), faults, None
            except BadData as error:
                path = f"{self.folder.location}/{self.index.shards[shard].name}"
                faults.append(Fault(path, number, self.reader.key(shard, record), key.sample, str(error)))
            except UserError as error:
                return None, faults, str(error)
        tries = f"{TRIES} others in its place cannot be read either: {faults[-1]}" if self.skip else None
        return None, faults, tries
