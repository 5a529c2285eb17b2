"""Samples -> batches: the infinite, resumable training stream of a rank, and the finite evaluation pass."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import context, popen_fork
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from acn_scale.config import StreamConfig
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.data.samples import Batch, Loaded, Samples
from acn_scale.errors import SharedError, UserError
from acn_scale.stopping import SIGNALS

log = logging.getLogger(__name__)


def _loader(samples: Samples, batches: Any, workers: int) -> DataLoader:
    """The generator is the loader's own: it draws a number when it starts, which must not shift the model's dropout."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=_LoaderContext() if workers else None,
        worker_init_fn=ignore_stop_signals,
        collate_fn=_as_is,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


class _KilledPopen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()  # it ignores SIGTERM, and whoever sends that as a last resort would wait for it without end


class _LoaderProcess(context.ForkProcess):
    _Popen = staticmethod(_KilledPopen)


class _LoaderContext(context.ForkContext):
    """Forks, since open shards are not to be pickled."""

    Process = _LoaderProcess


def ignore_stop_signals(_: int) -> None:
    """In a loader process: it gets the job's signals too, and must go on until the trainer closes it."""
    for number in (signal.SIGUSR1, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _as_is(loaded: Loaded) -> Loaded:
    return loaded


Share = Callable[[list[Any]], list[Any]]


def alone(items: list[Any]) -> list[Any]:
    """The items of all ranks, where there is one."""
    return items


class DeviceCopies:
    """Copies batches to a GPU on a CUDA stream of its own, so that the next one travels while this one is used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Batch:
        """The batch on the device, which may not be used yet. It comes from pinned memory."""
        with torch.cuda.stream(self.stream):
            return {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}

    def finish(self, batch: Batch) -> None:
        """From here on it may be used on the current CUDA stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for values in batch.values():
            values.record_stream(current)  # or its memory could be given away while it is in use


class BadSamples:
    """The samples of a data set that could not be read, the same ones on every rank, and what they lead to."""

    def __init__(self, cfg: StreamConfig, share: Share, known: list[int] | None = None) -> None:
        self.cfg, self.share = cfg, share
        self.known = set(known or [])

    def note(self, loaded: Loaded) -> None:
        """Tell all ranks, and raise SharedError on all where one cannot go on. Call it on every rank."""
        for item in self.share([*loaded.faults, *filter(None, [loaded.mistake])]):
            if isinstance(item, str):
                raise SharedError(item)
            if self.cfg.on_bad_sample == "fail":
                raise SharedError(str(item))
            if item.sample not in self.known:
                self.known.add(item.sample)
                if item in loaded.faults:  # a line in all, by the rank that met it
                    log.warning("skipped %s", item)
            if len(self.known) > self.cfg.max_bad_samples:
                raise SharedError(f"data.max_bad_samples = {self.cfg.max_bad_samples}: more cannot be read; {item}")


class Stream:
    """An endless iterator of this rank's micro batches. Its order depends on the seed alone.

    Step t of the run is the global batch of the same positions, one after another, whatever the number of ranks,
    loader workers and restarts. A batch may cross the end of an epoch; no sample is dropped or repeated there.

    Taking a batch is collective over the ranks, through `share`: what one of them cannot read, all of them hear of.
    """

    def __init__(
        self,
        samples: Samples,
        cfg: StreamConfig,
        plan: BatchPlan,
        share: Share = alone,
        copies: DeviceCopies | None = None,
    ) -> None:
        self.samples, self.cfg, self.plan, self.share, self.copies = samples, cfg, plan, share, copies
        self.taken = 0  # micro batches handed out
        self.waited = 0.0  # seconds spent on waiting for this rank's own samples
        self._ahead: Loaded | None = None  # on its way to the device
        self.bad = BadSamples(cfg, share)
        self._batches: Iterator[Loaded] | None = None
        self._fetched: set[tuple[int, int, int]] = set()  # windows whose shards are on their way

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        if self._batches is None:
            self._batches = iter(_loader(self.samples, self.plan.batches(self.taken), self.cfg.workers))
        step, micro_step = self.plan.place(self.taken)
        if micro_step == 0:
            self._prefetch(step)
        loaded = self._load() if self._ahead is None else self._ahead
        if self.copies and loaded.batch is not None:
            self.copies.finish(loaded.batch)
            self._ahead = self._load()
        self.waited += time.perf_counter() - start
        try:
            self.bad.note(loaded)
        except SharedError:
            self.close()  # the error's traceback would keep the loader processes
            raise
        self.taken += 1
        return self.samples.decoder.finish(loaded.batch)

    def _load(self) -> Loaded:
        loaded = next(self._batches)
        if self.copies is None or loaded.batch is None:
            return loaded
        return loaded._replace(batch=self.copies.start(loaded.batch))

    def pass_over(self) -> None:
        """Leave out a whole global batch."""
        for _ in range(self.plan.micro_steps(self.plan.place(self.taken)[0])):
            next(self)

    def samples_of(self, step: int) -> list[int]:
        """The samples of this rank's part of a global batch, as numbers in the data set."""
        return [self.samples.key(position)[0].sample for position in self.plan.positions(step).flatten().tolist()]

    def close(self) -> None:
        """End the loader processes. A next batch starts them again where they were."""
        self._batches = self._ahead = None

    def _prefetch(self, step: int) -> None:
        """Have the shards of this step's windows and of the windows after them brought to this node."""
        order, size = self.samples.order, self.samples.num_samples
        positions = self.plan.positions(step).flatten().tolist()
        now = {order.window_of(*divmod(position, size)) for position in positions}
        wanted = now | {order.next_window(*window) for window in now}
        for window in sorted(wanted - self._fetched):
            self.samples.folder.prefetch(order.shards_in(*window))
        self._fetched = wanted

    def state_dict(self) -> dict[str, Any]:
        """A few numbers. Call it between optimizer steps, where they are the same on every rank."""
        order = self.samples.order
        return {
            "samples": self.taken * self.plan.micro_batch_size * self.plan.world_size,
            "fingerprint": self.samples.index.fingerprint,
            "order": order.settings,
            "bad_samples": sorted(self.bad.known),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken. Raises UserError where the data or their order are others now."""
        now = self.state_dict()
        order = "another seed, streams, shuffle_window, buckets or tasks"
        for key, what in (("fingerprint", "other shards"), ("order", order)):
            if state[key] != now[key]:
                raise UserError(f"data.train = {self.samples.index.folder}: not the data this run began with: {what}")
        self.taken = state["samples"] // (self.plan.micro_batch_size * self.plan.world_size)
        self.bad = BadSamples(self.cfg, self.share, state["bad_samples"])
        self.close()


class Evaluation:
    """The evaluation pass of one rank, as often as it is iterated over.

    Every sample comes once over all ranks, in disk order, which take turns at whole batches: a batch is the same on any
    number of them, and so is what the model makes of it, to the last digit. All get as many batches, so that
    collectives in the model meet; what fills up for one that is lacking, or stands in for a sample that cannot be
    read, does not count. Random draws are keyed by the sample alone: each pass sees the same masks.
    """

    def __init__(
        self,
        samples: Samples,
        cfg: StreamConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        share: Share = alone,
    ) -> None:
        self.samples, self.cfg = samples, cfg
        self.bad = BadSamples(cfg, share)
        total = samples.num_samples
        batches = [list(range(start, min(start + batch_size, total))) for start in range(0, total, batch_size)]
        lacking = -len(batches) % world_size
        mine = [*((batch, True) for batch in batches), *[([0], False)] * lacking][rank::world_size]
        self.positions = [batch for batch, _ in mine]
        self.counts = [torch.full((len(batch),), there) for batch, there in mine]

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        """(batch, which of its samples count (batch,) bool)."""
        batches = iter(_loader(self.samples, self.positions, self.cfg.workers))
        try:
            for counts in self.counts:
                loaded = next(batches)
                self.bad.note(loaded)
                counts = counts.clone()
                counts[loaded.stand_ins] = False
                yield self.samples.decoder.finish(loaded.batch), counts
        finally:
            del batches  # and with it the loader processes, which an error's traceback would keep
