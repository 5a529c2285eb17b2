"""A side of a comparison for the tests. What a process of its own imports first should be little."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from acn_scale import distributed
from acn_scale.errors import UserError


@contextmanager
def side(log: Path, name: str, mebibytes: int, turns: int) -> Iterator[Callable[[], float]]:
    """Holds so much, writes its name to the log at each turn, and is mistaken after so many. Where it ends without an
    error, it writes a dot."""
    held = torch.ones(mebibytes * 2**18)

    def measure() -> float:
        if log.exists() and log.read_text().count(name) == turns:
            raise UserError(f"{name}: no more turns")
        with log.open("a") as file:
            file.write(name)
        return float(held[0])

    yield measure
    with log.open("a") as file:
        file.write(".")


@contextmanager
def visible() -> Iterator[Callable[[], float]]:
    """The numbers of the GPUs that it may use, as digits."""
    yield lambda: float(os.environ["CUDA_VISIBLE_DEVICES"].replace(",", ""))


@contextmanager
def threads() -> Iterator[Callable[[], float]]:
    yield lambda: float(torch.get_num_threads())


@contextmanager
def summed(unwilling: int) -> Iterator[Callable[[], float]]:
    """The sum of the ranks' numbers from 1; one of them is mistaken instead, and the others wait for it."""
    with distributed.process_group():

        def measure() -> float:
            if distributed.rank() == unwilling:
                raise UserError(f"rank {unwilling} does not want to")
            return distributed.sum_on_cpu([distributed.rank() + 1.0])[0]

        yield measure
