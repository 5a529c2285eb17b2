"""Tasks one after another: the classes of each, when its part of the run begins, and the order of its samples."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from acn_scale.data.order import DiskOrder


def deal_classes(classes: int, tasks: int, seed: int) -> np.ndarray:
    """The task 0, 1, ... of each class, (classes,): as many classes for each task, drawn by the seed."""
    order = np.random.default_rng([seed, classes, tasks, 3]).permutation(classes)
    task_of = np.empty(classes, dtype=np.int64)
    task_of[order] = np.arange(classes) * tasks // classes
    return task_of


def samples_of_tasks(labels: np.ndarray, task_of: np.ndarray) -> list[np.ndarray]:
    """The samples of each task, by their numbers."""
    return [np.flatnonzero(task_of[labels] == task) for task in range(task_of.max() + 1)]


def keep(labels: np.ndarray, task_of: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Of the samples of each task, `count` of each class, drawn by the seed."""
    order = np.random.default_rng([seed, count, 5]).permutation(len(labels))
    by_class = [order[labels[order] == label][:count] for label in range(len(task_of))]
    return [
        np.concatenate([by_class[label] for label in np.flatnonzero(task_of == task)])
        for task in range(task_of.max() + 1)
    ]


@dataclass(frozen=True)
class Turns:
    """Optimizer steps of each of the tasks, equal to within one."""

    steps: int
    tasks: int

    def start(self, task: int) -> int:
        """Updates before the task's first one."""
        return self.steps * task // self.tasks

    def task(self, step: int) -> int:
        """That the update after `step` updates is of."""
        return min(((step + 1) * self.tasks - 1) // self.steps, self.tasks - 1)

    def ends(self, step: int) -> bool:
        """Whether the update after which there are `step` was a task's last."""
        return step == self.steps or self.task(step) != self.task(step - 1)


class TaskOrder(DiskOrder):
    """The samples of one task after another, shuffled anew in each pass: a pure function of (seed, position).

    `tasks` holds the samples of each, as numbers in the data set, `firsts` the positions where they begin; an epoch has
    the mean size of a task. With `kept` samples of each task, every second sample is, from the second task on, one of
    those kept of earlier tasks: experience replay (Chaudhry et al. 2019, arXiv 1902.10486) in batches of the same size.
    """

    def __init__(
        self,
        samples_per_shard: np.ndarray,
        tasks: Sequence[np.ndarray],
        *,
        firsts: Sequence[int],
        seed: int,
        kept: Sequence[np.ndarray] = (),
    ) -> None:
        super().__init__(samples_per_shard)
        self.num_samples = max(1, self.num_samples // len(tasks))
        self.settings = [seed, *firsts, sum(map(len, kept))]  # what the order depends on besides the data
        self._tasks, self._firsts, self._seed, self._kept = tasks, np.array(firsts), seed, kept
        self._pass = functools.lru_cache(maxsize=4)(self._shuffle)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, sample in that shard) of a position 0 ... num_samples - 1."""
        task = self._task(epoch, position)
        number = epoch * self.num_samples + position - int(self._firsts[task])
        replayed = False
        if self._kept and task:
            number, odd = divmod(number, 2)
            replayed = odd == 1
        size = sum(map(len, self._kept[:task])) if replayed else len(self._tasks[task])
        turn, place = divmod(number, size)
        return super().locate(epoch, int(self._pass(task, replayed, turn)[place]))

    def replacements(self, epoch: int, position: int) -> Iterator[int]:
        """Positions of the same task, without end."""
        task = self._task(epoch, position)
        others = super().replacements(epoch, position)
        return (other for other in others if self._task(epoch, other) == task)

    def window_of(self, epoch: int, position: int) -> tuple[int, int, int]:
        """A task is a window: its samples can lie in any shard."""
        return 0, 0, self._task(epoch, position)

    def next_window(self, epoch: int, stream: int, window: int) -> tuple[int, int, int]:
        return epoch, stream, min(window + 1, len(self._tasks) - 1)

    def shards_in(self, epoch: int, stream: int, window: int) -> list[int]:
        """The shards that a task's samples lie in."""
        return sorted({super(TaskOrder, self).locate(0, sample)[0] for sample in self._tasks[window].tolist()})

    def _task(self, epoch: int, position: int) -> int:
        return int(np.searchsorted(self._firsts, epoch * self.num_samples + position, side="right")) - 1

    def _shuffle(self, task: int, replayed: bool, turn: int) -> np.ndarray:
        samples = np.concatenate(self._kept[:task]) if replayed else self._tasks[task]
        return np.random.default_rng([self._seed, task, int(replayed), turn, 4]).permutation(samples)
