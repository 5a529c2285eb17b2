"""Image files -> batches: what is decoded is what Pillow decodes, what is drawn is drawn from the sample's key."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import image_folder
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

from acn_scale.config import Config
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.batch_plan import BatchPlan
from acn_scale.data.decode import Box, Picture
from acn_scale.data.images import CROPPING, random_box
from acn_scale.data.samples import Batch, Key
from acn_scale.data.shards import ShardIndex
from acn_scale.data.stream import Stream
from acn_scale.errors import BadData, UserError


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """With edges and smooth parts, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def by_pillow(content: bytes, mode: str = "RGB") -> torch.Tensor:
    pixels = np.array(Image.open(io.BytesIO(content)).convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6  # orientation
    return exif


KINDS = {
    "photo": encoded(photo(75, 101)),
    "progressive": encoded(photo(64, 40), progressive=True),
    "all colours": encoded(photo(33, 50), subsampling=0),
    "grey": encoded(photo(50, 60).convert("L")),
    "cmyk": encoded(photo(50, 60).convert("CMYK")),
    "rotated": encoded(photo(50, 60), exif=turned()),
    "png": encoded(photo(30, 31), "PNG"),
    "palette": encoded(photo(30, 31).quantize(16), "PNG"),
    "alpha": encoded(photo(30, 31).convert("RGBA"), "PNG"),
    "webp": encoded(photo(30, 31), "WEBP"),
}


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(sorted(KINDS)), mode=st.sampled_from(["RGB", "L"]), data=st.data())
def test_a_part_is_that_part_of_the_whole(kind: str, mode: str, data: st.DataObject) -> None:
    """Digit for digit what Pillow gives, whatever decodes it."""
    whole = by_pillow(KINDS[kind], mode)
    picture = Picture(KINDS[kind], mode)
    assert picture.size == tuple(whole.shape[1:])
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, picture.size[0])] * 2).filter(lambda x: x[0] != x[1])))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, picture.size[1])] * 2).filter(lambda x: x[0] != x[1])))
    part = picture._box(Box(top, left, bottom - top, right - left))
    assert torch.equal(part, whole[:, top:bottom, left:right])
    assert torch.equal(Picture(KINDS[kind], mode).pixels(), whole)


@pytest.mark.parametrize("kind", ["photo", "progressive", "all colours", "narrow"])
def test_the_narrowest_parts(kind: str) -> None:
    """Of one to six pixels across or down, anywhere."""
    content = encoded(photo(40, 5)) if kind == "narrow" else KINDS[kind]
    whole, picture = by_pillow(content), Picture(content, "RGB")
    height, width = picture.size
    for size in range(1, 7):
        for left in range(width - size + 1):
            assert torch.equal(picture._box(Box(0, left, height, size)), whole[:, :, left : left + size])
        for top in range(height - size + 1):
            assert torch.equal(picture._box(Box(top, 0, size, width)), whole[:, top : top + size])
            assert torch.equal(picture._box(Box(top, 0, size, 1)), whole[:, top : top + size, :1])


@settings(deadline=None, max_examples=300)
@given(kind=st.sampled_from(sorted(KINDS)), cut=st.floats(0, 0.95), noise=st.binary(max_size=20), at=st.floats(0, 1))
def test_damaged_files_are_bad_data_and_nothing_worse(kind: str, cut: float, noise: bytes, at: float) -> None:
    content = KINDS[kind]
    place = int(at * len(content))
    for damaged in (content[: int(cut * len(content))], content[:place] + noise + content[place + len(noise) :]):
        try:
            assert Picture(damaged, "RGB").pixels().dtype == torch.uint8
        except BadData as error:
            assert "\n" not in str(error)


def test_truncated_photos_are_bad_data() -> None:
    content = encoded(photo(300, 400), quality=95)
    for share in (0.01, 0.3, 0.6, 0.9):
        with pytest.raises(BadData, match="an image that cannot be decoded"):
            Picture(content[: int(share * len(content))], "RGB").pixels()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    images = [(encoded(photo(60 + 7 * number, 80 - 3 * number, number)), "1") for number in range(8)]
    return image_folder(tmp_path / "photos", [images[:5], images[5:]])


