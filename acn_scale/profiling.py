"""A trace of some steps of a run, for Perfetto or chrome://tracing."""

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from acn_scale.config import ProfileConfig

log = logging.getLogger(__name__)


class Profiler:
    """While entered, records the steps that the config names, with the phases of each, on this rank."""

    def __init__(self, cfg: ProfileConfig, folder: Path, rank: int) -> None:
        self.first, self.last = cfg.steps or (0, 0)
        self.path = folder / "profile" / f"steps_{self.first:08d}_{self.last:08d}_rank_{rank:05d}.json.gz"
        self._profile: profile | None = None
        self._phase: record_function | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()  # a run that ends before the last of the steps has its trace all the same

    def begin(self, step: int) -> None:
        """Before a step."""
        if self.first <= step <= self.last and self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def phase(self, name: str) -> None:
        """What the step is at from here on."""
        if self._profile is not None:
            self._end_phase()
            self._phase = record_function(name)
            self._phase.__enter__()

    def end(self, step: int) -> None:
        """After a step."""
        if step >= self.last:
            self._stop()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _stop(self) -> None:
        if self._profile is None:
            return
        self._end_phase()
        self._profile.stop()
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self.path))
            log.info("profile: %s, for ui.perfetto.dev", self.path)
        except (OSError, RuntimeError) as error:
            log.error("%s: the trace could not be written: %s", self.path, error)
        self._profile = None
