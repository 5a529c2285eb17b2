"""Shards of images: what comes in is what is written, whoever writes it and however often it is killed."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from made import hashes, png, record_of, run_killed
from PIL import Image

from acn_scale.config import Config
from acn_scale.data import build_stream, tar
from acn_scale.data.classes import read_classes
from acn_scale.data.decode import Picture
from acn_scale.data.image_sources import open_images
from acn_scale.data.make import Making
from acn_scale.data.make_images import describe_images, index_shards, make_image_shards
from acn_scale.data.raw_images import ImageSource
from acn_scale.data.selection import select
from acn_scale.errors import UserError

CLASSES = ["ant", "bee", "cat"]
Sample = tuple[bytes, int]


def picture(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12 + number % 5, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures() -> list[Sample]:
    return [(picture(number, "PNG" if number % 7 == 0 else "JPEG"), number % 3) for number in range(40)]


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory, pictures: list[Sample]) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number, (content, label) in enumerate(pictures):
        folder = root / "train" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.{'png' if number % 7 == 0 else 'JPEG'}").write_bytes(content)
    (root / "val" / "cat").mkdir(parents=True)
    (root / "val" / "cat" / "one.jpg").write_bytes(pictures[1][0])
    return root


def written(folder: Path) -> list[Sample]:
    """As plain webdataset reads it."""
    names = sorted(str(path) for path in folder.glob("*.tar"))
    samples = wds.WebDataset(names, shardshuffle=False, empty_check=False)
    return [(next(sample[name] for name in ("jpg", "png") if name in sample), int(sample["cls"])) for sample in samples]


def test_folders_of_classes(class_folders: Path, pictures: list[Sample], tmp_path: Path) -> None:
    """Bytes are kept; classes are numbered as torchvision numbers them, for both splits as for training."""
    index = make_image_shards(f"folder:{class_folders}", "train", tmp_path / "train", shard_size=16, workers=2)
    assert [shard.samples for shard in index.shards] == [16, 16, 8]
    assert sorted(written(tmp_path / "train")) == sorted(pictures)
    labels = [label for _, label in written(tmp_path / "train")]
    assert labels != sorted(labels), "each shard has images of all classes"
    assert index.info["classes"] == CLASSES
    make_image_shards(f"folder:{class_folders}", "eval", tmp_path / "eval")
    assert written(tmp_path / "eval") == [(pictures[1][0], 2)]
    pixels = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / 255 for content, _ in pictures]
    np.testing.assert_allclose(index.info["mean"], np.mean([image.mean((0, 1)) for image in pixels], 0))
    squares = np.mean([np.square(image).mean((0, 1)) for image in pixels], 0)
    np.testing.assert_allclose(index.info["std"], np.sqrt(squares - np.square(index.info["mean"])))


def _parquet_by_hand(folder: Path, pictures: list[Sample]) -> str:
    for part in range(2):
        rows = pictures[part * 20 : part * 20 + 20]
        columns = {"image": [content for content, _ in rows], "label": [CLASSES[label] for _, label in rows]}
        pq.write_table(pa.table(columns), folder / f"part-{part}.parquet", row_group_size=7)
    return f"parquet:{folder}/part-{{0..1}}.parquet"


def _hugging_face(folder: Path, pictures: list[Sample]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {
        "image": [{"bytes": content, "path": None} for content, _ in pictures],
        "label": [label for _, label in pictures],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


def _webdataset(folder: Path, pictures: list[Sample]) -> str:
    with wds.ShardWriter(f"{folder}/in-%06d.tar", maxcount=15, verbose=0) as writer:
        for number, (content, label) in enumerate(pictures):
            extension = "png" if number % 7 == 0 else "jpg"
            writer.write({"__key__": f"sample{number}", extension: content, "cls": str(label)})
    return f"wds:{folder}/in-*.tar"


@pytest.mark.parametrize("kind", ["parquet", "parquet of datasets", "wds", "hf", "hf streaming"])
def test_other_sources_of_images(kind: str, pictures: list[Sample], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "parquet":
        source = _parquet_by_hand(folder, pictures)
    elif kind == "wds":
        source = _webdataset(folder, pictures)
    else:
        _hugging_face(folder, pictures)
        source = f"parquet:{folder}/train.parquet" if kind.startswith("parquet") else f"hf:{folder}"
    streaming = kind == "hf streaming"
    index = make_image_shards(source, "train", tmp_path / "out", shard_size=9, workers=2, streaming=streaming)
    assert written(tmp_path / "out") == pictures
    assert index.info["classes"] == (["0", "1", "2"] if kind == "wds" else CLASSES)


@pytest.mark.parametrize("kind", ["folder", "parquet", "wds", "hf", "digits"])
def test_some_images_of_a_source(
    kind: str, pictures: list[Sample], class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the numbers asked for; all labels without the images. A file or row group is read once for all in it."""
    writers = {"parquet": _parquet_by_hand, "wds": _webdataset, "hf": _hugging_face}
    source = writers[kind](tmp_path, pictures) if kind in writers else kind
    source = open_images({"folder": f"folder:{class_folders}", "hf": f"hf:{tmp_path}"}.get(kind, source), "train")
    images = [*source.read(0, None)]
    assert source.labels == [image.label for image in images]
    read: list[tuple[int, Any]] = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, group, columns: (
        read.append((group, columns)) or whole(file, group, columns=columns)
    ))  # fmt: skip
    monkeypatch.setattr(tar, "_scan", lambda file, scan=tar._scan: read.append((0, None)) or scan(file))
    chosen = [0, 1, 3, 5, 6, 7, 38, 39]
    assert [*source.pick(chosen)] == [images[index] for index in chosen]
    assert len(read) == {"parquet": 3, "wds": 2}.get(kind, 0)
    read.clear()
    assert source.labels and all(columns in (None, ["label"]) for _, columns in read)


