"""Logging to console and file; metrics to metrics.jsonl and TensorBoard under the same names; speeds."""

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from acn_scale import distributed
from acn_scale.files import write_file


class ConsoleHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(folder: Path, rank: int) -> None:
    """INFO on rank 0, WARNING on the others, to the console and to train.log, which keeps earlier starts' lines."""
    level = logging.INFO if rank == 0 else logging.WARNING
    line = logging.Formatter(f"%(asctime)s %(levelname)s {f'rank {rank} ' if rank else ''}%(message)s", "%H:%M:%S")
    logger = logging.getLogger("acn_scale")
    logger.setLevel(level)
    logger.handlers.clear()
    for handler in (ConsoleHandler(), logging.FileHandler(folder / "train.log")):
        handler.setFormatter(line)
        logger.addHandler(handler)


class Metrics:
    """The one writer of a run's metrics: rank 0 writes, the others do nothing.

    A run resumed at `step` goes on as if never stopped: lines of later steps, which the lost part of the run wrote,
    are taken out of metrics.jsonl and purged in TensorBoard.
    """

    def __init__(self, folder: Path, *, step: int, rank: int) -> None:
        self._file = self._board = None
        if rank == 0:
            path = folder / "metrics.jsonl"
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
            write_file(path, "".join(kept).encode())
            self._file = path.open("a")
            # At step 0 too: a start that was killed before its first checkpoint has left points.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
            self._board.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Names have slashes: train/loss, eval/depth_06/accuracy."""
        if self._file:
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Have TensorBoard's file written too; a line of metrics.jsonl is as soon as it is made."""
        if self._board:
            self._board.flush()

    def draw(self, step: int, name: str, figure: Figure) -> None:
        """A picture, in TensorBoard only."""
        if self._board:
            self._board.add_figure(name, figure, step)


def _whole_lines(path: Path) -> list[str]:
    """Without a last line that a killed process left unfinished."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


class Window:
    """What happened since the last line of metrics, without the time of evaluation and saving."""

    def __init__(self, samples_per_step: int, tokens_per_sample: int, device: torch.device) -> None:
        self.samples_per_step, self.tokens_per_sample, self.device = samples_per_step, tokens_per_sample, device
        self._restart()

    def _restart(self) -> None:
        self.start, self.steps, self.skipped, self.waited = time.perf_counter(), 0, 0, 0.0
        self.losses: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, *, applied: bool, waited: float) -> None:
        """Another step: this rank's loss, whether the update was applied, seconds this rank waited for data."""
        self.steps += 1
        self.waited += waited
        if applied:
            self.losses.append(loss)
        else:
            self.skipped += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Metrics since the last reading; the loss is the mean over the ranks and the applied steps. Call it on all."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.losses:
            sums = torch.stack([torch.stack(self.losses).double().sum(), sums[1] + len(self.losses)])
        loss, steps = distributed.sum_over_ranks(sums).tolist()
        seconds = time.perf_counter() - self.start
        samples = self.steps * self.samples_per_step
        metrics = {"train/loss": loss / steps} if steps else {}
        metrics |= {
            "train/skipped_steps": self.skipped,
            "speed/samples_per_second": samples / seconds,
            "speed/tokens_per_second": samples * self.tokens_per_sample / seconds,
            "speed/data_wait_fraction": self.waited / seconds,
            "memory/peak_gib": peak_memory_gib(self.device),
        }
        self._restart()
        return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on its GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
