"""Saves that fail: they are loud, the run goes on, what was saved before stays, and nothing half-written is left."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from test_checkpoint import said, steps
from test_pretrain import measured, refused, run

from acn_scale import saving
from acn_scale.checkpoint import complete, damage
from acn_scale.config import Config
from acn_scale.errors import UserError
from acn_scale.runs import read_json, run_folder
from acn_scale.saving import Checkpoints


def asked_twice(folder: Path) -> list[bool]:
    """Whether a save is complete for which there is not even a folder."""
    checkpoints = Checkpoints(folder, keep=1, keep_every=None)
    with patch.object(Path, "mkdir", side_effect=OSError(28, "No space left on device")):
        checkpoints.save(None, None, 5, {})
    return [checkpoints.finish(), checkpoints.finish()]


def test_a_failed_save_has_failed_until_the_next_one(two_ranks: Callable, tmp_path: Path) -> None:
    """Whoever asks first, a cut or the end of the run."""
    assert two_ranks(asked_twice, tmp_path) == [[False, False]] * 2


def run_that_cannot_read_its_parts(cfg: Config, error: Exception) -> str:
    def stale(path: Path) -> dict:
        if path.name.startswith("part_"):
            raise error
        return read_json(path)

    with patch.object(saving, "read_json", stale):
        return refused(cfg)


@pytest.mark.parametrize("error", [UserError("Stale file handle"), MemoryError()])
def test_a_save_that_cannot_be_completed_has_failed(
    one_rank: Callable, vit: Callable[..., Config], error: Exception
) -> None:
    """Whatever it is that ends the thread which completes it."""
    cfg = vit(model={"depth": 1}, train={"length": "5step"})
    (message,) = one_rank(run_that_cannot_read_its_parts, cfg, error)
    assert "step 5: the last checkpoint could not be written" in message
    assert isinstance(error, MemoryError) or "was NOT saved: Stale file handle; training goes on" in said(cfg)


def run_that_cannot_remove(cfg: Config) -> str:
    remove = shutil.rmtree

    def in_use(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")
        remove(path, ignore_errors)

    with patch.object(shutil, "rmtree", in_use):
        return refused(cfg)


def test_what_cannot_be_removed_fails_no_save(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """It is no checkpoint any more, and the next start removes it."""
    cfg = vit(model={"depth": 1}, train={"length": "10step"}, checkpoint={"every": "5step", "keep": 1})
    folder = run_folder(cfg) / "checkpoints"
    assert one_rank(run_that_cannot_remove, cfg) == [""]
    assert steps(cfg) == [10]
    assert f"WARNING {folder}/step_00000005 is not to be kept, but cannot be removed: Directory not empty" in said(cfg)
    assert {path.name for path in folder.iterdir()} == {"step_00000010", ".step_00000005.tmp"}
    one_rank(run, cfg)
    assert [path.name for path in folder.iterdir()] == ["step_00000010"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """To the last byte."""
    with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"0" * 4096)


def filled_run(cfg: Config, disk: Path, full: range) -> str:
    """The disk is full during these steps."""
    from acn_scale import pretrain

    def step(*args, **keywords):
        count = args[0].global_steps + 1
        if count == full.start and cfg.run.seed == 0 and pretrain.distributed.rank() == 0:
            fill(disk)
        if count == full.stop and pretrain.distributed.rank() == 0:
            (disk / "filler").unlink(missing_ok=True)
        return whole(*args, **keywords)

    whole, pretrain.train_step = pretrain.train_step, step
    try:
        return refused(cfg)
    finally:
        pretrain.train_step = whole


@pytest.mark.parametrize("full", [range(3, 8), range(8, 13)], ids=["first save", "second save"])
def test_a_full_disk_fails_the_save_and_not_the_run(
    two_ranks: Callable, vit: Callable[..., Config], small_disk: Path, full: range
) -> None:
    """It is loud; the metrics of that time are written later; the next save is complete."""
    train = {"log_every": "1step", "zero_stage": 1}
    whole = vit(run={"name": "whole"}, train=train)
    cfg = vit(run={"name": "full", "dir": str(small_disk)}, train=train)
    two_ranks(run, whole)
    assert two_ranks(filled_run, cfg, small_disk, full) == ["", ""]
    assert steps(cfg) == [15, 20]
    assert measured(cfg) == measured(whole)
    log = said(cfg)
    assert f"step_{full.start + 2:08d} was NOT saved: No space left on device; training goes on" in log


def filled_run_that_writes_on(cfg: Config, disk: Path, full: range) -> str:
    """The same; another rank's file comes while the folder of a failed save is removed."""
    remove, late = shutil.rmtree, []

    def removed(path: Path, ignore_errors: bool = False) -> None:
        there = path.exists()
        remove(path, ignore_errors)
        if there and path.suffix == ".tmp" and not late:
            path.mkdir()
            late.append((path / "late").touch())

    with patch.object(shutil, "rmtree", removed):
        return filled_run(cfg, disk, full)


@pytest.mark.parametrize("filled", [filled_run, filled_run_that_writes_on])
def test_a_disk_that_stays_full(
    two_ranks: Callable, vit: Callable[..., Config], small_disk: Path, filled: Callable
) -> None:
    """What was saved before is still there, and the run ends with one line, not with success."""
    cfg = vit(run={"name": "full", "dir": str(small_disk)}, train={"zero_stage": 1})
    first, second = two_ranks(filled, cfg, small_disk, range(8, 99))
    assert first == second
    assert "step 20: the last checkpoint could not be written" in first
    assert steps(cfg) == [5]
    assert damage(complete(run_folder(cfg))[0]) == []
    assert not list((run_folder(cfg) / "checkpoints").glob(".step*"))
