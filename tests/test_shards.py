"""Shards as they are and as they should not be: what is read, what is refused, what is replaced."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset as wds
from made import image_folder, numbered_images, numbers_in, png, reseal, shard_of
from ranks import Ranks

from acn_scale import distributed
from acn_scale.config import Config, RemoteConfig
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.shards import ShardIndex, ShardReader
from acn_scale.data.storage import open_folder
from acn_scale.data.stream import Stream
from acn_scale.data.tar import Table
from acn_scale.errors import BadData, UserError


def test_we_read_shards_of_plain_webdataset(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "shard-000000.tar")) as tar:
        for number in range(5):
            tar.write({"__key__": f"some/folder/{number}", "txt": f"number {number}", "cls": number})
    reader = ShardReader(open_folder(str(tmp_path), [shard_of(tmp_path / "shard-000000.tar", 5)], RemoteConfig()))
    assert reader.read(0, 3) == {"txt": b"number 3", "cls": b"3"}
    assert reader.key(0, 3) == "some/folder/3"


ENTRY = '{"shards": [{"name": "%s", "samples": %s, "bytes": 1, "sha256": "%s"}], "info": {}}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not an index of shards"),
        ("[]", "not an index of shards"),
        ('{"shards": [], "info": {}}', "lists no samples"),
        ('{"shards": [{"name": "a.tar"}], "info": {}}', "not an index of shards"),
        (ENTRY % ("../a.tar", 1, "0" * 64), "not that of a file in the folder"),
        (ENTRY % ("a.tar", 1, "../../a"), "is not 64 hexadecimal digits"),
        (ENTRY % ("a.tar", 1.5, "0" * 64), "whole numbers"),
        (ENTRY % ("a.tar", -1, "0" * 64), "whole numbers"),
    ],
)
def test_bad_indexes(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        ShardIndex.load(tmp_path)


@pytest.mark.parametrize("name", ["pipe:touch {}", "pipe:cat {}", "file://{}", "ftp://host/{}", "memory://{}"])
def test_no_location_starts_a_command(vit: Callable[..., Config], tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    with pytest.raises(UserError, match="neither a folder nor a URL of s3://"):
        build_stream(vit(data={"train": name.format(victim)}))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("image", "label", "expected"),
    [
        (png(9, 8), "1", "an image of 8 x 9 pixels: model.image_size = 8"),
        (b"", "1", "an image that cannot be decoded"),
        (png()[:40], "1", "an image that cannot be decoded"),
        (png()[:-20] + b"nonsense" * 3, "1", "an image that cannot be decoded"),
        (png(), "10", "label b'10': must be a class 0 to 9"),
        (png(), "-1", "label b'-1': must be a class 0 to 9"),
        (png(), "", "label b'': must be a class 0 to 9"),
    ],
)
def test_bad_samples_name_their_shard_and_key(
    vit: Callable[..., Config], tmp_path: Path, image: bytes, label: str, expected: str
) -> None:
    folder = image_folder(tmp_path / "bad", [[(png(), "1")] * 3 + [(image, label)]])
    for workers in (0, 2):
        with pytest.raises(UserError, match=expected) as raised:
            take(build_stream(vit(data={"train": str(folder), "workers": workers})), 4)
        assert str(raised.value).startswith(f"{folder}/shard-000000.tar: sample 3 (key 000003): ")
        assert "\n" not in str(raised.value)


def take(stream: Stream, batches: int) -> list[dict[str, torch.Tensor]]:
    with contextlib.closing(stream):
        return [next(stream) for _ in range(batches)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("shard-000000.tar").read_bytes())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "3000 bytes, where the index lists"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes, where the index lists"),
    "gone": (Path.unlink, "which is not there"),
    "a bit flipped": (flip_a_bit, "wrong checksum"),
    "another shard's bytes": (swap, "wrong checksum"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "where the index lists|Is a directory"),
}
RESEALED: dict[str, tuple[Callable[[Path], object], str]] = {  # as if made so: sizes and checksums are those listed
    "cut": (cut, "fewer than its index says|the shard is cut"),
    "no tar": (lambda path: path.write_bytes(b"nonsense" * 1000), "not a readable tar"),
    "zeros": (lambda path: path.write_bytes(bytes(10240)), "holds 0 records, fewer than its index says"),
}


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, damage: Callable[[Path], object], *, resealed: bool = False) -> Path:
        folder = numbered_images(tmp_path / name, [20] * 5)
        damage(folder / "shard-000002.tar")
        if resealed:
            reseal(folder)
        return folder

    return make


CASES = [(damage, False) for damage in DAMAGE] + [(damage, True) for damage in RESEALED]


@pytest.mark.parametrize(("kind", "resealed"), CASES)
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shards(
    vit: Callable[..., Config], damaged: Callable[..., Path], kind: str, resealed: bool, workers: int
) -> None:
    """One line where the run fails; where it skips, the good samples come as ever and others stand in for the bad."""
    damage, expected = (RESEALED if resealed else DAMAGE)[kind]
    folder = damaged("bad", damage, resealed=resealed)
    data = {"train": str(folder), "streams": 1, "shuffle_window": 40, "workers": workers}
    with pytest.raises(UserError, match=expected) as raised:
        take(build_stream(vit(data=data)), 7)
    assert "shard-000002.tar" in str(raised.value)
    assert "\n" not in str(raised.value)

    good = numbers(take(build_stream(vit(data=data | {"train": str(damaged("good", lambda path: None))})), 25))
    skipping = build_stream(vit(data=data | {"on_bad_sample": "skip"}))
    got = numbers(take(skipping, 25))  # 400 samples: four epochs
    bad = {sample for sample in good if 40 <= sample < 60} & (set(good) - set(got))
    assert [sample for sample in got if sample not in bad] == got
    assert all(got[place] == sample for place, sample in enumerate(good) if sample not in bad)
    assert skipping.bad.known == bad
    assert bad == set(range(40, 60)) if kind != "cut" or not resealed else len(bad) > 15


def numbers(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [number for batch in batches for number in numbers_in(batch["images"])]


def test_a_shard_that_is_cut_while_it_is_read(vit: Callable[..., Config], damaged: Callable[..., Path]) -> None:
    folder = damaged("cut", lambda path: None)
    data = {"train": str(folder), "streams": 1, "on_bad_sample": "skip"}
    stream = build_stream(vit(data=data))
    take(stream, 6)
    cut(folder / "shard-000002.tar")
    take(stream, 12)
    assert 15 < len(stream.bad.known) <= 20


def test_a_shard_that_goes_while_others_are_read(vit: Callable[..., Config], damaged: Callable[..., Path]) -> None:
    folder = damaged("gone", lambda path: None)
    stream = build_stream(vit(data={"train": str(folder), "streams": 1, "shuffle_window": 1}))
    shard, _ = stream.samples.order.locate(0, 99)
    (folder / f"shard-{shard:06d}.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00000\d.tar: sample \d+: cannot be read: No such file"):
        take(stream, 7)


def test_more_bad_samples_than_may_be_skipped(vit: Callable[..., Config], damaged: Callable[..., Path]) -> None:
    """The same sample counts once, however often it is met, and a resumed run goes on counting."""
    folder = damaged("gone", Path.unlink)
    data = {"train": str(folder), "streams": 1, "on_bad_sample": "skip"}
    enough = build_stream(vit(data=data | {"max_bad_samples": 20}))
    take(enough, 50)
    state = enough.state_dict()
    assert state["bad_samples"] == list(range(40, 60))
    with pytest.raises(UserError, match=r"data.max_bad_samples = 19: more cannot be read; .*shard-000002.tar: sample "):
        take(build_stream(vit(data=data | {"max_bad_samples": 19})), 50)
    resumed = build_stream(vit(data=data | {"max_bad_samples": 20}))
    resumed.load_state_dict(state)
    take(resumed, 10)
    assert len(resumed.bad.known) == 20


def test_nothing_can_be_read(vit: Callable[..., Config], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "bad", [[(b"", "1")] * 30])
    with pytest.raises(UserError, match="64 others in its place cannot be read either: "):
        next(build_stream(vit(data={"train": str(folder), "on_bad_sample": "skip"})))


def test_evaluation_leaves_bad_samples_out(vit: Callable[..., Config], damaged: Callable[..., Path]) -> None:
    folder = damaged("gone", Path.unlink)
    data = {"eval": str(folder), "train": str(folder), "on_bad_sample": "skip"}
    evaluation = build_evaluation(vit(data=data, eval={"batch_size": 16}))
    batches = list(evaluation)
    kept = [sample for batch, counts in batches for sample in numbers([{"images": batch["images"][counts]}])]
    assert kept == [*range(40), *range(60, 100)]
    assert evaluation.bad.known == set(range(40, 60))
    with pytest.raises(UserError, match=r"lists shard-000002.tar, which is not there"):
        build_evaluation(vit(data=data | {"on_bad_sample": "fail"}))


def on_one_rank_alone(cfg: Config, folder: str) -> tuple[str, list[int]]:
    """Rank 1 reads a damaged copy, as where one node's disk is broken. What both ranks end with."""
    rank = distributed.rank()
    if rank == 1:
        cfg = Config.model_validate(cfg.model_dump() | {"data": cfg.data.model_dump() | {"train": folder}})
    try:
        with distributed.together():
            stream = build_stream(cfg, rank, 2, distributed.union)
        take(stream, 10)
    except UserError as error:
        return str(error), []
    return "", sorted(stream.bad.known)


