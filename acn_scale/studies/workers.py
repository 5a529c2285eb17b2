"""Runs of a study in processes of their own, as many at a time as there are cores."""

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.util import Finalize
from typing import Any

import torch
from tqdm import tqdm

from acn_scale import distributed
from acn_scale.checkpoint import trained
from acn_scale.config import Config
from acn_scale.errors import RunFailed
from acn_scale.pretrain import train
from acn_scale.stopping import end_with_parent

Measure = Callable[[Config], None]


def train_all(name: str, configs: Sequence[Config], measure: Measure | None, workers: int) -> dict[str, str]:
    """Train and measure them, `workers` at a time. Returns why those failed that did, by run. One whose process is
    killed is tried once more.

    Raises RunFailed where a signal stopped one: no other is begun then, and those under way come to their end.
    """
    if not configs:
        return {}
    # One thread each; started anew, since a process that has trained may hold locks that a fork would copy.
    os.environ["OMP_NUM_THREADS"] = "1"
    pools = {number: _worker(number) for number in range(min(workers, len(configs)))}
    idle, left, running = [*pools], deque(configs), {}
    failures: dict[str, str] = {}
    killed: set[str] = set()
    stopped = False
    with tqdm(total=len(configs), desc=name, unit="run", mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        try:
            while running or (left and not stopped):
                while idle and left and not stopped:
                    number, cfg = idle.pop(), left.popleft()
                    running[_submit(pools[number], cfg, measure)] = number, cfg
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, cfg = running.pop(future)
                    idle.append(number)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        pools[number] = _worker(number)
                        if cfg.run.name not in killed:
                            killed.add(cfg.run.name)
                            left.append(cfg)
                            continue
                        error = RunFailed("its process died, twice: was memory short?")
                    if error is not None:
                        failures[cfg.run.name] = str(error).splitlines()[0] if str(error) else repr(error)
                    elif not future.result():
                        stopped = True
                    bar.update()
        except KeyboardInterrupt:
            stopped = True
        finally:
            for pool in pools.values():
                pool.shutdown()
    if stopped:
        raise RunFailed(f"{name}: stopped, as a signal asked for; the same command goes on")
    return failures


def _worker(number: int) -> ProcessPoolExecutor:
    """A pool of one process: where that is killed, others' runs go on."""
    return ProcessPoolExecutor(1, get_context("spawn"), _start_worker, (number,))


def _submit(pool: ProcessPoolExecutor, cfg: Config, measure: Measure | None) -> Future[bool]:
    try:
        return pool.submit(_train, cfg.model_dump(mode="json"), measure)
    except BrokenProcessPool as error:  # killed while it had nothing to do
        future: Future[bool] = Future()
        future.set_exception(error)
        return future


def usual_workers() -> int:
    """One for each GPU, or for each core where there is no GPU; of those that a job has been given."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _take_gpu(number: int, gpus: int) -> None:
    """Worker number 0, 1, ... takes the GPU of that number."""
    if gpus:
        os.environ["LOCAL_RANK"] = str(number % gpus)


def _start_worker(number: int) -> None:
    """The study has one bar of its own; each run's log is in its folder.

    All runs of a worker share one process group: DeepSpeed keeps hold of the first one it sees.
    """
    end_with_parent()
    _take_gpu(number, torch.cuda.device_count())
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    stack = ExitStack()
    stack.enter_context(distributed.process_group())
    Finalize(None, stack.close, exitpriority=1)  # a worker's end passes other ways of cleaning up by


def _train(values: dict[str, Any], measure: Measure | None) -> bool:
    """In a worker: one run, alone; False where a signal stopped it."""
    cfg = Config.model_validate(values)
    if not trained(cfg) and not train(cfg, distributed.local_device()):
        return False
    if measure:
        measure(cfg)
    return True
