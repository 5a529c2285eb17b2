"""Ranks and what they agree on. One process is a world of size 1, with a process group like any other."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from acn_scale.errors import RunFailed, SharedError, UserError

MEETING = timedelta(minutes=15)  # in which all ranks must have started
PATIENCE = timedelta(hours=6)  # of a collective: a rank that hangs is the watchdog's to find, long before
waits = False  # whether this rank waits for the others: which of those that stand still is to blame
_control: dist.ProcessGroup | None = None  # for what ranks say to each other from the CPU


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks that the launcher started and yield this rank's device.

    Reads RANK, WORLD_SIZE and LOCAL_RANK (deepspeed, torchrun), or Slurm's variables (srun), or else runs alone. The
    group is always left: a rank that exits inside one can abort the whole job.
    """
    _export_environment()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, also in the convolution of the patches
        torch.backends.cudnn.deterministic = True  # or a resumed run is not the unbroken one to the last digit
    store, rank, world_size = next(dist.rendezvous("env://", timeout=MEETING))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    global _control
    _control = dist.new_group(backend="gloo", timeout=PATIENCE) if device.type == "cuda" else dist.group.WORLD
    try:
        yield device
    finally:
        _control = None  # a group that something still holds is not left: its threads would abort the process's end
        dist.destroy_process_group()


def _export_environment() -> None:
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if "RANK" not in os.environ and tasks > 1:
        if "SLURM_LAUNCH_NODE_IPADDR" not in os.environ:  # in the batch script itself, or the shell of salloc
            raise UserError(f"SLURM_NTASKS = {tasks}, and this process is none of these; start it with srun, or unset "
                            "SLURM_NTASKS to have it run alone")  # fmt: skip
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_ADDR", os.environ["SLURM_LAUNCH_NODE_IPADDR"])
        # Another port at each start of a job: what is left of the start before must not answer.
        number = 7 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_RESTART_COUNT", 0))
        os.environ.setdefault("MASTER_PORT", str(20_000 + number % 20_000))
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("LOCAL_RANK", "0")  # one of several GPUs, where each has a run of its own
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        # Slurm may show each rank a GPU of its own and no other.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def rank() -> int:
    """This process's number among all, also before the group is joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def world_size() -> int:
    return dist.get_world_size()


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum, the same on all ranks. Changes `values`."""
    dist.all_reduce(values)
    return values


def sum_on_cpu(values: list[float]) -> list[float]:
    """Elementwise sum over the ranks, the same on all, without waiting for what a GPU is still at."""
    sums = torch.tensor(values, dtype=torch.float64)
    _sum_on_cpu(sums)
    return sums.tolist()


def _sum_on_cpu(values: torch.Tensor) -> None:
    if world_size() > 1:
        with waiting():
            dist.all_reduce(values, group=_control)


@contextmanager
def waiting() -> Iterator[None]:
    """Within it this rank waits for the others."""
    global waits
    waits = True
    try:
        yield
    finally:
        waits = False


def union(items: list[Any]) -> list[Any]:
    """The items of all ranks, by rank, on every rank. One small sum where no rank has any, which is the rule.

    It goes from CPU to CPU, without waiting for what a GPU is still at.
    """
    counts = torch.tensor(len(items))
    _sum_on_cpu(counts)
    if counts == 0:
        return []
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items, group=_control)
    return [item for part in parts for item in part]


@contextmanager
def together() -> Iterator[None]:
    """A UserError or RunFailed inside this, on any rank, is raised on all: none waits for one that is gone."""
    errors = []
    try:
        yield
    except UserError as error:
        errors.append(SharedError(str(error)))
    except RunFailed as error:
        errors.append(error)
    for error in union(errors):
        raise error
