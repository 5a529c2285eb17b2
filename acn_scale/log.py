"""Logging to console and file; metrics to metrics.jsonl and TensorBoard under the same names; speeds."""

import contextlib
import errno
import json
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from acn_scale import distributed
from acn_scale.config import Config
from acn_scale.durations import Horizon
from acn_scale.files import whole_lines, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class ConsoleHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class RunLog(logging.FileHandler):
    """A full disk costs lines, and does not fill the console with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def setup_logging(folder: Path, rank: int) -> None:
    """INFO on rank 0, WARNING on the others, to the console and to train.log, which keeps earlier starts' lines."""
    level = logging.INFO if rank == 0 else logging.WARNING
    line = logging.Formatter(f"%(asctime)s %(levelname)s {f'rank {rank} ' if rank else ''}%(message)s", "%H:%M:%S")
    logger = logging.getLogger("acn_scale")
    logger.setLevel(level)
    logger.handlers.clear()
    for handler in (ConsoleHandler(), RunLog(folder / "train.log")):
        handler.setFormatter(line)
        logger.addHandler(handler)


def describe(cfg: Config, model: torch.nn.Module, horizon: Horizon, world_size: int) -> str:
    """A run in one line, with the arithmetic of its batches."""
    micro = cfg.micro_batch_size(world_size)
    accumulation = cfg.train.global_batch_size // (micro * world_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"{cfg.run.name}: {cfg.model.name}, {cfg.model.connectivity}, {cfg.model.depth} blocks, "
        f"{parameters:,} parameters{f', {trained:,} of them trained' if trained < parameters else ''}; "
        f"{horizon.steps} steps of {cfg.train.global_batch_size} samples "
        f"({micro} x {accumulation} accumulated x {world_size} ranks); "
        f"{horizon.samples_per_epoch} samples an epoch; {cfg.train.precision}, ZeRO-{cfg.train.zero_stage}"
    )


def progress_bar(cfg: Config, step: int, horizon: Horizon) -> tqdm:
    """Step, loss, speed and time left, on rank 0; a terminal sees it move, a log file gets a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(
        desc=cfg.run.name,
        total=horizon.steps,
        initial=step,
        unit="step",
        mininterval=interval,
        maxinterval=interval,
        disable=distributed.rank() != 0,
    )


# TensorBoard's "custom scalars" tab: what to look at first, in four rows.
LAYOUT = {
    "training": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "depth": {
        "accuracy by depth": ["Multiline", ["eval/depth_.*/accuracy"]],
        "cut-off, and blocks there are": ["Multiline", ["depth/cutoff", "depth/blocks"]],
        "gradient norm by block": ["Multiline", ["grad_norm/block_.*"]],
    },
    "speed": {
        "samples per second": ["Multiline", ["speed/samples_per_second"]],
        "model FLOPs utilization": ["Multiline", ["speed/mfu"]],
        "share of time spent waiting for data": ["Multiline", ["speed/data_wait_fraction"]],
        "seconds of a step before ranks meet": ["Multiline", ["speed/rank_seconds_.*"]],
        "seconds a checkpoint held training up": ["Multiline", ["speed/checkpoint_stall"]],
    },
    "health": {
        "updates dropped": ["Multiline", ["train/skipped_steps"]],
        "samples that cannot be read": ["Multiline", ["data/bad_samples"]],
        "memory (GiB)": ["Multiline", ["memory/.*"]],
        "restarts": ["Multiline", ["speed/restarts"]],
    },
}


class Metrics:
    """The one writer of a run's metrics: rank 0 writes, the others do nothing.

    A run resumed at `step` goes on as if never stopped: lines of later steps, which the lost part of the run wrote,
    are taken out of metrics.jsonl and purged in TensorBoard. What a full disk does not take is kept, and written
    when there is room again.
    """

    def __init__(self, folder: Path, *, step: int, rank: int) -> None:
        self.path, self.board_folder = folder / "metrics.jsonl", str(folder / "tensorboard")
        self.writes = rank == 0
        self._board: SummaryWriter | None = None
        self._lines: list[str] = []  # not on the disk yet
        self._points: list[Callable[[SummaryWriter], None]] = []  # neither
        self._complained = False
        self.rewind(step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._close_board()

    def rewind(self, step: int) -> None:
        """Forget what came after `step`."""
        if self.writes:
            lines = whole_lines(self.path) if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_file(self.path, "".join(kept).encode())
            self._close_board()
            # purge_step at step 0 too: a start that was killed before its first checkpoint has left points.
            self._board = SummaryWriter(self.board_folder, purge_step=step + 1)
            self._board.add_custom_scalars(LAYOUT)

    def _close_board(self) -> None:
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()
        self._board = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Names have slashes: train/loss, eval/depth_06/accuracy. What is not a finite number is left out."""
        if self.writes:
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            self._lines.append(json.dumps({"step": step} | values) + "\n")
            self._points += [partial(_scalar, name, value, step) for name, value in values.items()]
            self.flush()

    def draw(self, step: int, name: str, figure: "Figure") -> None:
        """A picture, in TensorBoard only."""
        if self.writes:
            self._points.append(lambda board: board.add_figure(name, figure, step))
            self.flush()

    def flush(self) -> None:
        """Have all on the disk, or try again next time."""
        if not self.writes:
            return
        try:
            _append(self.path, "".join(self._lines).encode())
            self._lines.clear()
            self._board = self._board or SummaryWriter(self.board_folder)
            for point in self._points:
                point(self._board)
            self._board.flush()
            self._points.clear()
            self._complained = False
        except OSError as error:
            self._close_board()  # its thread has died of the error
            if not self._complained:
                log.error("%s: %s; metrics are kept until they can be written", self.path, error.strerror or error)
            self._complained = True


