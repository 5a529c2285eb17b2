"""GLUE's metrics of predictions, each with a bootstrap interval over the samples.

A value is scikit-learn's or SciPy's. The thousand resamples of a metric of classes are computed at once, by its formula
on counts: scikit-learn takes two seconds for them, at each depth.
"""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy import stats
from sklearn import metrics

from acn_scale.report.bootstrap import RESAMPLES, interval


def accuracy(counts: np.ndarray) -> np.ndarray:
    """counts: (..., classes, classes), of samples by label and prediction -> (...), as all of these."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def f1(counts: np.ndarray) -> np.ndarray:
    """Of class 1 of two; 0 where there is none of it (van Rijsbergen 1979)."""
    both = 2 * counts[..., 1, 1] + counts[..., 0, 1] + counts[..., 1, 0]
    return 2 * counts[..., 1, 1] / np.maximum(both, 1)


def matthews(counts: np.ndarray) -> np.ndarray:
    """The correlation of labels and predictions; 0 where all of either are one class (Gorodkin 2004, R_K)."""
    total = counts.sum(axis=(-2, -1))
    true, said = counts.sum(axis=-1), counts.sum(axis=-2)
    right = total * np.trace(counts, axis1=-2, axis2=-1) - (true * said).sum(axis=-1)
    size = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (said**2).sum(axis=-1))
    return right / np.sqrt(np.maximum(size, 1))


OF_COUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
OF_CLASSES = {
    "accuracy": metrics.accuracy_score,
    "f1": partial(metrics.f1_score, zero_division=0),
    "matthews": metrics.matthews_corrcoef,
}
OF_NUMBERS = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}


def measure(
    metric: str, labels: np.ndarray, predictions: np.ndarray, classes: int, *, seed: int = 0
) -> tuple[float, list[float]]:
    """labels, predictions: (samples,) -> the metric and its interval at 95 %.

    A correlation with what is the same for all samples is 0, as the GLUE server has it.
    """
    random = np.random.default_rng(seed)
    if metric in OF_COUNTS:
        counts = np.bincount(labels * classes + predictions, minlength=classes**2).astype(np.float64)
        # Drawing samples with replacement is drawing how many there are of each kind.
        draws = random.multinomial(len(labels), counts / len(labels), size=RESAMPLES).astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of samples of one class, which results note by themselves
            value = float(OF_CLASSES[metric](labels, predictions))
        return value, list(interval(OF_COUNTS[metric](draws.reshape(-1, classes, classes)), value))
    value = _correlation(metric, labels, predictions)
    draws = (random.integers(len(labels), size=len(labels)) for _ in range(RESAMPLES))
    resampled = [_correlation(metric, labels[draw], predictions[draw]) for draw in draws]
    return value, list(interval(np.array(resampled), value))


def _correlation(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(OF_NUMBERS[metric](labels, predictions).statistic)
