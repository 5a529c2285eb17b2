"""[data]: where samples come from, in which order, and what is done to them."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveFloat, model_validator

from acn_scale.config.section import Section


class RemoteConfig(Section):
    """Shards behind a URL: how they are fetched and kept."""

    cache_dir: str | None = Field(
        None, min_length=1, description="folder on the node's own disk for them; default: in the temporary folder"
    )
    cache_gib: float = Field(100.0, gt=0, description="size of that folder; what was used longest ago is dropped")
    timeout: float = Field(60.0, gt=0, description="seconds of silence after which a connection has failed")
    retries: int = Field(6, ge=0, description="further attempts at a download, after about 1, 2, 4, ... 30 seconds")


class StreamConfig(Section):
    """What all data share: where the shards are and in which order they are read."""

    train: str = Field(
        min_length=1, description="folder of training shards with their index.json; or s3:// gs:// hf:// https://"
    )
    eval: str = Field(min_length=1, description="folder or URL of evaluation shards with their index.json")
    streams: int = Field(
        64, ge=1, description="canonical streams the data are split into; ranks that divide it read shards of their own"
    )
    shuffle_window: int = Field(16384, ge=1, description="samples of a stream that are shuffled together")
    workers: int = Field(0, ge=0, description="loader processes of each rank; 0 loads in the training process")
    on_bad_sample: Literal["fail", "skip"] = Field(
        "fail", description="what a sample that cannot be read does: ends the run, or is replaced by another one"
    )
    max_bad_samples: int = Field(1000, ge=0, description="different samples a run may skip before it ends")
    verify_checksums: bool = Field(
        True, description="check each shard's sha256 when a rank first opens it (remote ones always when they arrive)"
    )
    remote: RemoteConfig = RemoteConfig()


class Resize(Section):
    """How an image of any size becomes the model's input."""

    size: int = Field(ge=1, description="in pixels: of the shorter side before the centre crop (fit = crop), of both "
        "(squash), or of the longer (border)")  # fmt: skip
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = Field(
        "bicubic", description="between pixels"
    )
    fit: Literal["crop", "squash", "border"] = Field(
        "crop", description="keep the shape and crop the centre; do not keep it; or keep it and fill up with the mean"
    )
    like: Literal["torchvision", "timm", "transformers"] = Field(
        "torchvision", description="whose resizing and cropping is followed digit by digit; timm's is Pillow's"
    )

    @model_validator(mode="after")
    def _known_there(self) -> "Resize":
        if self.like != "timm" and (self.fit == "border" or self.interpolation in ("box", "hamming")):
            raise ValueError(
                f"fit = {self.fit}, interpolation = {self.interpolation}: {self.like} has it not, timm has"
            )
        return self

    def crop_pct(self, image_size: int) -> float:
        """timm's name for it, of which it makes floor(image_size / crop_pct) pixels again."""
        share = image_size / self.size
        return share if math.floor(image_size / share) == self.size else image_size / (self.size + 0.5)


class ImageDataConfig(StreamConfig):
    kind: Literal["images"] = Field(description="what the shards hold")
    augment: Literal["none", "crop_flip", "randaugment", "cifar"] = Field(
        "none",
        description="none; RandomResizedCrop and flip; the same with RandAugment(2, 10); "
        "padded RandomCrop and AutoAugment's CIFAR-10 policy",
    )
    random_erasing: float = Field(0.0, ge=0, le=1, description="probability of filling a rectangle with noise")
    mixup: float = Field(0.0, ge=0, description="alpha of Mixup's beta distribution; 0 turns it off")
    cutmix: float = Field(0.0, ge=0, le=1, description="probability of CutMix")
    mean: list[float] | None = Field(None, description="per channel, of pixels in 0..1; default: from index.json")
    std: list[PositiveFloat] | None = Field(
        None, description="per channel, of pixels in 0..1; default: from index.json"
    )
    resize: Resize | None = Field(
        None, description="of images to be evaluated; default: where `augment` crops, the shorter side to image_size / "
        "0.875 and the centre of it (timm's default), else none",
    )  # fmt: skip
    mask_ratio: ClassVar[float] = 0.0

    @property
    def crops(self) -> bool:
        """Whether training images come in any size, of which a random crop is taken."""
        return self.augment in ("crop_flip", "randaugment")

    def evaluation_resize(self, image_size: int) -> Resize | None:
        """None: images to be evaluated come in the model's size."""
        return self.resize or (Resize(size=math.floor(image_size / 0.875)) if self.crops else None)

    @property
    def group(self) -> int:
        """Neighbours in the order of the data that stay together on one rank: the pairs that Mixup and CutMix mix."""
        return 2 if self.mixup > 0 or self.cutmix > 0 else 1


class TextDataConfig(StreamConfig):
    kind: Literal["text"] = Field(description="what the shards hold")
    mask_ratio: float = Field(0.15, gt=0, lt=1, description="share of the tokens to predict")
    whole_words: bool = Field(False, description="choose words to predict, with all their pieces, instead of pieces")
    group: ClassVar[int] = 1


class SentenceDataConfig(StreamConfig):
    kind: Literal["sentences"] = Field(description="what the shards hold")
    tokenizer: str = Field(
        min_length=1, description="folder with a tokenizer: tokenizer.model (ours), tokenizer.json or vocab.txt (BERT)"
    )
    max_tokens: int | None = Field(
        None, ge=4, description="longest sequence with [CLS] and [SEP], longer ones are cut; default: 128, or "
        "model.max_tokens where that is less"
    )  # fmt: skip
    # Sentences to fine-tune on are few, and lie in files by where they come from: all are shuffled together.
    streams: int = Field(1, ge=1, description=StreamConfig.model_fields["streams"].description)
    shuffle_window: int = Field(2**20, ge=1, description=StreamConfig.model_fields["shuffle_window"].description)
    buckets: bool = Field(True, description="put samples of like length into a batch, so that little of it is padding")
    mask_ratio: ClassVar[float] = 0.0
    group: ClassVar[int] = 1


DataConfig = Annotated[ImageDataConfig | TextDataConfig | SentenceDataConfig, Discriminator("kind")]
