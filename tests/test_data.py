"""Shards, images and text: what is written is what is read, by us and by plain webdataset."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from sklearn.datasets import load_digits

from acn_scale.config import BertConfig, Config, RemoteConfig, TextDataConfig
from acn_scale.data import build_evaluation, build_stream
from acn_scale.data.make_text import make_text_shards, train_source_tokenizer
from acn_scale.data.samples import Key
from acn_scale.data.shards import ShardIndex, ShardReader
from acn_scale.data.storage import open_folder
from acn_scale.data.text import TextDecoder
from acn_scale.data.text_sources import TextSources
from acn_scale.data.tokenizer import MASK, load_tokenizer
from acn_scale.errors import UserError

PYDOC = TextSources(["pydoc"])


def test_plain_webdataset_reads_our_shards(digits: Path) -> None:
    """And the two splits together are scikit-learn's images."""
    samples = []
    for split in ("train", "eval"):
        names = sorted(str(path) for path in (digits / split).glob("*.tar"))
        samples += list(wds.WebDataset(names, shardshuffle=False).decode("l8").to_tuple("png", "cls"))
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * 255 / 16).astype(np.uint8)
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True))
    assert sorted((image.tobytes(), label) for image, label in samples) == expected


@pytest.mark.parametrize("augment", ["crop_flip", "randaugment", "cifar"])
def test_augmentation_is_drawn_from_the_sample_alone(vit: Callable[..., Config], augment: str) -> None:
    """Not from torch's generator, which stays where it is; and anew in each epoch."""
    samples = build_stream(vit(data={"augment": augment, "streams": 1})).samples
    size = samples.num_samples
    torch.manual_seed(0)
    together = samples.__getitems__([3, 4, 5]).batch["images"]
    state = torch.get_rng_state()
    alone = torch.cat([samples.__getitems__([position]).batch["images"] for position in (3, 4, 5)])
    assert torch.equal(together, alone)
    assert torch.equal(torch.get_rng_state(), state)
    key = Key(seed=0, epoch=0, sample=7)
    files = samples.reader.read(0, 7)
    epochs = [samples.decoder.decode(files, 0, Key(0, epoch, 7))[0] for epoch in range(8)]
    assert torch.equal(epochs[0], samples.decoder.decode(files, 0, key)[0])
    assert any(not torch.equal(epochs[0], other) for other in epochs[1:])
    assert size == 1400


def test_evaluation_crops_the_centre_where_training_crops(vit: Callable[..., Config]) -> None:
    cfg = vit(data={"augment": "crop_flip"}, model={"image_size": 4, "patch_size": 2})
    batch, _ = next(iter(build_evaluation(cfg)))
    assert batch["images"].shape == (256, 1, 4, 4)


def test_mixing_keeps_the_labels_in_step(vit: Callable[..., Config]) -> None:
    """Mixup with the same share for pixels and labels; CutMix by area; both inside pairs."""
    plain = next(build_stream(vit(data={"streams": 1}, train={"global_batch_size": 8})))
    for mixing in ({"mixup": 0.8}, {"cutmix": 1.0}):
        batch = next(build_stream(vit(data={"streams": 1} | mixing, train={"global_batch_size": 8})))
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(8))
        images, labels = plain["images"], torch.nn.functional.one_hot(plain["labels"], 10).float()
        for first in range(0, 8, 2):
            one, other = images[first], images[first + 1]
            if "mixup" in mixing:
                share = ((batch["images"][first] - other) * (one - other)).sum() / (one - other).square().sum()
            else:
                kept = (batch["images"][first] == one) | (one == other)
                assert (kept | (batch["images"][first] == other)).all()
                continue
            torch.testing.assert_close(batch["images"][first], share * one + (1 - share) * other)
            torch.testing.assert_close(batch["labels"][first], share * labels[first] + (1 - share) * labels[first + 1])


@pytest.fixture(scope="module")
def pydoc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pydoc")
    train_source_tokenizer(PYDOC, 512, folder, eval_share=0.1, character_coverage=1.0)
    make_text_shards(PYDOC, folder, folder, tokens=32, shard_size=1000)
    return folder


