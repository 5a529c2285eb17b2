"""Heartbeats of the ranks in the run folder, and what is made of them: who hangs, who died, who prints its stack."""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from acn_scale import distributed
from acn_scale.errors import RunFailed, UserError
from acn_scale.runs import FAILURE, health_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

# In the order in which a step goes through them: of ranks that wait for each other, the one that is least far hangs.
PHASES = ("setup", "reshape", "data", "forward", "exchange", "backward", "update", "evaluation", "checkpoint", "end")
EXIT_ABORTED = 70  # as sysexits.h's EX_SOFTWARE
TICK = 1.0  # seconds between heartbeats
GRACE = 10.0  # seconds that rank 0 has for finding out who hangs, before the others do so themselves


class Watchdog:
    """While entered, writes this rank's heartbeat every second, and ends the process when the job cannot go on.

    A rank without progress for `timeout` seconds looks at the heartbeats of all: a rank whose heart does not beat any
    more died or is stopped, and of the others the one that is least far hangs, unless it makes progress: then they wait
    for it. The one to blame is named in failure.json, which ends all ranks. So does an exception on any rank. SIGUSR1
    to one rank prints the stacks of all.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self.folder, self.rank, self.world_size, self.timeout = health_folder(folder), rank, world_size, timeout
        self.step, self.phase = 0, "setup"
        self.progress = time.monotonic()
        self._beats = 0
        self._failing = False  # this rank ends by itself, with an exception
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._stacks_seen = self._stacks_asked()
        self._beat()
        self._listen_for_usr1()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._failing = True
            self._blame(error)
            if self.world_size > 1 and not isinstance(error, UserError | RunFailed):
                traceback.print_exception(error)
                self._end()  # leaving the process group would wait for what is under way in it
        else:
            self.beat(self.step, "end")
        self._over.set()
        self._thread.join()
        self._beat()
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a late one must not end the process
        signal.set_wakeup_fd(-1)
        for end in self._pipe:
            os.close(end)

    def beat(self, step: int, phase: str) -> None:
        """This rank is at `phase` of `step` now."""
        self.step, self.phase, self.progress = step, phase, time.monotonic()

    def go_on(self) -> None:
        """This rank is where it was, and makes progress."""
        self.beat(self.step, self.phase)

    def each(self, items: Iterable[T], phase: str) -> Iterator[T]:
        """The items, each of them a sign of progress."""
        for item in items:
            self.beat(self.step, phase)
            yield item

    def _watch(self) -> None:
        found_at = None
        while not self._over.wait(TICK):
            self._beat()
            self._print_stacks_when_asked()
            if _read(self.folder / FAILURE) and not self._over.is_set() and not self._failing:
                self._end()
            stuck = time.monotonic() - self.progress > self.timeout and self.phase != "reshape"
            found_at = (found_at or time.monotonic()) if stuck else None
            if stuck and (self.rank == 0 or time.monotonic() - found_at > GRACE):
                self._name_who_hangs()

    def _beat(self) -> None:
        self._beats += 1
        values = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": self.step}
        values |= {"phase": self.phase, "waits": distributed.waits, "beats": self._beats, "time": time.time()}
        values["seconds_in_phase"] = round(time.monotonic() - self.progress, 1)
        line = json.dumps(values).ljust(400) + "\n"  # of one length: written in place, read whole
        with contextlib.suppress(OSError):
            file = os.open(self.folder / _name(self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            with contextlib.closing(os.fdopen(file, "wb")) as writer:
                writer.write(line.encode())

    def _name_who_hangs(self) -> None:
        before = _heartbeats(self.folder)
        for _ in range(3):
            time.sleep(TICK)
            self._beat()
        now = _heartbeats(self.folder)
        if time.monotonic() - self.progress <= self.timeout:
            return
        ranks = [now[rank] for rank in range(self.world_size) if rank in now]
        dead = [beat for beat in ranks if beat["beats"] == before.get(beat["rank"], {}).get("beats")]
        least = min(ranks, key=lambda beat: (beat["step"], PHASES.index(beat["phase"]), beat["waits"]))
        if not dead and least["seconds_in_phase"] <= self.timeout:
            return
        beat = dead[0] if dead else least
        verb = "does not answer any more" if dead else f"hangs for {beat['seconds_in_phase']:.0f} s"
        self._fail(beat["rank"], f"{_whereabouts(beat)} {verb} (health.hang_timeout = {self.timeout:g})")

    def _blame(self, error: Exception) -> None:
        """Note the error that ends this rank, unless it is only what the death of another one looks like from here."""
        if isinstance(error, UserError | RunFailed):
            return self._fail(self.rank, str(error))
        before = _heartbeats(self.folder)
        if self.world_size > 1 and not _read(self.folder / FAILURE):
            time.sleep(3 * TICK)
        now = _heartbeats(self.folder)
        for rank, beat in now.items():
            still = beat["beats"] == before.get(rank, {}).get("beats") and beat["phase"] != "end"
            if still and rank != self.rank and rank < self.world_size:
                return self._fail(rank, f"{_whereabouts(beat)} does not answer any more")
        mine = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        where = _whereabouts(mine | {"step": self.step, "phase": self.phase})
        return self._fail(self.rank, f"{where} {_in_words(error)}")

    def _fail(self, rank: int, reason: str) -> None:
        """Write failure.json, which every rank looks for. The first one to write it is right."""
        content = json.dumps({"rank": rank, "reason": reason, "step": self.step, "time": time.time()})
        with contextlib.suppress(OSError), (self.folder / FAILURE).open("x") as file:
            file.write(content)
            log.error("%s", reason)

    def _end(self) -> NoReturn:
        """Without waiting for anything: the main thread may hang in a collective for ever."""
        failure = _read(self.folder / FAILURE) or {"reason": "and no failure.json can be written"}
        log.error("rank %d ends at step %d, %s: %s", self.rank, self.step, self.phase, failure["reason"])
        for handler in logging.getLogger("acn_scale").handlers:
            handler.flush()
        os._exit(EXIT_ABORTED)

    def _listen_for_usr1(self) -> None:
        """faulthandler's handler works where Python's cannot, while the main thread is stuck in a collective.

        It prints this rank's stack, and the wake-up pipe tells the watchdog, which asks the other ranks.
        """
        signal.signal(signal.SIGUSR1, lambda *_: None)
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=False, chain=True)

    def _stacks_asked(self) -> float:
        try:
            return (self.folder / "stacks_asked").stat().st_mtime
        except OSError:
            return 0.0

    def _print_stacks_when_asked(self) -> None:
        with contextlib.suppress(OSError):  # no signal has come, or the folder cannot be written
            if signal.SIGUSR1 in os.read(self._pipe[0], 4096):
                (self.folder / "stacks_asked").touch()
        if self._stacks_asked() != self._stacks_seen:
            self._stacks_seen = self._stacks_asked()
            path = self.folder / f"stack_{self.rank:05d}.txt"
            with contextlib.suppress(OSError), path.open("w") as file:
                file.write(f"rank {self.rank}, step {self.step}, {self.phase}\n")
                faulthandler.dump_traceback(file, all_threads=True)
            log.warning("SIGUSR1: the stack of rank %d is in %s", self.rank, path)


@contextlib.contextmanager
def failures_noted(folder: Path) -> Iterator[None]:
    """What ends the work inside goes to failure.json of a run's folder: work that follows training, unwatched."""
    try:
        yield
    except Exception as error:
        rank = distributed.rank()
        reason = f"rank {rank}, after training: {_in_words(error)}"
        with contextlib.suppress(OSError), (health_folder(folder) / FAILURE).open("x") as file:
            json.dump({"rank": rank, "reason": reason, "time": time.time()}, file)
        raise


def _in_words(error: Exception) -> str:
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: {words}"


def _whereabouts(beat: dict[str, Any]) -> str:
    return f"rank {beat['rank']} ({beat['host']}, process {beat['pid']}), step {beat['step']}, {beat['phase']},"


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _heartbeats(folder: Path) -> dict[int, dict[str, Any]]:
    """By rank. One that is just being written is left out."""
    beats = map(_read, sorted(folder.glob("rank_*.json")))
    return {beat["rank"]: beat for beat in beats if beat}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_heartbeats(folder: Path) -> dict[int, dict[str, Any]]:
    """The last heartbeats of a run's ranks."""
    return _heartbeats(health_folder(folder))


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What ended the run's last start; None where nothing did."""
    return _read(health_folder(folder) / FAILURE)
