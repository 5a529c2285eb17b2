"""The GPUs of this machine are for test_gpu.py: all other tests are of CPUs, and see none."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch

NAME = "GPUS_FOR_TESTS"  # of an environment variable, for the processes that share the tests
if NAME not in os.environ:
    there = ",".join(map(str, range(torch.cuda.device_count())))
    os.environ[NAME] = there and os.environ.get("CUDA_VISIBLE_DEVICES", there)
FOUND = os.environ[NAME]
SEEN = "GPUS_ARE_SEEN"  # in the processes below
if SEEN not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
_context = multiprocessing.get_context("spawn")
Pipe = _context.Pipe


def process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """It runs already, and sees the GPUs. A fork of the server would not: it has DeepSpeed for CPUs."""
    given = {"CUDA_VISIBLE_DEVICES": FOUND, "DS_ACCELERATOR": "cuda", SEEN: "1"}
    with patch.dict(os.environ, given):
        started = _context.Process(target=target, args=args)
        started.start()
    return started
