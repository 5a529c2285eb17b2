"""Classifiers of images on whole evaluation sets: prepared as the source has it, each image counted once."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import GREY, image_export, mixer, network
from networks import vit as vit_config
from PIL import Image
from ranks import Ranks
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from test_images import encoded, photo

from acn_scale.config import ModelConfig, RemoteConfig
from acn_scale.convert import convert, read_model
from acn_scale.convert.export import write_export
from acn_scale.data import evaluation_of
from acn_scale.data.image_noise import image_noise, image_noises
from acn_scale.data.shards import ShardIndex, ShardReader
from acn_scale.data.storage import open_folder
from acn_scale.downstream.image_evaluation import evaluate_images
from acn_scale.downstream.image_sets import open_subject
from acn_scale.downstream.predictions import predict
from acn_scale.errors import UserError
from acn_scale.results import read_measurements

CPU = torch.device("cpu")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # it would compile one of the corruptions for seconds


def class_folders(folder: Path, shards: Path) -> Path:
    """The images of shards as files in a folder for each class."""
    index = ShardIndex.load(shards)
    reader = ShardReader(open_folder(str(shards), index.shards, RemoteConfig()))
    for shard, entry in enumerate(index.shards):
        for record in range(entry.samples):
            files = reader.read(shard, record)
            place = folder / index.info["classes"][int(files["cls"])]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{shard:02d}-{record:03d}.png").write_bytes(files["png"])
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of three photos, of many shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(15):
        place = folder / f"kind {number % 5}"
        place.mkdir(exist_ok=True)
        (place / f"{number:02d}.jpg").write_bytes(encoded(photo(40 + 7 * number, 113 - 5 * number, number)))
    return folder


TIMMS = [
    {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
    {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash", "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3},
    {"crop_pct": 0.95, "interpolation": "lanczos", "crop_mode": "border", "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3},
    {"interpolation": "hamming"},
]


CASES = [(vit_config(image_size=32), prepared) for prepared in TIMMS] + [(mixer(image_size=32), TIMMS[0])]


@pytest.mark.parametrize(("model", "prepared"), CASES, ids=lambda each: each.name if hasattr(each, "name") else "")
def test_images_and_logits_are_timms(
    exported: Callable[..., Path], photos: Path, model: ModelConfig, prepared: dict[str, Any], tmp_path: Path
) -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from timm.models.mlp_mixer import MlpMixer

    folder = exported(network(model), "timm")
    values = json.loads((folder / "config.json").read_text())
    values["pretrained_cfg"] = {"input_size": [3, 32, 32], "classifier": "head"} | prepared
    (folder / "config.json").write_text(json.dumps(values))
    if model.name == "vit":
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    else:
        theirs = MlpMixer(**values["model_args"], num_classes=5).eval()
        theirs.load_state_dict(read_weights(folder))
        theirs.pretrained_cfg = values["pretrained_cfg"]
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    paths = sorted(photos.glob("*/*.jpg"))
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    subject = open_subject(f"timm:{folder}", data=str(photos), out=tmp_path, batch_size=4)
    data = subject.data
    evaluation = evaluation_of(data, subject.net.card.model, batch_size=99, files=subject.images.files)
    batch, counts = next(iter(evaluation))
    assert counts.all()
    torch.testing.assert_close(batch["images"], expected, rtol=0, atol=1e-5)
    assert batch["labels"].tolist() == [int(path.parent.name[-1]) for path in paths]
    with torch.no_grad():
        torch.testing.assert_close(subject.net.model(batch["images"])["logits"], theirs(expected), rtol=0, atol=1e-4)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


HF = [
    {"size": {"height": 32, "width": 32}, "resample": 2},
    {"size": {"shortest_edge": 37}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    {"size": {"height": 43, "width": 43}, "do_center_crop": True, "crop_size": 32, "resample": 0},
    {"size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "resample": 1},
]


@pytest.mark.parametrize("given", HF, ids=lambda given: str(given["size"]))
def test_images_are_those_of_transformers_processor(
    exported: Callable[..., Path], photos: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    folder = exported(network(vit_config(image_size=32)), "hf")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"} | given))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    paths = sorted(photos.glob("*/*.jpg"))
    expected = [processor(Image.open(path), return_tensors="pt").pixel_values[0] for path in paths]
    subject = open_subject(f"hf:{folder}", data=str(photos), out=tmp_path)
    evaluation = evaluation_of(subject.data, subject.net.card.model, batch_size=99, files=subject.images.files)
    batch, _ = next(iter(evaluation))
    torch.testing.assert_close(batch["images"], torch.stack(expected), rtol=0, atol=1e-5)


def test_what_is_asked_of_images_survives_conversion(photos: Path, tmp_path: Path) -> None:
    """From timm to ours, to Transformers and to timm again."""
    resize = {"size": 36, "interpolation": "bilinear"}
    source = image_export(tmp_path / "source", vit_config(image_size=32), resize=resize)
    for to, prefix in (("hf", "hf:"), ("timm", "timm:"), ("safetensors", "")):
        convert(str(source), to, tmp_path / to)
        found = read_model(f"{prefix}{tmp_path / to}").card.images.resize
        assert (found.size, found.interpolation, found.fit) == (36, "bilinear", "crop")
    values = json.loads((source / "config.json").read_text())
    values["images"]["resize"] = 36  # as exports had it before
    (source / "config.json").write_text(json.dumps(values))
    assert read_model(source).card.images.resize.interpolation == "bicubic"


def evaluated(source: str, data: str, out: str, noises: list[str], **keys: Any) -> str:
    """On every rank."""
    options = {name: keys.pop(name) for name in ("kinds", "per_class") if name in keys}
    subject = open_subject(source, data=data, out=Path(out), **keys)
    return evaluate_images(subject, CPU, noises=image_noises(noises), **options)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "throughput"
    }


def test_every_image_counts_once_on_any_number_of_ranks(
    one_rank: Ranks, two_ranks: Ranks, digits: Path, tmp_path: Path
) -> None:
    """397 images in batches of 50: the same files to the last digit, whose numbers are scikit-learn's."""
    source = image_export(tmp_path / "source", vit_config(**GREY))
    where, options = str(digits / "eval"), {"batch_size": 50, "kinds": ["knn", "probe"], "per_class": 20}
    options["train"] = str(digits / "train")
    for ranks, name in ((one_rank, "one"), (two_ranks, "two")):
        arguments = (str(source), where, str(tmp_path / name), ["gaussian_0.2", "salt_pepper_0.05"])
        texts = ranks(called, evaluated, arguments, options)
        assert texts[1:] == [""] * (len(texts) - 1)
        assert "397 images" in texts[0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    found = read_measurements(tmp_path / "one")
    name = digits.name
    tasks = {name, f"{name}+gaussian_0.2", f"{name}+salt_pepper_0.05", f"{name}_knn", f"{name}_probe"}
    assert {each.task for each in found} == tasks
    rows = table(tmp_path / f"one/eval/predictions/{name}.tsv")
    assert [int(row["sample"]) for row in rows] == list(range(397))
    labels = [int(row["label"]) for row in rows]
    subject = open_subject(str(source), data=where)
    logits = predict(subject.net.model, evaluation_of(subject.data, subject.net.card.model, batch_size=397), CPU, "all")
    assert logits.labels.tolist() == labels
    per_class = table(tmp_path / f"one/eval/per_class/{name}.tsv")
    assert sum(int(row["samples"]) for row in per_class) == 397
    clean = {(each.metric, each.depth): each for each in found if each.task == name}
    for depth in range(4):
        said = [int(row[f"depth_{depth:02d}"]) for row in rows]
        one, five = clean["accuracy", depth], clean["top5_accuracy", depth]
        assert one.value == pytest.approx(accuracy_score(labels, said), abs=1e-12)
        assert five.value == pytest.approx(top_k_accuracy_score(labels, logits.outputs[:, depth], k=5), abs=1e-12)
        assert one.interval[0] <= one.value <= one.interval[1]
        shares = sum(int(row["samples"]) * float(row[f"depth_{depth:02d}"]) for row in per_class)
        assert shares / 397 == pytest.approx(one.value, abs=1e-5)
        loss = F.cross_entropy(torch.from_numpy(logits.outputs[:, depth]), torch.tensor(labels)).item()
        assert clean["loss", depth].value == pytest.approx(loss, rel=1e-5)
    speed = json.loads((tmp_path / f"two/eval/throughput/{name}.json").read_text())
    assert speed["ranks"] == 2
    assert speed["samples"] == 397


def called(function: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]) -> Any:
    return function(*arguments, **keywords)