def test_what_one_rank_cannot_read_all_hear_of(
    vit: Callable[..., Config], damaged: Callable[..., Path], two_ranks: Ranks
) -> None:
    good = damaged("good", lambda path: None)
    broken = damaged("broken", flip_a_bit)
    cfg = vit(data={"train": str(good), "streams": 4})
    (first, _), (second, _) = two_ranks(on_one_rank_alone, cfg, str(broken))
    assert first == second
    assert "broken/shard-000002.tar: sample" in first
    shutil.rmtree(broken)  # found out before the first batch, on one rank only
    answers = two_ranks(on_one_rank_alone, cfg, str(broken))
    assert answers[0] == answers[1]
    assert "No such file" in answers[0][0]


def test_what_one_rank_skips_all_count(
    vit: Callable[..., Config], damaged: Callable[..., Path], two_ranks: Ranks
) -> None:
    cfg = vit(data={"train": str(damaged("good", lambda path: None)), "streams": 4, "on_bad_sample": "skip"})
    (_, first), (_, second) = two_ranks(on_one_rank_alone, cfg, str(damaged("broken", Path.unlink)))
    assert first == second
    assert first
    assert set(first) <= set(range(40, 60))


def test_a_file_that_is_cut_is_not_handed_out(tmp_path: Path) -> None:
    """Whatever reads it might take a part for the whole."""
    path = numbered_images(tmp_path / "data", [2]) / "shard-000000.tar"
    table = Table(path)
    start, size = table.places[1][table.extensions.index("png")]
    path.write_bytes(path.read_bytes()[: start + size - 1])
    cut = Table(path)
    assert cut.read(0) == table.read(0)
    with pytest.raises(BadData, match=rf"the shard is cut: .png has {size - 1} of {size} bytes"):
        cut.read(1)
