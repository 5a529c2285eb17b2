"""What runs inside a job: a program of the snapshot. Sent along with the job, so that it is not read from a checkout
that may have changed since.
"""

import os
import signal
import subprocess
import sys

from submitit.helpers import Checkpointable


def run(snapshot: str, program: str) -> int | None:
    """Become the trainer, on Slurm; elsewhere run it, hand the job's signals on to it, and return its exit code."""
    command = [sys.executable, "-u", f"{snapshot}/{program}", "--config", f"{snapshot}/config.json"]
    # The snapshot comes before the checkout that the package may be installed from.
    environment = os.environ | {"PYTHONPATH": snapshot}
    environment.setdefault("OMP_NUM_THREADS", threads(int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1))))
    if "SUBMITIT_LOCAL_GLOBALID" not in os.environ:
        os.execve(sys.executable, command, environment)
    rank, ranks = os.environ["SUBMITIT_LOCAL_GLOBALID"], os.environ["SUBMITIT_LOCAL_NTASKS"]
    # The job's number is the controller's process: another one at each start, and the same for all ranks.
    port = 20_000 + int(os.environ["SUBMITIT_LOCAL_JOB_ID"]) % 20_000
    environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer = subprocess.Popen(command, env=environment, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, _: trainer.send_signal(number))
    return trainer.wait()


class Tool(Checkpointable):
    """run_tool() as a job that submitit queues again when its time is up, as it is: a tool goes on where it stopped, or
    begins anew.
    """

    def __call__(self, command: list[str], marker: str, snapshot: str, processes: int) -> None:
        run_tool(command, marker, snapshot, processes)


def threads(processes: int) -> str:
    """Of each of the processes that share the cores of one task of Slurm's."""
    return str(max(1, int(os.environ.get("SLURM_CPUS_PER_TASK", 1)) // processes))


def run_tool(command: list[str], marker: str, snapshot: str, processes: int = 1) -> None:
    """Run a tool of the snapshot, on several ranks where it takes them, and write the marker once it has done its work.
    Raises SystemExit where it fails.
    """
    environment = os.environ | {"PYTHONPATH": snapshot}
    python = [sys.executable, "-u"]
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", threads(processes))
        python += [f"{snapshot}/launchers/torchrun.py", str(processes)]
    code = subprocess.run([*python, *command], env=environment).returncode
    if code:
        raise SystemExit(code)
    with open(marker, "w") as file:
        file.write("\n".join(command) + "\n")
