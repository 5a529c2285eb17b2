"""Processes forked from a server that has imported everything: to start DeepSpeed takes seconds, a fork does not."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns at import that it had to guess
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "acn_scale.pretrain",
        "acn_scale.data.images",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and with it all of PyTorch's compiler
        "torch.utils.tensorboard",
        "matplotlib.backends.backend_agg",
        "pytest",
    ]
)
Pipe = _context.Pipe


def process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """It runs already."""
    started = _context.Process(target=target, args=args)
    started.start()
    return started


def command(*arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """What `python ARGUMENTS` would write and end with."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        started = start(*arguments, cwd=cwd, out=out, errors=errors)
        started.join()
        return subprocess.CompletedProcess(arguments, started.exitcode, out.read_text(), errors.read_text())


def start(*arguments: object, cwd: Path | None = None, out: Path, errors: Path) -> BaseProcess:
    """`python ARGUMENTS >out 2>errors`, which runs already."""
    return process(_script, list(map(str, arguments)), cwd or Path.cwd(), dict(os.environ), out, errors)


def _script(arguments: list[str], cwd: Path, environment: dict[str, str], out: Path, errors: Path) -> None:
    for path, stream in ((out, sys.stdout), (errors, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
