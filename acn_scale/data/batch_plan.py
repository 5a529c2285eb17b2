"""Which samples make up each step, and which of them are a rank's."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchPlan:
    """Which positions make up the micro batches of a rank. `group` neighbours stay together on one rank.

    With a `ramp` of some steps, the first global batches are an eighth of the others, and double three times.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    group: int
    ramp: int = 0

    def _stages(self) -> list[tuple[int, int]]:
        """(first step, size of the global batch) of each part of the ramp, and of what follows it."""
        if not self.ramp:
            return [(0, self.global_batch_size)]
        return [(self.ramp * part // 3, self.global_batch_size * 2**part // 8) for part in range(4)]

    def size(self, step: int) -> int:
        """Samples of a global batch."""
        return next(size for first, size in reversed(self._stages()) if step >= first)

    def start(self, step: int) -> int:
        """Samples before a step: the position of its first one."""
        stages = self._stages()
        ends = [first for first, _ in stages[1:]] + [step]
        return sum(max(0, min(step, end) - first) * size for (first, size), end in zip(stages, ends, strict=True))

    def step_at(self, position: int) -> int:
        """The step that a position belongs to."""
        for first, size in reversed(self._stages()):
            if position >= self.start(first):
                return first + (position - self.start(first)) // size
        raise ValueError(f"position {position}: must not be negative")

    def micro_steps(self, step: int) -> int:
        """Micro batches to an optimizer step."""
        return self.size(step) // (self.micro_batch_size * self.world_size)

    def positions(self, step: int) -> np.ndarray:
        """This rank's part of a global batch, every world_size-th group: (micro_steps, micro_batch_size)."""
        positions = np.arange(self.size(step)).reshape(-1, self.world_size, self.group)
        return self.start(step) + positions[:, self.rank].reshape(self.micro_steps(step), self.micro_batch_size)

    def place(self, taken: int) -> tuple[int, int]:
        """The step of the micro batch after the first `taken` ones, and which of the step's it is."""
        position = taken * self.micro_batch_size * self.world_size
        step = self.step_at(position)
        return step, (position - self.start(step)) // (self.micro_batch_size * self.world_size)

    def batches(self, taken: int) -> Iterator[list[int]]:
        """The positions of each micro batch after the first `taken` ones, without end."""
        step, first = self.place(taken)
        while True:
            for positions in self.positions(step)[first:]:
                yield positions.tolist()
            step, first = step + 1, 0
