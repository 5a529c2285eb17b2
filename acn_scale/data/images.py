"""Encoded images -> normalised tensors, augmented for training, Mixup and CutMix included."""

from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from acn_scale.config import ImageDataConfig, ImageModelConfig, UserError
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import Batch, Key

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
        self.mode = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}[model.channels]
        mean, std = cfg.mean or stats["mean"], cfg.std or stats["std"]
        self.transform = v2.Compose([*self._geometry(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def _geometry(self) -> list[v2.Transform]:
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

    def decode(self, files: dict[str, memoryview], row: int, key: Key) -> tuple[Tensor, int]:
        """(image (channels, height, width), class). Raises UserError for an image of another size than the model's."""
        encoded = next(files[name] for name in ENCODINGS if name in files)
        image = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=self.mode)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key.generator().integers(2**63))
            image = self.transform(image)
        size = self.model.image_size
        if image.shape[1:] != (size, size):
            height, width = image.shape[1:]
            raise UserError(f"an image of {height} x {width} pixels: model.image_size = {size}, and nothing crops it")
        return image, int(bytes(files["cls"]))

    def collate(self, samples: list[tuple[Tensor, int]], keys: list[Key]) -> Batch:
        """ "images" (batch, channels, height, width) and "labels": (batch,), or (batch, num_classes) where mixed."""
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([label for _, label in samples])
        if not self.training or self.cfg.group == 1:
            return {"images": images, "labels": labels}
        pairs = zip(images.split(2), labels.split(2), keys[::2], strict=True)
        mixed_images, mixed_labels = zip(*(self._mix(*pair) for pair in pairs), strict=True)
        return {"images": torch.cat(mixed_images), "labels": torch.cat(mixed_labels)}

    def _mix(self, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """Mix a pair: CutMix (Yun et al. 2019) with its probability, else Mixup (Zhang et al. 2018) where it is on."""
        classes = self.model.num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key.generator().integers(2**62))
            if torch.rand(()) < self.cfg.cutmix:
                return v2.CutMix(alpha=1.0, num_classes=classes)(images, labels)
            if self.cfg.mixup > 0:
                return v2.MixUp(alpha=self.cfg.mixup, num_classes=classes)(images, labels)
        return images, torch.nn.functional.one_hot(labels, classes).to(images.dtype)