def test_a_tar_that_is_cut(tmp_path: Path) -> None:
    with wds.TarWriter(f"{tmp_path}/in.tar") as writer:
        for number in range(2):
            writer.write({"__key__": f"{number}", "cls": "0", "jpg": picture(number)})
    content = (tmp_path / "in.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "in.tar").write_bytes(content[:-99])
    index = make_image_shards(f"wds:{tmp_path}/in.tar", "train", tmp_path / "out")
    assert index.num_samples == 1
    assert index.info["left_out"][0].startswith("1: the shard is cut: .jpg has ")


def _cifar(folder: Path) -> tuple[np.ndarray, list[int]]:
    folder.mkdir()
    random = np.random.default_rng(0)
    data, labels = random.integers(0, 256, (50, 3072), dtype=np.uint8), random.integers(0, 3, 50).tolist()
    for part in range(5):
        rows = slice(part * 10, part * 10 + 10)
        values = {b"data": data[rows], b"labels": labels[rows]}
        (folder / f"data_batch_{part + 1}").write_bytes(pickle.dumps(values, protocol=2))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": data[:3], b"labels": labels[:3]}, protocol=2))
    names = {b"label_names": [name.encode() for name in CLASSES]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def test_cifar(tmp_path: Path) -> None:
    pixels, labels = _cifar(tmp_path / "cifar-10-batches-py")
    index = make_image_shards(f"cifar:{tmp_path}", "train", tmp_path / "out", shard_size=20)
    assert index.info["classes"] == CLASSES
    for (content, label), image, expected in zip(written(tmp_path / "out"), pixels, labels, strict=True):
        assert label == expected
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), image)
    assert make_image_shards(f"cifar:{tmp_path}", "eval", tmp_path / "eval").num_samples == 3


class _Harm:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (Path("harm"),)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": _Harm()}))
    with pytest.raises(UserError, match=r"data_batch_3: not a file of CIFAR's python version: asks for pathlib"):
        make_image_shards(f"cifar:{tmp_path}", "train", tmp_path / "out")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()