def test_class_folders_are_the_same_images(one_rank: Ranks, digits: Path, tmp_path: Path) -> None:
    """As their shards; some classes may lack where the order of all is given."""
    source = image_export(tmp_path / "source", vit_config(**GREY))
    folder = class_folders(tmp_path / f"in/{digits.name}/val", digits / "eval")
    for data, name in ((folder, "files"), (digits / "eval", "shards")):
        one_rank(called, evaluated, (str(source), str(data), str(tmp_path / name), []), {})
    found = [[each.value for each in read_measurements(tmp_path / name)] for name in ("files", "shards")]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert contents(tmp_path / "files").keys() == contents(tmp_path / "shards").keys(), "both have the name of the data"
    (folder / "3").rename(tmp_path / "3")
    with pytest.raises(UserError, match="has images of 9 of 10 classes; --classes FILE"):
        open_subject(str(source), data=str(folder))
    names = [str(number) for number in range(10)]
    images = open_subject(str(source), data=str(folder), classes=names).images.files
    assert {images.read(0, number)["cls"] for number in range(images.images.size)} == {
        name.encode() for name in names if name != "3"
    }


def test_what_does_not_fit_is_told(digits: Path, photos: Path, tmp_path: Path) -> None:
    from networks import bert

    text = tmp_path / "text"
    text.mkdir()
    write_export(network(bert(num_classes=3)), text, "fp32")
    source = str(image_export(tmp_path / "source", vit_config(**GREY)))
    foreign = tmp_path / "timm"
    convert(
        str(image_export(tmp_path / "colour", vit_config(), classes=[f"kind {n}" for n in range(5)])), "timm", foreign
    )
    own = str(digits / "eval")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(text), {"data": own}, "must be a classifier of images"),
        (source, {}, "has no evaluation data of its own; name some with --data"),
        (source, {"data": str(tmp_path / "nowhere")}, "nowhere/index.json: No such file"),
        (source, {"data": str(tmp_path / "text")}, "no class folders with images"),
        (source, {"data": str(photos)}, "class folder kind 0 is not among the 10 classes"),
        (source, {"data": str(photos), "classes": ["a"]}, "--classes: names 1 classes; the network has 10"),
        (f"timm:{foreign}", {"data": own}, "--out must name a folder"),
    ]
    for place, keys, message in cases:
        with pytest.raises(UserError, match=message) as error:
            open_subject(place, **keys)
        assert "\n" not in str(error.value)
    subject = open_subject(f"timm:{foreign}", data=own, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"model.num_classes = 5: .* has 10 classes"):
        evaluation_of(subject.data, subject.net.card.model, batch_size=4)
    grey = open_subject(source, data=own)
    with pytest.raises(UserError, match="takes images from 32 x 32 pixels on, not of 8 x 8"):
        evaluation_of(grey.data, grey.net.card.model, batch_size=4, noise=image_noise("fog_3"))
