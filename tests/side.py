"""A side of a comparison for the tests. What a process of its own imports first should be little."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from acn_scale.errors import UserError


@contextmanager
def side(log: Path, name: str, mebibytes: int, turns: int) -> Iterator[Callable[[], float]]:
    """Holds so much, writes its name to the log at each turn, and is mistaken after so many."""
    held = torch.ones(mebibytes * 2**18)

    def measure() -> float:
        if log.exists() and log.read_text().count(name) == turns:
            raise UserError(f"{name}: no more turns")
        with log.open("a") as file:
            file.write(name)
        return float(held[0])

    yield measure
