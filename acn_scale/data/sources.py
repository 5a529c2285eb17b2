"""Raw data in: what ships with packages that are installed anyway."""

from collections.abc import Iterator
from pydoc_data.topics import topics

import numpy as np
from sklearn.datasets import load_digits

DIGITS_TRAIN = 1400  # of 1,797 images; the others are for evaluation


def digits(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """scikit-learn's scanned digits: (image (8, 8) uint8, class). The split is one fixed random draw."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    for number in order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]:
        pixels = np.rint(images[number] * (255 / 16)).astype(np.uint8)  # 17 levels of grey
        yield pixels.reshape(8, 8), int(labels[number])


def pydoc() -> Iterator[str]:
    """The topics of Python's language reference, a document each."""
    yield from topics.values()
