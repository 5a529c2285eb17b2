"""Noise on images to be evaluated: the ACN paper's, and ImageNet-C's common corruptions from a package."""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
from PIL import Image

from acn_scale.errors import UserError

# What an image is when noise is put on it: uint8; pixels in 0..1; or the model's input, (pixel - mean) / std.
Stage = Literal["bytes", "pixels", "normalised"]

PAPER = tuple(f"gaussian_{sigma}" for sigma in (0.1, 0.2, 0.4)) + tuple(f"salt_pepper_{p}" for p in (0.01, 0.05, 0.1))
# Hendrycks & Dietterich 2019, in the order of their tables.
CORRUPTIONS = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
               "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
               "jpeg_compression")  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
PACKAGE = "imagecorruptions-imaug"
SMALLEST = 32  # pixels of a side, of an image that it takes


@dataclass(frozen=True)
class ImageNoise:
    """`change`: (channels, height, width) at its stage, and a generator of the sample's own -> the same with noise."""

    stage: Stage
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray]


def gaussian(
    image: np.ndarray, random: np.random.Generator, *, sigma: float, bounds: tuple[float, float]
) -> np.ndarray:
    noise = random.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + np.float32(sigma) * noise, *map(np.float32, bounds))


def salt_and_pepper(
    image: np.ndarray, random: np.random.Generator, *, share: float, bounds: tuple[float, float]
) -> np.ndarray:
    """Each pixel, with all its channels, becomes the lower or the upper bound with probability share / 2 each."""
    draws = random.random(image.shape[1:], dtype=np.float32)
    image = np.where(draws < share / 2, np.float32(bounds[0]), image)
    return np.where(draws > 1 - share / 2, np.float32(bounds[1]), image)


def image_noise(name: str, *, on: Literal["pixels", "normalised"] = "pixels") -> ImageNoise:
    """Of a name such as "gaussian_0.2", "salt_pepper_0.05", or "fog_3" for a corruption at one of 5 severities, which
    is always of uint8 images. On normalised ones nothing is clipped, and salt and pepper are 1 and -1.

    Raises UserError for other names, and for corruptions where their package is not installed.
    """
    kind, _, strength = name.rpartition("_")
    if kind in CORRUPTIONS and strength in map(str, SEVERITIES):
        return ImageNoise("bytes", partial(_corrupted, corruption=kind, severity=int(strength), corrupt=_package()))
    try:
        value = float(strength)
    except ValueError:
        value = -1.0
    limits = {"gaussian": 100.0, "salt_pepper": 1.0}  # sigma in the units of its stage, and a probability
    if not 0 <= value <= limits.get(kind, -1.0):
        raise UserError(
            f"--noise {name}: must be gaussian_SIGMA, salt_pepper_P with P from 0 to 1, or one of "
            f"{', '.join(CORRUPTIONS)} with _1 to _5 behind it"
        )
    if kind == "gaussian":
        clip = (0.0, 1.0) if on == "pixels" else (-np.inf, np.inf)
        return ImageNoise(on, partial(gaussian, sigma=value, bounds=clip))
    extremes = (0.0, 1.0) if on == "pixels" else (-1.0, 1.0)
    return ImageNoise(on, partial(salt_and_pepper, share=value, bounds=extremes))


def image_noises(names: Sequence[str], *, on: Literal["pixels", "normalised"] = "pixels") -> dict[str, ImageNoise]:
    """By the names that results get; "paper" stands for all of PAPER. Raises UserError."""
    found = {}
    for name in chain.from_iterable(PAPER if each == "paper" else (each,) for each in names):
        noise = image_noise(name, on=on)
        found[f"{name}_normalised" if noise.stage == "normalised" else name] = noise
    return found


def corruptions_version() -> str:
    """The package that makes corruptions. Raises UserError where it is not installed."""
    _package()
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def _package() -> Callable[..., np.ndarray]:
    try:
        from imagecorruptions import corrupt  # here: it takes seconds, and few need it
    except ImportError as error:
        raise UserError(
            f"{PACKAGE}: not installed ({error}); pip install {PACKAGE} makes ImageNet-C's corruptions"
        ) from None
    return corrupt


def _corrupted(
    image: np.ndarray,
    random: np.random.Generator,
    *,
    corruption: str,
    severity: int,
    corrupt: Callable[..., np.ndarray],
) -> np.ndarray:
    """The package draws from numpy's global generator, which is then as it was; two corruptions have their own."""
    if min(image.shape[1:]) < SMALLEST:
        size = " x ".join(map(str, image.shape[1:]))
        raise UserError(f"--noise {corruption}: takes images from {SMALLEST} x {SMALLEST} pixels on, not of {size}")
    seed, own = (int(number) for number in random.integers(2**31, size=2))
    options = {"seed": own} if corruption in ("impulse_noise", "glass_blur") else {}
    before = np.random.get_state()
    try:
        np.random.seed(seed)
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
        changed = corrupt(pixels, corruption_name=corruption, severity=severity, **options)
    finally:
        np.random.set_state(before)
    mode = "L" if len(image) == 1 else "RGB"
    found = np.array(Image.fromarray(changed).convert(mode))
    return found.reshape(*found.shape[:2], -1).transpose(2, 0, 1).copy()
