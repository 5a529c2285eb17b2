"""From a command to the end of its first step, fresh and resumed: the quickstart's twin beside a Trainer script."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from acn_scale.benchmark import first_step
from acn_scale.benchmark.rows import Row, in_turns, row
from acn_scale.benchmark.sides import environment
from acn_scale.benchmark.trainer import TRAINER
from acn_scale.benchmark.work import write_peer
from acn_scale.cli import load_config
from acn_scale.data.make_images import make_image_shards
from acn_scale.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart" / "residual_vit.toml"
POOL = "model.pool=cls"  # as Transformers' ViT has it


def startup(rounds: int, *, resumed: bool = False) -> Row:
    """Seconds, of processes that start anew each time. `resumed`: from a checkpoint of the first step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "eval"):
            make_image_shards("digits", split, folder / split)
        write_peer("hf", load_config(CONFIG, [POOL]).model, folder / "vit")
        from sklearn.datasets import load_digits

        digits = load_digits()
        np.save(folder / "images.npy", digits.images[:1400, None].astype(np.float32) / 16)
        np.save(folder / "labels.npy", digits.target[:1400])
        overrides = [f"data.{split}={folder}/{split}" for split in ("train", "eval")] + ["checkpoint.every=1step"]
        step = 2 if resumed else 1

        def ours(folder_of_runs: str) -> list[str]:
            return ["ours", str(step), "--config", str(CONFIG), POOL, *overrides, f"run.dir={folder_of_runs}"]

        peaks: dict[str, float] = {}

        def measured(side: str, arguments: Callable[[], list[str]]) -> Callable[[], float]:
            def measure() -> float:
                seconds, peaks[side] = run(arguments())
                return seconds

            return measure

        if resumed:
            for arguments in (ours(f"{folder}/runs"), ["theirs", "2", name]):
                run(arguments)
        fresh = iter(range(10**9))
        figures = in_turns(
            {
                "ours": measured("ours", lambda: ours(f"{folder}/runs{'' if resumed else next(fresh)}")),
                "theirs": measured("theirs", lambda: ["theirs", str(step), name]),
            },
            rounds,
        )
    return row(
        f"quickstart, {'resume' if resumed else 'command'} to the end of the first step",
        TRAINER,
        "s",
        figures["ours"],
        figures["theirs"],
        more_is_better=False,
        peaks=(peaks["ours"], peaks["theirs"]),
    )


def run(arguments: list[str]) -> tuple[float, float]:
    """(seconds, MiB) of a process of first_step. Raises UserError where it fails."""
    given = os.environ | environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", first_step.__name__, *arguments], capture_output=True, text=True, env=given
    )
    if process.returncode:
        raise UserError(f"{first_step.__name__} {' '.join(arguments)}: {process.stderr.strip().splitlines()[-1]}")
    end, peak = map(float, process.stdout.split()[-2:])
    return end - start, peak