def _append(path: Path, content: bytes) -> None:
    """All of it, or nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _scalar(name: str, value: float, step: int, board: SummaryWriter) -> None:
    board.add_scalar(name, value, step)


class Window:
    """What happened since the last line of metrics, without the time of evaluation and saving."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.start, self.steps, self.samples, self.tokens, self.skipped = time.perf_counter(), 0, 0, 0, 0
        self.waited = self.own_seconds = 0.0
        self.losses: list[float] = []

    def add(self, loss: float, *, samples: int, tokens: int, applied: bool, waited: float, own_seconds: float) -> None:
        """Another step: loss, samples and tokens of the global batch, whether it was applied, seconds of waiting for
        data and of work alone.
        """
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.waited += waited
        self.own_seconds += own_seconds
        if applied:
            self.losses.append(loss)
        else:
            self.skipped += 1

    def state_dict(self) -> dict[str, Any]:
        """Without the times: a run that goes on in the middle of a window has others."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restart()
        self.losses, self.skipped = list(state["losses"]), state["skipped"]

    def passed_over(self) -> None:
        """A step that was left out."""
        self.skipped += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - max(before, self.start)  # which may have begun anew in here

    def read(self) -> dict[str, float]:
        """Metrics since the last reading; the loss is the mean over the steps with an update. Call it on all ranks."""
        seconds = time.perf_counter() - self.start
        own = distributed.union([(self.own_seconds / max(1, self.steps), distributed.rank())])
        own.sort()
        metrics = {"train/loss": statistics.fmean(self.losses)} if self.losses else {}
        metrics |= {
            "train/skipped_steps": self.skipped,
            "speed/samples_per_second": self.samples / seconds,
            "speed/tokens_per_second": self.tokens / seconds,
            "speed/data_wait_fraction": self.waited / seconds,
            "speed/rank_seconds_median": own[len(own) // 2][0],
            "speed/rank_seconds_slowest": own[-1][0],
            "speed/slowest_rank": own[-1][1],
            "memory/peak_gib": peak_memory_gib(self.device),
        }
        self.restart()
        return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on its GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
