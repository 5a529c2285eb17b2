"""Which steps are bad, what is done about them, and how often. Every rank comes to the same answers."""

import math
import statistics
from collections import deque
from typing import Any

from acn_scale.config import HealthConfig
from acn_scale.errors import RunFailed

HISTORY = 100  # losses of which the median is taken
ENOUGH = 20  # of them before a spike can be told


class Guard:
    """Knows the run's recent losses and the steps that were bad. Its state is part of a checkpoint."""

    def __init__(self, cfg: HealthConfig) -> None:
        self.cfg = cfg
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.bad_steps: set[int] = set()
        self.passed_over: set[int] = set()  # steps whose batches are taken from the stream and not trained on
        self.skipped_in_a_row = 0

    def fault(self, loss: float) -> str | None:
        """What is wrong with the loss of a global batch: None where nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.cfg.spike_factor and len(self.losses) >= ENOUGH:
            median = statistics.median(self.losses)
            if loss > self.cfg.spike_factor * median:
                much = f"{loss / median:.1f} times" if median else "above"
                return f"the loss is {loss:.4g}, {much} the median of the last {len(self.losses)}"
        return None

    def good(self, loss: float, *, applied: bool) -> None:
        """A step without fault. Raises RunFailed where the loss scale has dropped too many updates in a row."""
        self.losses.append(loss)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.cfg.max_skipped_steps:
            raise RunFailed(f"health.max_skipped_steps = {self.cfg.max_skipped_steps}: so many updates were dropped "
                            "in a row for gradients that are not finite")  # fmt: skip

    def bad(self, step: int, fault: str) -> None:
        """Another bad step. Raises RunFailed where it is one too many, in all or in a row."""
        self.bad_steps.add(step)
        self.skipped_in_a_row += 1
        if self.cfg.on_bad_step == "fail":
            raise RunFailed(f"step {step}: {fault} (health.on_bad_step = fail)")
        for key, count in (("max_bad_steps", len(self.bad_steps)), ("max_skipped_steps", self.skipped_in_a_row)):
            limit = getattr(self.cfg, key)
            if count > limit or (key == "max_skipped_steps" and count == limit):
                raise RunFailed(f"step {step}: {fault}; health.{key} = {limit}: no more are allowed")

    def pass_over(self, step: int, start: int) -> None:
        """After going back to `start`: leave out the batches up to that of the bad `step`."""
        self.passed_over |= set(range(max(start, step - self.cfg.rollback_batches) + 1, step + 1))

    def ahead(self, step: int) -> list[int]:
        """The steps after `step` that will be passed over."""
        return sorted(each for each in self.passed_over if each > step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "bad_steps": sorted(self.bad_steps),
            "passed_over": sorted(self.passed_over),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_bad_steps: bool = False) -> None:
        """As it was at a checkpoint; `keep_bad_steps`: what was learned since then stays, when going back to it."""
        self.losses = deque(state["losses"], maxlen=HISTORY)
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.bad_steps = set(state["bad_steps"]) | (self.bad_steps if keep_bad_steps else set())
        self.passed_over = set(state["passed_over"]) | (self.passed_over if keep_bad_steps else set())