def test_tokenizer(pydoc: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pydoc)
    assert [tokenizer.IdToPiece(piece) for piece in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.Decode(tokenizer.Encode("The yield statement")) == "The yield statement"
    with pytest.raises(UserError, match=r"no such file; tools/train_tokenizer.py"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="--vocab-size 100000: Vocabulary size too high"):
        train_source_tokenizer(PYDOC, 100_000, tmp_path)
    with pytest.raises(UserError, match="--vocab-size 5: must be more than the 5 special pieces"):
        train_source_tokenizer(PYDOC, 5, tmp_path)


def test_masking(pydoc: Path) -> None:
    """15 % of the tokens in each sequence; of these 80 / 10 / 10; never a special piece; drawn from the key alone."""
    model = BertConfig(name="bert", connectivity="acn", vocab_size=512, max_tokens=32, depth=1, dim=8, num_heads=1)
    index = ShardIndex.load(pydoc / "train")
    data = TextDataConfig(kind="text", train=str(pydoc / "train"), eval=str(pydoc / "eval"))
    decoder, reader = (
        TextDecoder(data, model, index),
        ShardReader(open_folder(str(index.folder), index.shards, RemoteConfig())),
    )
    files = reader.read(0, 0)
    original = np.load(io.BytesIO(files["npy"]))[3].astype(np.int64)
    changes = {"mask": 0, "same": 0, "other": 0}
    for epoch in range(2000):
        tokens, masked, labels = decoder.decode(files, 3, Key(0, epoch, 3))
        assert len(set(masked)) == 5
        assert (original[masked] == labels).all()
        assert (labels > MASK).all()
        untouched = np.ones(32, dtype=bool)
        untouched[masked] = False
        assert (tokens[untouched] == original[untouched]).all()
        changes["mask"] += (tokens[masked] == MASK).sum()
        changes["same"] += (tokens[masked] == labels).sum()
    assert changes["mask"] / 10_000 == pytest.approx(0.8, abs=0.02)
    assert changes["same"] / 10_000 == pytest.approx(0.1, abs=0.02)
    again = decoder.decode(files, 3, Key(0, 7, 3))
    assert all((a == b).all() for a, b in zip(again, decoder.decode(files, 3, Key(0, 7, 3)), strict=True))


def test_text_that_does_not_fit_the_model(pydoc: Path) -> None:
    model = {"name": "bert", "connectivity": "acn", "vocab_size": 512, "max_tokens": 32, "depth": 1, "dim": 8}
    data = TextDataConfig(kind="text", train=str(pydoc / "train"), eval=str(pydoc / "eval"))
    for key, value in (("vocab_size", 511), ("max_tokens", 31)):
        with pytest.raises(UserError, match=f"^model.{key} = {value}: "):
            TextDecoder(data, BertConfig(**model | {key: value}, num_heads=1), ShardIndex.load(pydoc / "train"))


def test_whole_words(pydoc: Path) -> None:
    """Words are chosen with all their pieces, but for the last one of a sequence; how many pieces stays the same."""
    model = BertConfig(name="bert", connectivity="acn", vocab_size=512, max_tokens=32, depth=1, dim=8, num_heads=1)
    index = ShardIndex.load(pydoc / "train")
    data = TextDataConfig(kind="text", train=str(pydoc / "train"), eval=str(pydoc / "eval"), whole_words=True)
    decoder = TextDecoder(data, model, index)
    reader = ShardReader(open_folder(str(index.folder), index.shards, RemoteConfig()))
    files = reader.read(0, 0)
    original = np.load(io.BytesIO(files["npy"]))[3].astype(np.int64)
    tokenizer = load_tokenizer(pydoc)
    starts = [piece <= MASK or tokenizer.IdToPiece(int(piece)).startswith("\u2581") for piece in original]
    words = np.cumsum(starts)
    in_part = []
    for epoch in range(300):
        _, masked, labels = decoder.decode(files, 3, Key(0, epoch, 3))
        assert (original[masked] == labels).all()
        assert len(masked) == 5
        inside = (original > MASK) & np.isin(words, words[masked])
        in_part.append(len(set(words[np.setdiff1d(np.flatnonzero(inside), masked)])))
    assert max(in_part) == 1
    assert len({tuple(decoder.decode(files, 3, Key(0, epoch, 3))[1]) for epoch in range(50)}) > 10
