"""A side of a comparison in processes of its own, built once and measured when it is its turn."""

import importlib.util
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch

from acn_scale.benchmark.rows import Row, in_turns, row
from acn_scale.distributed import free_port
from acn_scale.errors import UserError

Measure = Callable[[], float]
Build = Callable[..., AbstractContextManager[Measure]]  # a function of a module, as another process looks it up


class Side:
    """Neither side finds what the other left in memory, and each has a peak of its own."""

    def __init__(self, build: Build, *args: Any, ranks: int = 1) -> None:
        """`ranks`: processes that are measured together, each with a GPU of its own where there are any."""
        self._build, self._ranks = (build, *args), ranks
        self.peak = 0.0  # MiB, of what it has been up to now; of a GPU's memory where it uses one

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")  # nothing of this process goes with it
        self._connections, self._processes, port = [], [], free_port()
        threads = max(1, torch.get_num_threads() // self._ranks)  # more than cores would wait for each other
        for rank in range(self._ranks):
            connection, other = context.Pipe()
            given = environment(self._ranks, rank, port)
            process = context.Process(target=_serve, args=(other, given, threads, *self._build))
            process.start()
            other.close()
            self._connections.append(connection)
            self._processes.append(process)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if error:
                process.kill()  # a rank may wait for one that is gone
            process.join()

    def measure(self) -> float:
        """Of its slowest rank. Raises UserError for what a process of it says is one, and for its end."""
        values, waiting = [], [*self._connections]
        try:
            for connection in waiting:
                connection.send(None)
            while waiting:
                connection = wait(waiting)[0]
                value, peak, mistake = connection.recv()
                if mistake:
                    raise UserError(mistake)
                values.append(value)
                self.peak = max(self.peak, peak)
                waiting.remove(connection)
        except (EOFError, ConnectionError):
            raise UserError("a side of the benchmark has ended; what it wrote says why") from None
        return max(values)


def environment(ranks: int = 1, rank: int = 0, port: int = 0) -> dict[str, str]:
    """Of a process of a side. It sees as many GPUs as the side has ranks, the first of those that this one may use: a
    Trainer that saw more would spread one batch for each over them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(given.split(",")[:ranks])}
    if ranks == 1:
        return visible
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return visible | {name: str(value) for name, value in launched.items()}


def _serve(connection: Connection, given: dict[str, str], threads: int, build: Build, *args: Any) -> None:
    os.environ.update(given)  # before CUDA starts
    torch.set_num_threads(threads)
    try:
        with build(*args) as measure:
            while _has_a_turn(connection):
                connection.send((measure(), peak_memory(), ""))
    except UserError as error:
        connection.send((0.0, 0.0, str(error)))
    except Exception:
        traceback.print_exc()


def _has_a_turn(connection: Connection) -> bool:
    """Waits for it; at the end of the comparison there is none any more."""
    try:
        connection.recv()
    except EOFError:
        return False
    return True


def compare(sides: dict[str, Side], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """What each of them, by name, measures in each round, and its peak memory in MiB."""
    with ExitStack() as stack:
        for side in sides.values():
            stack.enter_context(side)
        figures = in_turns({name: side.measure for name, side in sides.items()}, rounds)
        return figures, {name: side.peak for name, side in sides.items()}


def beside(
    work: str, sides: dict[str, Side], rounds: int, unit: str = "s", *, more_is_better: bool = False
) -> Iterator[Row]:
    """The first side is ours; a row for each of the others, peers by their names."""
    figures, peaks = compare(sides, rounds)
    ours, *peers = sides
    for peer in peers:
        both = figures[ours], figures[peer]
        yield row(work, peer, unit, *both, more_is_better=more_is_better, peaks=(peaks[ours], peaks[peer]))


def speed(run: Callable[[], Iterator[int]]) -> Measure:
    """Samples a second of a run that yields how many each batch has."""

    def measure() -> float:
        start = time.perf_counter()
        samples = sum(run())
        return samples / (time.perf_counter() - start)

    return measure


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
