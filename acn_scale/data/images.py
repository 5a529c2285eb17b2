"""Encoded images -> normalised tensors, augmented for training, Mixup and CutMix included."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from acn_scale.config import ImageDataConfig, ImageModelConfig
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import Batch, Key
from acn_scale.errors import BadData, UserError

ENCODINGS = ("png", "jpg", "jpeg", "webp")


class ImageDecoder:
    """Decodes and transforms the images of one split.

    Training images get the augmentation of the config. Evaluation images are resized and cropped at the centre as
    timm does (224 px from 256) where the training augmentation crops, and must have the model's size otherwise.
    `stats` holds the pixels' "mean" and "std", of the training split for both.
    """

    def __init__(
        self, cfg: ImageDataConfig, model: ImageModelConfig, index: ShardIndex, stats: dict[str, Any], *, training: bool
    ) -> None:
        if index.info.get("kind") != "images":
            raise UserError(f"{index.folder}: holds {index.info.get('kind')}; model.name = {model.name} takes images")
        classes = index.info["classes"]
        if len(classes) > model.num_classes:
            raise UserError(f"model.num_classes = {model.num_classes}: {index.folder} has {len(classes)} classes")
        self.cfg, self.model, self.training = cfg, model, training
        self.mode = {1: "L", 3: "RGB"}[model.channels]
        self.mean, self.std = cfg.mean or stats["mean"], cfg.std or stats["std"]
        self.transforms = self._transforms()

    def _transforms(self) -> list[v2.Transform]:
        size = self.model.image_size
        crops = self.cfg.augment in ("crop_flip", "randaugment")
        if not self.training:
            return [v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)] if crops else []
        crop_flip = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        return {
            "none": [],
            "crop_flip": crop_flip,
            "randaugment": [*crop_flip, v2.RandAugment(2, 10)],
            "cifar": [v2.RandomCrop(size, padding=size // 8), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        }[self.cfg.augment]

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> tuple[Tensor, int]:
        """(image (channels, height, width) uint8, class). Raises BadData for what the model cannot take."""
        image = self._image(files)
        if self.transforms:
            with _drawn_from(key):
                image = v2.Compose(self.transforms)(image)
        size = self.model.image_size
        if image.shape[1:] != (size, size):
            height, width = image.shape[1:]
            raise BadData(f"an image of {height} x {width} pixels: model.image_size = {size}, and nothing crops it")
        label = files.get("cls", b"").strip()
        if not label.isdigit() or int(label) >= self.model.num_classes:
            raise BadData(f"label {label!r}: must be a class 0 to {self.model.num_classes - 1}")
        return image, int(label)

    def _image(self, files: dict[str, bytes]) -> Tensor:
        encoded = next((files[name] for name in ENCODINGS if name in files), None)
        if encoded is None:
            raise BadData(f"no image: has {', '.join(files)} and none of {', '.join(ENCODINGS)}")
        try:
            image = Image.open(io.BytesIO(encoded)).convert(self.mode)
        except (OSError, ValueError) as error:
            raise BadData(f"an image that cannot be decoded: {error}") from None
        return v2.functional.pil_to_tensor(image)

    def collate(self, samples: list[tuple[Tensor, int]], keys: list[Key]) -> Batch:
        """ "images" (batch, channels, height, width) and "labels": (batch,), or (batch, num_classes) where mixed."""
        images = v2.functional.to_dtype(torch.stack([image for image, _ in samples]), torch.float32, scale=True)
        images = v2.functional.normalize(images, self.mean, self.std)
        labels = torch.tensor([label for _, label in samples])
        if not self.training or self.cfg.group == 1:
            return {"images": images, "labels": labels}
        pairs = zip(images.split(2), labels.split(2), keys[::2], strict=True)
        mixed_images, mixed_labels = zip(*(self._mix(*pair) for pair in pairs), strict=True)
        return {"images": torch.cat(mixed_images), "labels": torch.cat(mixed_labels)}

    def _mix(self, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """Mix a pair: CutMix (Yun et al. 2019) with its probability, else Mixup (Zhang et al. 2018) where it is on."""
        classes = self.model.num_classes
        with _drawn_from(key):
            if torch.rand(()) < self.cfg.cutmix:
                return v2.CutMix(alpha=1.0, num_classes=classes)(images, labels)
            if self.cfg.mixup > 0:
                return v2.MixUp(alpha=self.cfg.mixup, num_classes=classes)(images, labels)
        return images, torch.nn.functional.one_hot(labels, classes).to(images.dtype)


@contextmanager
def _drawn_from(key: Key) -> Iterator[None]:
    """Torch's generator, which torchvision draws from, gives what the sample's key says; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(key.generator().integers(2**63)))
        yield
