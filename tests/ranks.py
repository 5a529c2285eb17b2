"""Long-lived ranks for tests: real processes in a real process group."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import forked
import torch

PATIENCE = 400  # seconds for one call
GRACE = 5  # seconds for the others after one rank has failed: they may hang in a collective


class Ranks:
    """Call it with a function of a test module: it runs on every rank; the results come back in order of rank."""

    def __init__(self, world_size: int, on: ModuleType = forked) -> None:
        """`on`: forked, which are CPUs, or gpus."""
        self.world_size = world_size
        self.on = on
        self._start()

    def _start(self) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(self.world_size):
            ours, theirs = self.on.Pipe()
            self.pipes.append(ours)
            self.processes.append(self.on.process(_serve, theirs, rank, self.world_size, port))

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers, patience = [], PATIENCE
        for pipe in self.pipes:
            answers.append(_answer(pipe, patience))
            patience = patience if answers[-1][0] else GRACE
        failures = [f"rank {rank}: {answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failures:
            self._kill()
            self._start()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=GRACE)
        self._kill()


def _answer(pipe: Connection, patience: float) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(patience) else (False, "no answer")
    except EOFError:
        return False, "the process has ended"


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    from acn_scale.distributed import process_group

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group():
        while (call := pipe.recv()) is not None:
            function, args = call
            try:
                pipe.send((True, function(*args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