@pytest.fixture
def photo_run(vit: Callable[..., Config], photos: Path) -> Callable[..., Config]:
    def build(**data: object) -> Config:
        model = {"channels": 3, "image_size": 32, "patch_size": 8}
        stats = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
        where = {"train": str(photos), "eval": str(photos), "augment": "crop_flip", "streams": 1}
        return vit(data=where | stats | data, model=model, train={"global_batch_size": 8})

    return build


def test_evaluation_is_timms(photo_run: Callable[..., Config]) -> None:
    cfg = photo_run()
    batch, counts = next(iter(build_evaluation(cfg)))
    timm = create_transform(32, interpolation="bicubic", crop_pct=0.875, mean=cfg.data.mean, std=cfg.data.std)
    samples = build_evaluation(cfg).samples
    images = [
        Image.open(io.BytesIO(samples.reader.read(*divmod(n, 5) if n < 5 else (1, n - 5))["png"])) for n in range(8)
    ]
    expected = torch.stack([timm(image.convert("RGB")) for image in images])
    assert counts.all()
    levels = (batch["images"] - expected).abs() * torch.tensor(cfg.data.std).view(3, 1, 1) * 255
    assert levels.max() < 2.5
    assert levels.mean() < 0.3


def test_a_crop_is_a_part_of_the_photo_scaled(photo_run: Callable[..., Config]) -> None:
    """The same as cutting the whole photo and letting Pillow scale it, flipped or not."""
    samples = build_stream(photo_run()).samples
    flips = 0
    for position in range(8):
        key, shard, number = samples.key(position)
        files = samples.reader.read(shard, number)
        image, _ = samples.decoder.decode(files, 0, key)
        box = random_box(*Picture(files["png"], "RGB").size, random.Random(key.number(CROPPING)))
        whole = Image.open(io.BytesIO(files["png"])).convert("RGB")
        part = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        expected = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
        off = [np.abs(image.numpy() - each).max() for each in (expected, expected[..., ::-1])]
        assert min(off) <= 1
        flips += off[1] < off[0]
    assert 0 < flips < 8


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (40, 1000), (1000, 40), (1, 1), (2, 3)])
def test_boxes_are_drawn_as_torchvision_draws_them(height: int, width: int) -> None:
    """The same distribution of areas, shapes and places."""
    draw = random.Random(0)
    ours = np.array([random_box(height, width, draw) for _ in range(4000)])
    image = torch.empty(1, height, width, device="meta")
    crop = v2.RandomResizedCrop(1)
    names = ("top", "left", "height", "width")
    theirs = np.array([[crop.make_params([image])[name] for name in names] for _ in range(4000)])
    assert (ours >= [0, 0, 1, 1]).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for a, b in zip(ours.T, theirs.T, strict=True):
        error = np.hypot(a.std(), b.std()) / 4000**0.5
        assert abs(a.mean() - b.mean()) <= 5 * error
        assert abs(a.std() - b.std()) <= 5 * error


def test_each_epoch_crops_anew_and_leaves_torchs_generator_alone(photo_run: Callable[..., Config]) -> None:
    """A draw of the model's, such as dropout, must not depend on the images before it."""
    samples = build_stream(photo_run(augment="randaugment", random_erasing=0.5, cutmix=0.5)).samples
    before = torch.get_rng_state()
    epochs: list[dict[int, Tensor]] = []
    for epoch in range(2):
        keys = [samples.key(8 * epoch + place) for place in range(8)]
        decoded = {key.sample: samples.decoder.decode(samples.reader.read(*where), 0, key)[0] for key, *where in keys}
        epochs.append(decoded)
        samples.__getitems__(list(range(8 * epoch, 8 * epoch + 8)))
    assert torch.equal(torch.get_rng_state(), before)
    assert epochs[0].keys() == epochs[1].keys() == set(range(8))
    assert not any(torch.equal(epochs[0][sample], epochs[1][sample]) for sample in range(8))


def test_erasing_is_drawn_from_the_sample_alone(photo_run: Callable[..., Config]) -> None:
    plain = next(build_stream(photo_run()))["images"]
    samples = build_stream(photo_run(random_erasing=0.5)).samples
    together = samples.__getitems__(list(range(8))).batch["images"]
    alone = torch.cat([samples.__getitems__([position]).batch["images"] for position in range(8)])
    assert torch.equal(together, alone)
    erased = (together != plain).flatten(1).any(1)
    assert 0 < erased.sum() < 8
    share = (together != plain).any(1)[erased].float().mean((1, 2))
    assert ((share > 0.01) & (share < 0.4)).all(), "2 % to a third of the pixels, as timm has it"
    evaluation, _ = next(iter(build_evaluation(photo_run(random_erasing=1.0))))
    assert torch.equal(evaluation["images"], next(iter(build_evaluation(photo_run())))[0]["images"])


