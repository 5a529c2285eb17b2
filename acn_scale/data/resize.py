"""Images of any size -> the model's, as our runs, timm or Transformers bring them there."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torchvision.transforms import v2

from acn_scale.config import Resize

Resizer = Callable[[Tensor], Tensor]


def resizer(resize: Resize, image_size: int, mean: Sequence[float]) -> Resizer:
    """Of (channels, height, width) uint8 -> (channels, image_size, image_size) uint8. `mean` fills borders."""
    return _timms(resize, image_size, mean) if resize.like == "timm" else _torchvisions(resize, image_size)


def _timms(resize: Resize, image_size: int, mean: Sequence[float]) -> Resizer:
    from timm.data.transforms_factory import transforms_imagenet_eval  # here: it takes seconds

    transform = transforms_imagenet_eval(
        image_size,
        crop_pct=resize.crop_pct(image_size),
        crop_mode="center" if resize.fit == "crop" else resize.fit,
        interpolation=resize.interpolation,
        mean=tuple(mean),
        normalize=False,
    )
    return lambda image: transform(v2.functional.to_pil_image(image))


def _torchvisions(resize: Resize, image_size: int) -> Resizer:
    name = "nearest-exact" if resize.interpolation == "nearest" else resize.interpolation  # Pillow's nearest
    size = [resize.size] * (2 if resize.fit == "squash" else 1)
    scale = v2.Resize(size, v2.InterpolationMode(name), antialias=True)
    crop = v2.CenterCrop(image_size)
    if resize.like == "torchvision":
        return lambda image: crop(scale(image))

    def crop_down(image: Tensor) -> Tensor:
        """Transformers rounds half a pixel down, torchvision to the even one."""
        top, left = ((side - image_size) // 2 for side in image.shape[1:])
        return v2.functional.crop(image, top, left, image_size, image_size)

    return lambda image: crop_down(scale(image))
