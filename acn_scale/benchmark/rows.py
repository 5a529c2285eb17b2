"""Figures of ours and a peer's: measured in turns, so that noise hits both alike; as a table and as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm


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


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender measures in each round; A B C, A B C, ... after one round that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(rounds + 1), desc=" | ".join(contenders), leave=False):
        for name, measure in contenders.items():
            value = measure()
            if number:
                figures[name].append(value)
    return figures


def row(work: str, peer: str, unit: str, ours: list[float], theirs: list[float], *, more_is_better: bool) -> Row:
    """The medians and their ratio; its range is that of the rounds' own ratios."""
    ratios = [a / b if more_is_better else b / a for a, b in zip(ours, theirs, strict=True)]
    middle = np.median(ours), np.median(theirs)
    ratio = middle[0] / middle[1] if more_is_better else middle[1] / middle[0]
    return Row(work, peer, *map(float, middle), unit, float(ratio), min(ratios), max(ratios))


def save(rows: list[Row], path: Path) -> None:
    """An object a line."""
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in rows))


def table(rows: list[Row]) -> str:
    head = ["work", "peer", "ours", "theirs", "unit", "ratio", "range"]
    cells = []
    for each in rows:
        numbers = f"{each.ours:,.4g}", f"{each.theirs:,.4g}", each.unit, f"{each.ratio:.2f}x"
        cells.append([each.work, each.peer, *numbers, f"{each.ratio_low:.2f} ... {each.ratio_high:.2f}"])
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *cells]
    )