def test_normalised_is_to_the_last_digits(photo_run: Callable[..., Config]) -> None:
    """In loader processes, for evaluation, as on the device, for training."""
    cfg = photo_run()
    images = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).view(1, 3, 32, 32)
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (cfg.data.mean, cfg.data.std))
    expected = (images.double() / 255 - mean) / std
    here = build_evaluation(cfg).samples.decoder.collate([(images[0], 0)], [Key(0, 0, 0)])
    there = build_stream(cfg).samples.decoder.finish({"images": images})
    for batch in (here, there):
        assert (batch["images"] - expected).abs().max() < 5e-7
    assert torch.equal(here["images"], there["images"])


def test_pixels_undo_the_normalisation(photo_run: Callable[..., Config]) -> None:
    samples = build_stream(photo_run()).samples
    images = next(build_stream(photo_run()))["images"][:2]
    decoded = [
        samples.decoder.decode(samples.reader.read(*samples.key(n)[1:]), 0, samples.key(n)[0])[0] for n in (0, 1)
    ]
    assert torch.equal(samples.decoder.pixels(images), torch.stack(decoded))


def test_grey_models_of_colour_shards(vit: Callable[..., Config], photos: Path) -> None:
    """Need to be told of one mean and deviation."""
    index = ShardIndex.load(photos)
    index.info.update({"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]})
    index.save()
    where = {"train": str(photos), "eval": str(photos), "augment": "crop_flip"}
    with pytest.raises(UserError, match=r"model\.channels = 1: must be 3, as the training shards' images have"):
        build_stream(vit(data=where))
    cfg = vit(data=where | {"mean": [0.5], "std": [0.25]}, train={"global_batch_size": 8})
    assert next(build_stream(cfg))["images"].shape == (8, 1, 8, 8)


def test_images_travel_as_bytes(photo_run: Callable[..., Config]) -> None:
    """And are what they would be if they did not: random erasing of a share that hits none needs them normalised."""
    cfg = photo_run()
    samples = build_stream(cfg).samples
    sent = samples.__getitems__(list(range(8))).batch
    assert sent["images"].dtype == torch.uint8
    rare = photo_run(random_erasing=1e-12)
    normalised = build_stream(rare).samples.__getitems__(list(range(8))).batch
    assert normalised["images"].dtype == torch.float32
    for run in (cfg, rare):
        batch = next(build_stream(run))
        assert torch.equal(batch["images"], normalised["images"]) and torch.equal(batch["labels"], sent["labels"])
    samples = build_stream(photo_run(cutmix=1.0)).samples
    assert samples.__getitems__(list(range(8))).batch["images"].dtype == torch.uint8


class OneAhead:
    """In place of a GPU: notes when each batch starts its way and when it is used."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def start(self, batch: Batch) -> Batch:
        self.events.append(("start", id(batch["labels"])))
        return batch

    def finish(self, batch: Batch) -> None:
        self.events.append(("finish", id(batch["labels"])))


def test_the_next_batch_is_on_its_way_and_the_state_knows_nothing_of_it(vit: Callable[..., Config]) -> None:
    plain = build_stream(vit())
    copies = OneAhead()
    plan = BatchPlan(16, 16, 0, 1, 1)
    stream = Stream(plain.samples, plain.cfg, plan, copies=copies)
    kept = [next(stream)["images"] for _ in range(3)]
    assert all(torch.equal(next(plain)["images"], images) for images in kept)
    assert [event for event, _ in copies.events] == ["start", *["finish", "start"] * 3]
    assert stream.state_dict() == plain.state_dict()
    again = Stream(plain.samples, plain.cfg, plan, copies=OneAhead())
    again.load_state_dict(stream.state_dict())
    expected = next(plain)["images"]
    assert torch.equal(next(again)["images"], expected)
    stream.load_state_dict(plain.state_dict())
    assert torch.equal(next(stream)["images"], next(plain)["images"])
