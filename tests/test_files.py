"""Files are there whole, or as they were."""

import os
from pathlib import Path

import pytest

from acn_scale.files import write_file


def test_a_file_has_its_name_when_the_disk_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or it may be there, and empty, after a power cut."""
    path, seen = tmp_path / "state.json", []
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda file: seen.append((os.fstat(file).st_size, path.read_text())))
    assert write_file(path, b"newer").read_text() == "newer"
    assert seen == [(5, "old")]
