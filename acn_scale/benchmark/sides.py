"""A side of a comparison in a process of its own, built once and measured when it is its turn."""

import importlib.util
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from acn_scale.benchmark.rows import Row, in_turns, row
from acn_scale.errors import UserError

Measure = Callable[[], float]
Build = Callable[..., AbstractContextManager[Measure]]  # a function of a module, as another process looks it up


class Side:
    """Neither side finds what the other left in memory, and each has a peak of its own."""

    def __init__(self, build: Build, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # nothing of this process goes with it
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, torch.get_num_threads(), build, *args))
        self._process.start()
        other.close()
        self.peak = 0.0  # MiB, of what it has been up to now; of a GPU's memory where it uses one

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def measure(self) -> float:
        """Raises UserError for what its process says is one, and for its end."""
        try:
            self._connection.send(None)
            value, self.peak, mistake = self._connection.recv()
        except (EOFError, BrokenPipeError):
            raise UserError("a side of the benchmark has ended; what it wrote says why") from None
        if mistake:
            raise UserError(mistake)
        return value


def _serve(connection: Connection, threads: int, build: Build, *args: Any) -> None:
    torch.set_num_threads(threads)
    try:
        with build(*args) as measure:
            while True:
                connection.recv()
                connection.send((measure(), peak_memory(), ""))
    except EOFError:
        pass  # no more turns
    except UserError as error:
        connection.send((0.0, 0.0, str(error)))
    except Exception:
        traceback.print_exc()


def compare(sides: dict[str, tuple[Any, ...]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Of sides by name, each as (build, *args): what each measures in each round, and its peak memory in MiB."""
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Side(*side)) for name, side in sides.items()}
        figures = in_turns({name: side.measure for name, side in opened.items()}, rounds)
        return figures, {name: side.peak for name, side in opened.items()}


def seconds_beside(work: str, peer: str, sides: dict[str, tuple[Any, ...]], rounds: int) -> Row:
    """A row of what takes time, of two sides as in `compare`: ours and the peer's."""
    figures, peaks = compare(sides, rounds)
    return row(work, peer, "s", *figures.values(), more_is_better=False, peaks=tuple(peaks.values()))


def peak_memory() -> float:
    """Of this process in MiB: of the GPU where it uses one, else of main memory.

    (getrusage would tell the peak of the process that it was forked from, if higher.)
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def need(*packages: str) -> None:
    """Raises UserError where a peer is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package}: is not installed; requirements-test.txt has the peers")
