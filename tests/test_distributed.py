"""Which rank a process is, by the variables of whatever launched it."""

import os

import pytest

from acn_scale.distributed import _export_environment
from acn_scale.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # put back at the end, even where the test sets it
        monkeypatch.delenv(name)


def test_a_task_of_a_slurm_job_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another start of the job meets at another port."""
    ports = []
    for restart in ("0", "1"):
        for name, value in (
            ("NTASKS", 4),
            ("PROCID", 3),
            ("LOCALID", 1),
            ("LAUNCH_NODE_IPADDR", "10.0.0.1"),
            ("JOB_ID", 7),
        ):
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        _export_environment()
        assert [os.environ[name] for name in VARIABLES[:4]] == ["3", "4", "1", "10.0.0.1"]
        ports.append(os.environ.pop("MASTER_PORT"))
        for name in VARIABLES[:4]:
            del os.environ[name]
    assert len(set(ports)) == 2


@pytest.mark.parametrize("known", [{}, {"SLURM_PROCID": "0"}])
def test_what_is_no_task_of_its_job_is_told(monkeypatch: pytest.MonkeyPatch, known: dict[str, str]) -> None:
    """In the shell of salloc, or in a batch script without srun."""
    for name, value in ({"SLURM_NTASKS": "4"} | known).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="SLURM_NTASKS = 4, and this process is none of these; start it with srun"):
        _export_environment()


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _export_environment()
    assert [os.environ[name] for name in VARIABLES[:4]] == ["0", "1", "0", "127.0.0.1"]
