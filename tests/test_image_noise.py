"""Images under keyed noise and ImageNet-C's corruptions, and the mean error over these."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from networks import image_export, network
from networks import vit as vit_config
from ranks import Ranks
from test_images import encoded, photo

from acn_scale.config import ImageDataConfig
from acn_scale.convert import read_model
from acn_scale.convert.export import write_export
from acn_scale.convert.network import Network
from acn_scale.data import evaluation_of
from acn_scale.data.image_files import ImageFiles
from acn_scale.data.image_noise import CORRUPTIONS, ImageNoise, image_noise
from acn_scale.downstream import corruptions
from acn_scale.downstream.corruptions import ALEXNET, corrupted
from acn_scale.downstream.image_sets import open_subject
from acn_scale.downstream.predictions import predict
from acn_scale.downstream.table import results_table
from acn_scale.errors import UserError
from acn_scale.results import read_measurements

CPU = torch.device("cpu")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # it would compile one of the corruptions for seconds

NOISES = ["gaussian_0.2", "salt_pepper_0.05", "shot_noise_3", "glass_blur_1", "fog_5", "impulse_noise_2"]


def fifteen(folder: Path) -> tuple[Callable[..., torch.Tensor], ImageDataConfig]:
    """Of so many equal images: what a model gets, given a noise; and their config."""
    network = read_model(image_export(folder / "source", vit_config(image_size=32)))
    where = folder / "same/kind 0"
    where.mkdir(parents=True)
    for number in range(15):
        (where / f"{number:02d}.png").write_bytes(encoded(photo(32, 32), "PNG"))
    data, files = network.card.images.data(str(where.parent)), ImageFiles(where.parent, "eval")

    def images(noise: ImageNoise | None, **batches: int) -> torch.Tensor:
        batches = {"batch_size": 15, "rank": 0, "world_size": 1} | batches
        found = evaluation_of(data, network.card.model, noise=noise, files=files, **batches)
        return torch.cat([batch["images"][counts] for batch, counts in found])

    return images, data


@pytest.mark.parametrize(
    ("name", "on"), [(name, "pixels") for name in NOISES] + [(name, "normalised") for name in NOISES[:2]]
)
def test_noise_is_of_the_sample_alone(tmp_path: Path, name: str, on: str) -> None:
    """In any batch, on any rank, in any pass. Equal images differ then; numpy's own generator is left as it was."""
    images, noise = fifteen(tmp_path)[0], image_noise(name, on=on)
    before = np.random.get_state()[1].copy()
    whole = images(noise)
    assert torch.equal(images(noise, batch_size=1), whole)
    assert torch.equal(torch.cat([images(noise, batch_size=8, rank=rank, world_size=2) for rank in range(2)]), whole)
    assert np.array_equal(np.random.get_state()[1], before)
    changed = whole - images(None)
    assert changed.flatten(1).any(dim=1).all()
    assert len({image.numpy().tobytes() for image in whole}) == 15


@pytest.mark.parametrize("on", ["pixels", "normalised"])
def test_noise_is_put_where_it_says(tmp_path: Path, on: str) -> None:
    """On pixels of 0..1, black and white in the model's numbers, or on these. The others stay what they are."""
    images, data = fifteen(tmp_path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    bounds = torch.tensor([0.0, 1.0] if on == "pixels" else [-1.0, 1.0]).view(2, 1, 1, 1, 1)
    bounds = (bounds - mean) / std if on == "pixels" else bounds
    off = [(images(image_noise("salt_pepper_0.5", on=on)) - value).abs() for value in (*bounds, images(None))]
    salt, pepper, same = ((each < 1e-5).all(1).float().mean() for each in off)
    assert (salt, pepper) == (pytest.approx(0.25, abs=0.02), pytest.approx(0.25, abs=0.02))
    assert salt + pepper + same == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("on", ["pixels", "normalised"])
def test_noise_is_as_strong_as_it_says(on: str) -> None:
    grey = np.full((3, 200, 200), 0.5 if on == "pixels" else 0.1, np.float32)
    random = np.random.default_rng(0)
    for sigma in (0.1, 0.4, 2.0):
        change = image_noise(f"gaussian_{sigma}", on=on).change(grey, random) - grey
        if on == "pixels":
            assert np.abs(change).max() <= 0.5
        if sigma < 0.2 or on == "normalised":
            assert change.std() == pytest.approx(sigma, rel=0.02)
        assert abs(change.mean()) < 0.02 * sigma + 0.003
    low, high = (0, 1) if on == "pixels" else (-1, 1)
    for share in (0.01, 0.1, 1.0):
        noisy = image_noise(f"salt_pepper_{share}", on=on).change(grey, random)
        assert np.array_equal(noisy[0], noisy[2]), "a pixel has one colour"
        for value in (low, high):
            assert (noisy == value).mean() == pytest.approx(share / 2, abs=3e-3)
        assert (noisy == grey).mean() == pytest.approx(1 - share, abs=4e-3)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_-1", "gaussian_nan", "salt_pepper_2", "fog_6", "snow", "x_0.1"])
def test_noise_that_there_is_not(name: str) -> None:
    with pytest.raises(UserError, match=f"--noise {name}: must be gaussian_SIGMA"):
        image_noise(name)


def measured_corruptions(source: str, data: str, folder: str, classes: list[str]) -> list[dict[str, Any]]:
    """On every rank."""
    subject = open_subject(source, data=data, classes=classes)
    return [each.model_dump() for each in corrupted(subject, CPU, Path(folder))]


@pytest.fixture
def imagenet_c(tmp_path: Path) -> tuple[str, str, str, list[str]]:
    """What measured_corruptions() takes: a network of 1,000 classes that says one of all images, and files in
    ImageNet-C's layout, of which some are of another.
    """
    classes = [f"kind {number}" for number in range(1000)]
    net = network(vit_config(image_size=32, num_classes=1000, depth=1))
    net.model.head.linear.bias[3] = 1e4  # says "kind 3" of all images
    images = net.card.images.model_copy(update={"classes": classes})
    source = tmp_path / "source"
    source.mkdir()
    write_export(Network(net.model, net.card.model_copy(update={"images": images})), source, "fp32")
    image = encoded(photo(32, 32), "PNG")
    for place, corruption in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            for number in range(4):
                kind = "kind 7" if number < place % 4 or (severity, number) == (5, 3) else "kind 3"
                folder = tmp_path / "c" / ("blur" if place == 4 else ".") / corruption / str(severity) / kind
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number}.png").write_bytes(image)
    return str(source), str(tmp_path / "c/fog/1"), str(tmp_path / "c"), classes


