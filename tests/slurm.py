"""A real Slurm on this machine: one controller and two nodes, from Debian's slurm-wlm and munge. Installs nothing.

By hand, as root: python tests/slurm.py FOLDER; then, elsewhere, SLURM_CONF=FOLDER/slurm.conf sinfo.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("n1", "n2")
PATIENCE = 60  # seconds for the cluster to come up

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=15
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE OverTimeLimit=0
"""


def missing() -> list[str]:
    """What this machine lacks for it."""
    lacks = [program for program in PROGRAMS if _which(program) is None]
    return lacks + ([] if os.geteuid() == 0 else ["root's rights"])


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Slurm:
    """The cluster's daemons, with all their files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        (folder / "state").mkdir(parents=True)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        controller_port, port1, port2 = _free_ports(3)
        text = CONFIG.format(
            host=socket.gethostname(), folder=folder, controller_port=controller_port, port1=port1, port2=port2
        )
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key": key, "pid": folder / "munge.pid", "log": folder / "munge.log", "seed": folder / "munge.seed"}
        options = [f"--{name}-file={path}" for name, path in files.items()]
        self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *options)
        while not (folder / "munge.socket").exists():
            time.sleep(0.05)
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._await_nodes()

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        log = (self.folder / f"{name or program}.out").open("ab")
        command = [_which(program), *arguments]
        self.daemons[name or program] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def start_node(self, node: str) -> None:
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As if the machine had gone: its daemon and all that it started, at once."""
        daemon = psutil.Process(self.daemons[node].pid)
        daemon.kill()
        self.daemons.pop(node).wait()
        self._kill_steps(node)

    def _kill_steps(self, node: str) -> None:
        for step in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if "slurmstepd" in step.name() and str(self.folder / f"slurmd.{node}.log") in _open_files(step.pid):
                    for process in [*step.children(recursive=True), step]:
                        process.kill()

    def _await_nodes(self) -> None:
        end = time.monotonic() + PATIENCE
        while self.run("sinfo", "-h", "-o", "%D %t").split() != ["2", "idle"]:
            assert time.monotonic() < end, self.run("sinfo") + (self.folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)

    def run(self, program: str, *arguments: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run([program, *arguments], env=self.environment, capture_output=True, text=True)
        return done.stdout

    def close(self) -> None:
        self.run("scancel", "--signal=KILL", "--full", "--state=RUNNING")
        time.sleep(0.5)
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for node in NODES:
            self._kill_steps(node)


def _open_files(pid: int) -> list[str]:
    return [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    slurm = Slurm(folder)
    try:
        yield slurm
    finally:
        slurm.close()


if __name__ == "__main__":
    if lacks := missing():
        sys.exit(f"not on this machine: {', '.join(lacks)}")
    with running(Path(sys.argv[1]).resolve()) as slurm:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        print(f"export SLURM_CONF={slurm.folder}/slurm.conf", flush=True)
        signal.pause()
