"""Signals that ask a run to stop: noted at once, heeded between two steps."""

import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import Any

# Slurm's time limit and preemption (through --signal and --requeue), a launcher that ends, and Ctrl-C.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
EXIT_STOPPED = 75  # as sysexits.h's EX_TEMPFAIL: what was reached is saved, and the same command goes on


class StopSignals:
    """While entered, a signal sets `received` instead of ending the process; a second Ctrl-C ends it all the same."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A process that was asked to stop is on its way out. Slurm sends SIGTERM to the ranks that are slower at it
            # than the first one, and Python would put back the default before its very end.
            stopped = self.received is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if stopped else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            signal.default_int_handler(number, frame)
        self.received = signal.Signals(number).name


def end_with_parent() -> None:
    """In a worker process: end when the parent does. One whose parent was killed would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