def test_mean_corruption_error(one_rank: Ranks, imagenet_c: tuple, tmp_path: Path) -> None:
    """Each error divided by AlexNet's: of files whose images are taken as they are."""
    (found,) = one_rank(measured_corruptions, *imagenet_c)
    values = {(each["metric"], each["depth"]): each["value"] for each in found}
    errors = {corruption: (place % 4 + 0.2) / 4 for place, corruption in enumerate(CORRUPTIONS)}
    for depth in range(2):
        assert values["accuracy/fog_1", depth] == pytest.approx(1 - CORRUPTIONS.index("fog") % 4 / 4)
        assert values["accuracy", depth] == pytest.approx(1 - np.mean(list(errors.values())))
        assert values["mCE", depth] == pytest.approx(np.mean([errors[each] / ALEXNET[each] for each in errors]))
    (tmp_path / "c/snow").rename(tmp_path / "c/rain")
    with pytest.raises(AssertionError, match="has no folder snow; ImageNet-C has gaussian_noise, "):
        one_rank(measured_corruptions, *imagenet_c)


def passes_until(most: int, *arguments: Any) -> int:
    """How many passes corrupted() makes of those that it is stopped after, on every rank."""
    made = 0

    def counted(*given: Any) -> Any:
        nonlocal made
        if made == most:
            raise KeyboardInterrupt
        made += 1
        return predict(*given)

    with patch.object(corruptions, "predict", counted), suppress(KeyboardInterrupt):
        measured_corruptions(*arguments)
    return made


def test_corruptions_go_on_where_they_were_stopped(
    one_rank: Ranks, two_ranks: Ranks, imagenet_c: tuple, tmp_path: Path
) -> None:
    """To the same file; with the corruptions that are done told before. Of other weights, images or
    statistics, all is anew."""
    source, partial = Path(imagenet_c[0]), tmp_path / "partial"
    result = source / "eval/1+corruptions.json"
    assert one_rank(passes_until, 75, *imagenet_c) == [75]
    whole = result.read_bytes()
    shutil.rmtree(source / "eval")
    assert one_rank(passes_until, 12, *imagenet_c) == [12]
    shutil.copytree(source / "eval", partial / "eval")
    assert {each.metric for each in read_measurements(partial)} == {
        f"accuracy/{kind}_{severity}" for kind in CORRUPTIONS[:2] for severity in range(1, 6)
    }
    with pytest.raises(UserError, match="holds no results"):
        results_table([partial])
    assert two_ranks(passes_until, 75, *imagenet_c) == [65, 65]
    assert result.read_bytes() == whole
    assert one_rank(passes_until, 75, *imagenet_c) == [0]
    (tmp_path / "c/fog/3/kind 7").rename(tmp_path / "c/fog/3/kind 8")
    assert one_rank(passes_until, 75, *imagenet_c) == [5]
    other = read_model(source)
    other.model.head.linear.bias[3] = 0
    images = other.card.images
    card = other.card.model_copy(update={"images": images.model_copy(update={"std": [2 * std for std in images.std]})})
    shutil.copytree(source / "eval", tmp_path / "done")
    for each in (other, Network(read_model(source).model, card)):
        shutil.copytree(tmp_path / "done", source / "eval", dirs_exist_ok=True)
        write_export(each, source, "fp32")
        assert one_rank(passes_until, 1, *imagenet_c) == [1]
