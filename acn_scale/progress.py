"""Progress bars of long work."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from acn_scale import distributed


def bar(items: Iterable[Any], description: str, total: int, unit: str = "batch") -> tqdm:
    """On rank 0: a terminal sees it move, a log file gets a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        mininterval=interval,
        maxinterval=interval,
        leave=False,
        disable=distributed.rank() != 0,
    )
