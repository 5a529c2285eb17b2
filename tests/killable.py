"""The real entry point in processes that a test can kill, and what each of them has trained on."""

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forked
from made import numbers_in

PATIENCE = 120  # seconds for one start
# A rank, and the micro batch whose "data" or "backward" pass it never gets to the end of, or ends with an "error".
Hang = tuple[int, int, str]


class Start:
    """The ranks of one start of `deepspeed acn_scale/pretrain.py ARGUMENTS`; they write beside `record`."""

    def __init__(self, arguments: Sequence[str], record: Path, ranks: int, hang: Hang | None = None) -> None:
        self.record = record
        port = random.randint(20_000, 30_000)
        self.processes = [forked.process(pretrain, arguments, record, rank, ranks, port, hang) for rank in range(ranks)]

    def after(self, batches: int) -> None:
        """Wait for so many more micro batches, or for the end of a rank."""
        enough = len(trained(self.record)) + batches
        while all(process.exitcode is None for process in self.processes) and len(trained(self.record)) < enough:
            time.sleep(0.02)

    def send(self, number: int, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def kill(self, batches: int) -> None:
        """SIGKILL all ranks at some moment after so many more micro batches, if the run has not ended by then."""
        self.after(batches)
        time.sleep(random.uniform(0, 0.1))
        for process in random.sample(self.processes, len(self.processes)):
            process.kill()
            process.join()

    def wait(self) -> list[int | None]:
        """The ranks' exit codes; None where one hangs."""
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes


def trained(record: Path, rank: int = 0) -> list[tuple[int, list[int]]]:
    """(micro batch, numbers of its images) in the order in which a rank took them, over all starts."""
    path = record.with_suffix(f".{rank}")
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def said(record: Path, rank: int = 0) -> str:
    """What a rank wrote to standard error."""
    return record.with_suffix(f".{rank}.err").read_text()


def pretrain(arguments: Sequence[str], record: Path, rank: int, ranks: int, port: int, hang: Hang | None) -> None:
    import torch

    from acn_scale import pretrain
    from acn_scale.cli import exit_on_user_error
    from acn_scale.data.samples import Batch
    from acn_scale.data.stream import Stream

    take = Stream.__next__
    file = record.with_suffix(f".{rank}").open("ab", buffering=0)

    def recorded(stream: Stream) -> Batch:
        if hang == (rank, stream.taken, "data"):
            time.sleep(1000)
        if hang == (rank, stream.taken, "backward"):
            torch.Tensor.backward = lambda *_, **__: time.sleep(1000)
        if hang == (rank, stream.taken, "error"):
            torch.Tensor.backward = lambda *_, **__: 1 / 0
        place, batch = stream.taken, take(stream)
        file.write(json.dumps([place, numbers_in(batch["images"])]).encode() + b"\n")
        return batch

    Stream.__next__ = recorded
    with record.with_suffix(f".{rank}.err").open("ab") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["acn_scale/pretrain.py", *arguments]
    exit_on_user_error(pretrain.main)
