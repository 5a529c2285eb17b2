"""Encoded images -> normalised tensors, augmented for training, Mixup and CutMix included."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from acn_scale.config import ImageDataConfig, ImageModelConfig
from acn_scale.data.decode import Box, Picture
from acn_scale.data.image_noise import ImageNoise, Stage
from acn_scale.data.raw_images import ENCODINGS
from acn_scale.data.resize import resizer
from acn_scale.data.samples import Batch, Decoder, Key
from acn_scale.data.shards import ShardIndex
from acn_scale.errors import BadData, UserError

CROPPING, AUGMENTING, ERASING, MIXING, NOISE = range(5)  # what random numbers are drawn for


class ImageDecoder(Decoder):
    """Decodes and transforms the images of one split.

    Training images get the augmentation of the config. Evaluation images are brought to the model's size as
    cfg.evaluation_resize() says, and must have it where that is None; then `noise` is put on them. `stats` holds the
    pixels' "mean" and "std", of the training split for both.

    Training images travel to the device as bytes, a quarter of the size, and are normalised there; not so where Mixup
    or erasing change them after that.
    """

    def __init__(
        self,
        cfg: ImageDataConfig,
        model: ImageModelConfig,
        index: ShardIndex,
        stats: dict[str, Any],
        *,
        training: bool,
        noise: ImageNoise | None = None,
    ) -> None:
        if index.info.get("kind") != "images":
            raise UserError(f"{index.folder}: holds {index.info.get('kind')}; model.name = {model.name} takes images")
        classes = index.info["classes"]
        if len(classes) > model.num_classes:
            raise UserError(f"model.num_classes = {model.num_classes}: {index.folder} has {len(classes)} classes")
        self.cfg, self.model, self.training, self.noise = cfg, model, training, noise
        self.mode = {1: "L", 3: "RGB"}[model.channels]
        self.mean, self.std = cfg.mean or stats["mean"], cfg.std or stats["std"]
        if strange := {len(self.mean), len(self.std)} - {1, model.channels}:
            others = f"{strange.pop()}, as the training shards' images have, or data.mean and data.std be given"
            raise UserError(f"model.channels = {model.channels}: must be {others}")
        # (byte / 255 - mean) / std is shift + scale * byte: one operation, and closer to it in fp32 than three.
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        self.shift, self.scale = (-mean / std).float(), (1 / (255 * std)).float()
        # By rows of width x channels: a CPU is slow on axes as short as channels.
        self.rows = [
            values.expand(model.channels, 1, 1).flatten().repeat(model.image_size)
            for values in (self.shift, self.scale)
        ]
        self.erase = v2.RandomErasing(cfg.random_erasing, value="random", inplace=True)  # noise, as timm's "pixel"
        self.as_bytes = training and cfg.mixup == 0 and cfg.random_erasing == 0
        self.transforms = self._transforms()

    def _transforms(self) -> list[Callable[[Tensor], Tensor]]:
        """What comes after decoding, and after the random crop where there is one."""
        size = self.model.image_size
        if not self.training:
            resize = self.cfg.evaluation_resize(size)
            return [resizer(resize, size, self.mean)] if resize else []
        return {
            "none": [],
            "crop_flip": [],
            "randaugment": [v2.RandAugment(2, 10)],
            "cifar": [v2.RandomCrop(size, padding=size // 8), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        }[self.cfg.augment]

    def decode(self, files: dict[str, bytes], row: int, key: Key) -> tuple[Tensor, int]:
        """(image (channels, height, width) uint8, class). Raises BadData for what the model cannot take."""
        encoded = next((files[name] for name in ENCODINGS if name in files), None)
        if encoded is None:
            raise BadData(f"no image: has {', '.join(files)} and none of {', '.join(ENCODINGS)}")
        picture = Picture(encoded, self.mode)
        size = self.model.image_size
        if self.training and self.cfg.crops:
            draw = random.Random(key.number(CROPPING))
            image = picture.resized(random_box(*picture.size, draw), size)
            image = image.flip(-1) if draw.random() < 0.5 else image
        else:
            image = picture.pixels()
        if self.transforms:
            with _drawn_from(key, AUGMENTING):
                for transform in self.transforms:
                    image = transform(image)
        if image.shape[1:] != (size, size):
            height, width = image.shape[1:]
            raise BadData(f"an image of {height} x {width} pixels: model.image_size = {size}, and nothing crops it")
        label = files.get("cls", b"").strip()
        if not label.isdigit() or int(label) >= self.model.num_classes:
            raise BadData(f"label {label!r}: must be a class 0 to {self.model.num_classes - 1}")
        return self._noisy(image, key, "bytes"), int(label)

    def _noisy(self, image: Tensor, key: Key, stage: Stage) -> Tensor:
        """With the noise, where that is for images at this stage."""
        if self.noise is None or self.noise.stage != stage:
            return image
        return torch.from_numpy(self.noise.change(image.numpy(), np.random.default_rng(key.number(NOISE))))

    def collate(self, samples: list[tuple[Tensor, int]], keys: list[Key]) -> Batch:
        """ "images" (batch, channels, height, width), as `finish` takes them, and "labels": (batch,), or
        (batch, num_classes) where mixed.
        """
        if self.as_bytes:
            images = torch.stack([pixels.permute(1, 2, 0) for pixels, _ in samples]).permute(0, 3, 1, 2)
        else:
            images = torch.empty(len(samples), *samples[0][0].shape)
            for image, (pixels, _), key in zip(images, samples, keys, strict=True):
                self._normalise(image, pixels, key)
        labels = torch.tensor([label for _, label in samples])
        if not self.training or self.cfg.group == 1:
            return {"images": images, "labels": labels}
        pairs = zip(images.split(2), labels.split(2), keys[::2], strict=True)
        mixed_images, mixed_labels = zip(*(self._mix(*pair) for pair in pairs), strict=True)
        return {"images": torch.cat(mixed_images), "labels": torch.cat(mixed_labels)}

    def _normalise(self, image: Tensor, pixels: Tensor, key: Key) -> None:
        """Pixels (channels, height, width) uint8 into what the model takes, with noise and what is erased."""
        image.copy_(pixels)  # all in place, while it is in the CPU's cache
        if self.noise is not None and self.noise.stage == "pixels":
            image.copy_(self._noisy(image / 255, key, "pixels")).mul_(255)
        torch.addcmul(self.shift, image, self.scale, out=image)
        image.copy_(self._noisy(image, key, "normalised"))
        if self.training and self.cfg.random_erasing > 0:
            with _drawn_from(key, ERASING):
                self.erase(image)

    def finish(self, batch: Batch) -> Batch:
        images = batch["images"]
        if images.dtype != torch.uint8:
            return batch
        pixels = images.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
        shift, scale = (row.to(pixels.device, non_blocking=True) for row in self.rows)
        torch.addcmul(shift, pixels.flatten(2), scale, out=pixels.flatten(2))
        return batch | {"images": pixels.permute(0, 3, 1, 2)}

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images back as uint8, for people to look at."""
        return images.sub(self.shift).div(self.scale).round().clamp(0, 255).to(torch.uint8)

    def _mix(self, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """Mix a pair: CutMix (Yun et al. 2019) with its probability, else Mixup (Zhang et al. 2018) where it is on."""
        classes = self.model.num_classes
        with _drawn_from(key, MIXING):
            if torch.rand(()) < self.cfg.cutmix:
                return v2.CutMix(alpha=1.0, num_classes=classes)(images, labels)
            if self.cfg.mixup > 0:
                return v2.MixUp(alpha=self.cfg.mixup, num_classes=classes)(images, labels)
        return images, torch.nn.functional.one_hot(labels, classes).float()


def random_box(height: int, width: int, draw: random.Random) -> Box:
    """A part of 8 to 100 % of the area and of sides 3:4 to 4:3 (Szegedy et al. 2015), as torchvision and timm draw it.

    torchvision's own draws take ten times as long, a twentieth of what all else about an image takes.
    """
    for _ in range(10):
        area = height * width * draw.uniform(0.08, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return Box(draw.randint(0, height - down), draw.randint(0, width - across), down, across)
    # Of a very long one, the middle.
    down, across = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return Box((height - down) // 2, (width - across) // 2, down, across)


@contextmanager
def _drawn_from(key: Key, purpose: int) -> Iterator[None]:
    """Torch's generator, which torchvision draws from, gives what the sample's key says; afterwards it is as before.

    Draws for another purpose are others: what is mixed must not depend on how it was cropped.
    """
    generator = torch.default_generator  # torch.manual_seed seeds GPUs too, and takes 0.3 ms to note who asked for it
    state = generator.get_state()
    try:
        generator.manual_seed(key.number(purpose))
        yield
    finally:
        generator.set_state(state)
