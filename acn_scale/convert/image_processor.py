"""How Transformers prepares images, its preprocessor_config.json <-> how a card says it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acn_scale.config import ImageModelConfig, Resize
from acn_scale.convert.network import Images
from acn_scale.errors import UserError
from acn_scale.runs import read_json

log = logging.getLogger(__name__)

PROCESSOR_NAME = "preprocessor_config.json"
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers for them


def image_processor(images: Images, model: ImageModelConfig) -> dict[str, Any]:
    """What our evaluation does to an image."""
    resize = images.resize or Resize(size=model.image_size, fit="squash")
    if resize.fit == "border":
        log.warning("Transformers' ViTImageProcessor adds no borders; %s says to crop instead", PROCESSOR_NAME)
    square = {"height": resize.size, "width": resize.size}
    crop = {"height": model.image_size, "width": model.image_size}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": square if resize.fit == "squash" else {"shortest_edge": resize.size},
        "resample": FILTERS.index(resize.interpolation),
        "do_center_crop": resize.fit != "squash" or resize.size != model.image_size,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
    }


def read_image_processor(folder: Path, labels: Mapping[str, str], model: ImageModelConfig) -> Images | None:
    """None where there is no such file. What it leaves out is as in Transformers' ViTImageProcessor. Raises UserError
    for what ours cannot do."""
    path = folder / PROCESSOR_NAME
    if not path.exists():
        return None
    given = read_json(path)
    classes = [labels.get(str(number), str(number)) for number in range(model.num_classes)]
    half = [0.5] * model.channels
    try:
        mean, std = given.get("image_mean") or half, given.get("image_std") or half
        if not given.get("do_normalize", True):
            mean, std = [0.0] * model.channels, [1.0] * model.channels
        if not (given.get("do_rescale", True) and math.isclose(given.get("rescale_factor", 1 / 255), 1 / 255)):
            raise ValueError("rescale_factor: must be 1 / 255")
        if len(mean) != model.channels:
            raise ValueError(f"image_mean = {mean}: the network takes {model.channels} channels")
        resize = _resize(given, model) if given.get("do_resize", True) else None
        return Images(mean=mean, std=std, classes=classes, resize=resize)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place} = {first['input']!r}: {first['msg']}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from None


def _resize(given: Mapping[str, Any], model: ImageModelConfig) -> Resize:
    side = {"height": model.image_size, "width": model.image_size}
    size = given.get("size") or side
    size = {"height": size, "width": size} if isinstance(size, int) else size
    squash = size.get("height") is not None and size.get("height") == size.get("width")
    cropped = given.get("do_center_crop", False)
    if cropped and (given.get("crop_size") or side) not in (side, model.image_size):
        raise ValueError(f"crop_size = {given['crop_size']}: the network takes images of {model.image_size} pixels")
    if (not squash and not size.get("shortest_edge")) or (squash and not cropped and size != side):
        raise ValueError(f"size = {size}: the network takes images of {model.image_size} x {model.image_size} pixels")
    return Resize(
        size=size["height"] if squash else size["shortest_edge"],
        interpolation=FILTERS[given.get("resample", 2)],
        fit="squash" if squash else "crop",
        like="transformers",
    )
