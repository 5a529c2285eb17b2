"""Lengths of time in a config, with their unit, and the optimizer steps they come to."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from acn_scale.errors import UserError


def _duration(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?(ep|step|run)", text):
        raise ValueError("a number and a unit: '90ep' (epochs), '5000step' or '0.06run' (share of the run)")
    return text if _parts(text)[0] else "0step"  # one way to say nothing


def _length(text: str) -> str:
    if text.endswith("run"):
        raise ValueError("the length of the run itself: '90ep' (epochs) or '5000step'")
    return text


def _interval(text: str) -> str:
    if text == "0step":
        raise ValueError("above 0; '1run' is at the end alone")
    return text


Duration = Annotated[str, AfterValidator(_duration)]
Interval = Annotated[Duration, AfterValidator(_interval)]
Length = Annotated[Duration, AfterValidator(_length)]


def lengthened(length: Duration, times: float) -> Duration:
    """300ep -> 450.0ep, for 1.5 times."""
    number, unit = _parts(length)
    return f"{round(times * number, 3)}{unit}"


def _parts(duration: Duration) -> tuple[float, str]:
    number, unit = re.fullmatch(r"([\d.]+)(ep|step|run)", duration).groups()
    return float(number), unit


@dataclass(frozen=True)
class Horizon:
    """Turns durations into optimizer steps: `steps` is the whole run's length."""

    samples_per_epoch: int
    global_batch_size: int
    steps: int = 0

    @classmethod
    def of(cls, length: Length, samples_per_epoch: int, global_batch_size: int) -> "Horizon":
        """The horizon of a run of `length`. Raises UserError where that is less than one step."""
        steps = cls(samples_per_epoch, global_batch_size).count(length)
        if steps < 1:
            raise UserError(f"train.length = {length}: less than one step; one epoch has {samples_per_epoch} samples")
        return cls(samples_per_epoch, global_batch_size, steps)

    def count(self, duration: Duration) -> int:
        """Steps in `duration`, rounded to the nearest."""
        number, unit = _parts(duration)
        steps_per_unit = {"ep": self.samples_per_epoch / self.global_batch_size, "step": 1, "run": self.steps}
        return round(number * steps_per_unit[unit])
