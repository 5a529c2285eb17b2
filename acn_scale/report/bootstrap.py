"""How sure a finite evaluation set lets one be of accuracies and cut-offs: the bootstrap over its samples."""

import math
from dataclasses import dataclass

import numpy as np

from acn_scale.depth import cutoff

RESAMPLES = 1000
LEVEL = 0.95  # of the intervals
NONE_SEEN = 3  # where no sample of n differs, up to 3/n of all may, at 95 % (Hanley & Lippman-Hand 1983)


@dataclass(frozen=True)
class Cut:
    """A cut-off with what the evaluation set can tell of it. Accuracies are shares; differences are in points."""

    tolerance: float
    depth: int
    interval: tuple[int, int]
    accuracy: float
    difference: float  # to full depth
    difference_interval: tuple[float, float]
    half_width: float  # of the difference that has to be told from the tolerance, see cut_at()
    samples_needed: int | None  # for a half width of the tolerance; None: no number would do
    too_small: bool  # whether the evaluation set is, to tell at this tolerance


def resample(accuracy: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """accuracy: (samples, depths) of each sample -> (RESAMPLES, depths): means over as many samples, drawn with
    replacement (Efron & Tibshirani 1993, ch. 6). All depths of a row are means over the same draw: they are paired.
    """
    random, samples = np.random.default_rng(seed), len(accuracy)
    draws = (np.bincount(random.integers(samples, size=samples), minlength=samples) for _ in range(RESAMPLES))
    return np.stack([draw @ accuracy / samples for draw in draws])


def interval(values: np.ndarray, point: float) -> tuple[float, float]:
    """The middle LEVEL of resampled values (ibid., ch. 13), made wider where the point estimate lies outside: a
    cut-off is a first passage, which noise moves to one side.
    """
    low = np.quantile(values, (1 - LEVEL) / 2, method="lower")
    high = np.quantile(values, (1 + LEVEL) / 2, method="higher")
    return min(low.item(), point), max(high.item(), point)


def share_interval(share: float, samples: int, *, seed: int = 0) -> list[float]:
    """Of a share (0..1) of samples: how many of a draw with replacement have what the share has is binomial."""
    draws = np.random.default_rng(seed).binomial(samples, share, size=RESAMPLES) / samples
    return list(interval(draws, share))


def cut_at(accuracy: np.ndarray, means: np.ndarray, tolerance: float) -> Cut:
    """The cut-off of accuracy (samples, depths), with `means` from resample().

    The set is too small to tell where the difference between the cut-off and full depth is not known to within the
    tolerance. A cut-off at full depth has no such difference: there, the depth below it stands for it.
    """
    samples, mean = len(accuracy), accuracy.mean(axis=0)
    depth = cutoff(mean.tolist(), tolerance)
    differences = 100 * (means - means[:, -1:])
    difference = 100 * (mean - mean[-1])
    judged = min(depth, len(mean) - 2)
    low, high = interval(differences[:, judged], difference[judged].item())
    half_width, power = (high - low) / 2, 2
    if half_width < 1e-9:  # none of them but for rounding
        half_width, power = 100 * NONE_SEEN / samples, 1
    # It shrinks with the root of the number of samples, and with the number itself where none of them differ.
    needed = _rounded_up(samples * (half_width / tolerance) ** power) if tolerance > 0 else None
    return Cut(
        tolerance=tolerance,
        depth=depth,
        interval=interval(np.array([cutoff(row, tolerance) for row in means.tolist()]), depth),
        accuracy=mean[depth].item(),
        difference=difference[depth].item(),
        difference_interval=interval(differences[:, depth], difference[depth].item()),
        half_width=half_width,
        samples_needed=needed,
        too_small=half_width > tolerance,
    )


def _rounded_up(number: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