def test_any_number_of_workers_writes_the_same(class_folders: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        make_image_shards(f"folder:{class_folders}", "train", tmp_path / str(workers), shard_size=7, workers=workers)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


def test_tars_of_others_name_their_images(tmp_path: Path, vit: Callable[..., Config]) -> None:
    """Capital letters are as small ones; what training does not read is listed, and alone it is refused."""
    (tmp_path / "mixed").mkdir()
    (tmp_path / "strange").mkdir()
    names = [("mixed", "JPG", "JPEG"), ("mixed", "tif", "TIFF"), ("mixed", "PNG", "PNG"), ("strange", "bmp", "BMP")]
    for number, (folder, extension, kind) in enumerate(names):
        with tarfile.open(tmp_path / folder / "in.tar", "a") as tar:
            for name, content in ((extension, picture(number, kind)), ("cls", b"0")):
                member = tarfile.TarInfo(os.fsdecode(b"%d\xe9.%s" % (number, name.encode())))  # a Latin-1 name
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index = index_shards(tmp_path / "mixed")
    (unreadable,) = index.info["unreadable"]
    assert unreadable.startswith("in.tar: 1\ufffd.tif: no file that ends in one of jpg, png, jpeg, webp")
    pixels = [np.asarray(Image.open(io.BytesIO(picture(n, kind)))) / 255 for n, kind in ((0, "JPEG"), (2, "PNG"))]
    assert index.info["mean"] == pytest.approx(np.mean([image.mean((0, 1)) for image in pixels], 0))
    data = {"train": str(tmp_path / "mixed"), "eval": str(tmp_path / "mixed"), "on_bad_sample": "skip"}
    cfg = vit(data=data | {"augment": "crop_flip"}, model={"channels": 3}, train={"global_batch_size": 2})
    assert len(next(build_stream(cfg))["images"]) == 2
    with pytest.raises(UserError, match=r"strange: none of its 1 images can be read: .*in.tar: 3.\.bmp: "):
        index_shards(tmp_path / "strange")
    assert not (tmp_path / "strange" / "index.json").exists()


def test_what_is_no_image_is_left_out_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for number, content in enumerate([picture(0), b"", picture(1)[:30], b"GIF87a", picture(2, "BMP")]):
        (folder / f"{number}.jpg").write_bytes(content)
    (folder / "5.jpg").symlink_to(tmp_path / "gone")
    (folder / os.fsdecode(b"6-\xe9.jpg")).symlink_to(tmp_path / "gone")  # a Latin-1 name
    index = make_image_shards(f"folder:{tmp_path}/in", "train", tmp_path / "out", shard_size=2)
    assert index.num_samples == 2
    left_out = sorted(index.info["left_out"])
    assert [line[:8] for line in left_out] == ["a/1.jpg:", "a/2.jpg:", "a/3.jpg:", "a/5.jpg:", "a/6-\\xe9"]
    assert left_out[3] == "a/5.jpg: cannot be read: No such file or directory"
    assert {content[:4] for content, _ in written(tmp_path / "out")} == {picture(0)[:4], b"\x89PNG"}


@pytest.mark.parametrize("resize", [None, 4])
def test_16_bits_become_8(resize: int | None, tmp_path: Path) -> None:
    """A value / 257, in the shards and their mean as when they are decoded; what has more bits is left out."""
    values = np.random.default_rng(0).integers(0, 2**16, (6, 6), dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    (tmp_path / "in" / "a").mkdir(parents=True)
    for kind, pixels in (("png", values), ("pgm", values), ("tif", values), ("wide.tif", values.astype(np.int32) * 3),
                         ("real.tif", values.astype(np.float32))):  # fmt: skip
        Image.fromarray(pixels).save(tmp_path / "in" / "a" / f"x.{kind}")
    index = make_image_shards(f"folder:{tmp_path}/in", "train", tmp_path / "out", resize=resize)
    left_out = sorted(index.info["left_out"])
    assert left_out == ["a/x.real.tif: pixels that are fractions", "a/x.wide.tif: pixels that are not in 0..65535"]
    decoded = [Picture(content, "L").pixels()[0].numpy() for content, _ in written(tmp_path / "out")]
    assert len(decoded) == 3
    assert all(np.array_equal(image, expected if resize is None else decoded[0]) for image in decoded)
    assert index.info["mean"] == pytest.approx([np.mean(decoded) / 255])


def test_resizing_keeps_what_is_small(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "small.png").write_bytes(png(7, 5))
    (tmp_path / "in" / "a" / "large.png").write_bytes(png(40, 20))
    make_image_shards(f"folder:{tmp_path}/in", "train", tmp_path / "out", resize=10)
    sizes = {Image.open(io.BytesIO(content)).size for content, _ in written(tmp_path / "out")}
    assert sizes == {(7, 5), (20, 10)}
    assert png(7, 5) in [content for content, _ in written(tmp_path / "out")]
    (tmp_path / "in" / "a" / "fits.png").write_bytes(png(10, 10))
    make_image_shards(f"folder:{tmp_path}/in", "train", tmp_path / "square", resize=10, square=True)
    images = [content for content, _ in written(tmp_path / "square")]
    assert len(images) == 3 and {Image.open(io.BytesIO(content)).size for content in images} == {(10, 10)}
    assert png(10, 10) in images


def test_classes_in_another_order(class_folders: Path, pictures: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("zebra\ncat, Felis\nbee\nant\n".replace(",", ""))
    (tmp_path / "keras.json").write_text(json.dumps({"0": ["zebra", "Z"], "1": ["cat", "C"], "2": ["bee", "B"]}))
    assert read_classes(tmp_path / "keras.json") == ["zebra", "cat", "bee"]
    classes = read_classes(tmp_path / "names.txt")
    images = open_images(f"folder:{class_folders}", "train", classes=classes)
    mapped = sorted((content, {0: 3, 1: 2, 2: 1}[label]) for content, label in pictures)
    assert sorted((raw.content, raw.label) for raw in images.read(0, None or images.size)) == mapped
    with pytest.raises(UserError, match="class folder ant is not among the 3 classes"):
        open_images(f"folder:{class_folders}", "train", classes=["zebra", "cat", "bee"])


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_makers_go_on_where_they_stopped(workers: int, class_folders: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", f"folder:{class_folders}"
    arguments = ["tools/make_image_shards.py", "--source", source, "--split", "train", "--shard-size", "1"]
    run_killed([*arguments, "--workers", str(workers), "--out", str(out)], out, seen=5)
    assert not (out / "index.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if record_of(out, path).exists()}
    assert all(
        json.loads(record_of(out, path).read_text())["shard"]["bytes"] == path.stat().st_size for path in finished
    )
    damaged = min(finished)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    make_image_shards(source, "train", out, shard_size=1, workers=workers)
    make_image_shards(source, "train", tmp_path / "whole", shard_size=1)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert damaged.read_bytes() == (tmp_path / "whole" / damaged.name).read_bytes()
    assert len(finished) > 1
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items() if path != damaged)
    (out / ".making").mkdir()  # as a kill just before the end would leave it
    make_image_shards(source, "train", out, shard_size=1)
    assert {path.name for path in out.iterdir() if path.suffix != ".tar"} == {"index.json"}


def test_another_plan_or_process_keeps_out(class_folders: Path, tmp_path: Path) -> None:
    make_image_shards(f"folder:{class_folders}", "train", tmp_path / "out", shard_size=7)
    before = hashes(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds other shards \(shard_size = 7, now 8\)"):
        make_image_shards(f"folder:{class_folders}", "train", tmp_path / "out", shard_size=8)
    assert hashes(tmp_path / "out") == before
    with Making(tmp_path / "new", {"a": 1}), pytest.raises(UserError, match="another process is writing there"):
        Making(tmp_path / "new", {"a": 1}).__enter__()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds tar files already"):
        Making(tmp_path / "full", {}).__enter__()


def test_tars_of_others_get_an_index(pictures: list[Sample], tmp_path: Path, vit: Callable[..., Config]) -> None:
    """And can be trained on as they are."""
    _webdataset(tmp_path, pictures)
    index = index_shards(tmp_path, workers=2)
    assert [shard.samples for shard in index.shards] == [15, 15, 10]
    data = {"train": str(tmp_path), "eval": str(tmp_path), "augment": "crop_flip"}
    stream = build_stream(vit(data=data, model={"channels": 3}, train={"global_batch_size": 40}))
    assert sorted(next(stream)["labels"].tolist()) == sorted(label for _, label in pictures)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing:x", "must start with one of folder:, cifar:"),
        ("folder:/nowhere", "no such folder"),
        ("parquet:/nowhere/*.parquet", "no such file"),
        ("wds:/nowhere/x.tar", "no such file"),
        ("wds:/nowhere/{0..3.tar", "each { must have its }"),
        ("cifar:/nowhere", "holds neither data_batch_1"),
        ("hf:/nowhere/set", "hf:/nowhere/set: "),
    ],
)
def test_sources_of_images_that_are_none(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_image_shards(source, "train", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(class_folders: Path, tmp_path: Path) -> None:
    said = describe_images(f"folder:{class_folders}", "train", shard_size=16, classes=None, streaming=False)
    assert "40 images" in said
    assert "3 classes: ant, bee, cat" in said
    assert "3 shards" in said


def test_classes_that_are_skipped(tmp_path: Path) -> None:
    """Two halves are the whole, each with numbers of its own from 0."""
    whole, first, rest = (
        make_image_shards("digits", "eval", tmp_path / name, **keys)
        for name, keys in (("whole", {}), ("first", {"first_classes": 4}), ("rest", {"skip_classes": 4}))
    )
    assert first.num_samples + rest.num_samples == whole.num_samples
    assert (first.info["classes"], rest.info["classes"]) == (list("0123"), list("456789"))
    source = open_images("digits", "eval")

    def pictures(images: ImageSource, first: int = 0) -> list[tuple[bytes, int]]:
        return [(image.content, image.label + first) for image in images.read(0, None)]

    below = select(source, first_classes=4, per_class=None)
    above = select(source, first_classes=None, per_class=None, skip_classes=4)
    assert sorted(pictures(below) + pictures(above, first=4)) == sorted(pictures(source))
    with pytest.raises(UserError, match="--skip-classes 10: must be less than the 10 classes"):
        make_image_shards("digits", "eval", tmp_path / "none", skip_classes=10)
    with pytest.raises(UserError, match="--first-classes 7: must be 6 at most"):
        make_image_shards("digits", "eval", tmp_path / "none", skip_classes=4, first_classes=7)
    assert not (tmp_path / "none").exists()
