"""Figures of ours and a peer's: measured in turns, so that noise hits both alike; as a table and as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acn_scale.tables import aligned


@dataclass(frozen=True)
class Row:
    """A figure of ours beside a peer's. The ratio says how many times better ours is; low and high are its range."""

    work: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    ratio_low: float
    ratio_high: float
    ours_peak: float | None = None  # of memory, in MiB
    theirs_peak: float | None = None
    mfu: float | None = None  # ours


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender measures in each round; A B C, A B C, ... after one round that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(rounds + 1), desc=" | ".join(contenders), leave=False):
        for name, measure in contenders.items():
            value = measure()
            if number:
                figures[name].append(value)
    return figures


def row(
    work: str,
    peer: str,
    unit: str,
    ours: list[float],
    theirs: list[float],
    *,
    more_is_better: bool,
    peaks: tuple[float, float] = (None, None),
    least: float | None = None,
) -> Row:
    """The medians, the median of the rounds' own ratios and their range. `least`: seconds at the device's peak rate."""
    ratios = [a / b if more_is_better else b / a for a, b in zip(ours, theirs, strict=True)]
    middle = float(np.median(ours)), float(np.median(theirs))
    mfu = least and least / middle[0]
    return Row(work, peer, *middle, unit, float(np.median(ratios)), min(ratios), max(ratios), *peaks, mfu)


def save(rows: list[Row], path: Path) -> None:
    """An object a line."""
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in rows))


def table(rows: list[Row]) -> str:
    head = ["work", "peer", "ours", "theirs", "unit", "ratio", "range", "peak MiB, ours", "theirs", "MFU"]
    cells = []
    for each in rows:
        numbers = f"{each.ours:,.4g}", f"{each.theirs:,.4g}", each.unit, f"{each.ratio:.2f}x"
        peaks = ("" if peak is None else f"{peak:,.0f}" for peak in (each.ours_peak, each.theirs_peak))
        mfu = "" if each.mfu is None else f"{each.mfu:.1%}"
        cells.append([each.work, each.peer, *numbers, f"{each.ratio_low:.2f} ... {each.ratio_high:.2f}", *peaks, mfu])
    shown = [column for column in range(len(head)) if any(line[column] for line in cells)]
    return aligned([[line[column] for column in shown] for line in [head, *cells]], numbers=False)
