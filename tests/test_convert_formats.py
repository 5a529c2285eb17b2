"""What others load computes what ours computes, and what they made comes back bit for bit."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import bert, complaint, described, mixer, network, same, vit
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import randomize
from test_pretrain import run
from torch import Tensor

from acn_scale.config import BertConfig, Config, MixerConfig, ModelConfig
from acn_scale.convert import convert, read_model
from acn_scale.convert.export import write_export
from acn_scale.convert.hugging_face import write_hugging_face
from acn_scale.convert.network import Images, Network
from acn_scale.convert.start import start_from
from acn_scale.data.encoders import read_tokenizer
from acn_scale.data.images import ImageDecoder
from acn_scale.data.samples import Key
from acn_scale.data.shards import ShardIndex
from acn_scale.data.tokenizer import load_tokenizer, train_tokenizer
from acn_scale.models import build_model
from acn_scale.runs import run_folder


def inputs_of(net: Network, batch: int = 3, segments: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    """A batch, texts with so many segments, and our logits: at every position where there is no class."""
    model = net.card.model
    if not isinstance(model, BertConfig):
        images = torch.randn(batch, model.channels, model.image_size, model.image_size)
        return {"pixel_values": images}, net.model(images)["logits"]
    tokens, parts = torch.randint(5, model.vocab_size, (batch, 7)), torch.randint(segments, (batch, 7))
    mask = torch.arange(7) < torch.tensor([[7], [5], [6], [7], [1]])[:batch]
    places = None if model.num_classes else torch.arange(7).expand(batch, -1)
    logits = net.model(tokens, places, segments=parts, mask=mask)["logits"]
    return {"input_ids": tokens, "token_type_ids": parts, "attention_mask": mask.long()}, logits


def auto_class(model: ModelConfig) -> str:
    text = "SequenceClassification" if model.num_classes else "MaskedLM"
    return f"AutoModelFor{text if isinstance(model, BertConfig) else 'ImageClassification'}"


PLAIN = [vit(), vit(channels=1, dim=24), bert(), bert(num_classes=3)]

CUSTOM = [
    vit(connectivity="acn", positions="sincos", pool="mean"),
    vit(connectivity="dense", attention_norm=True, mlp_bypass=True),
    mixer(),
    mixer(connectivity="acn", wrapper=True, pool="cls"),
    bert(connectivity="acn"),
    bert(connectivity="acn", num_classes=3),
    bert(connectivity="h_acn", norm="pre"),
    vit(connectivity="hyper", drop_path=0.1),
]


@pytest.mark.parametrize("model", PLAIN + CUSTOM, ids=described)
def test_transformers(exported: Callable[..., Path], model: ModelConfig) -> None:
    """The Auto class gives our logits; the plain ones come back bit for bit."""
    import transformers

    net = network(model)
    plain = model in PLAIN
    folder = exported(net, "hf")
    theirs = getattr(transformers, auto_class(model)).from_pretrained(folder, trust_remote_code=not plain).eval()
    inputs, expected = inputs_of(net)
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=0, atol=1e-5)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=not plain).eval()
    assert base(**inputs).last_hidden_state.shape[::2] == (3, model.dim)
    assert (type(theirs).__module__.startswith("transformers.models.")) == plain
    card = (folder / "README.md").read_text()
    assert "| 3 (this network) | 60.0 |" in card
    assert ("trust_remote_code" in card) == (not plain)
    if plain:
        assert same(read_model(f"hf:{folder}"), net)
        theirs.save_pretrained(folder)  # as others would write it
        assert same(read_model(f"hf:{folder}"), net)


@pytest.mark.parametrize("model", [bert(num_classes=1), bert(connectivity="acn", num_classes=1)], ids=described)
def test_one_label_is_a_number(exported: Callable[..., Path], model: ModelConfig) -> None:
    """Whose loss is the square of the error, with Transformers' own code as with ours."""
    import transformers

    net = network(model)
    folder = exported(net, "hf")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    inputs, expected = inputs_of(net)
    labels = torch.tensor([0.5, 2.25, 5.0])
    loss = theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, (expected.squeeze(-1) - labels).square().mean(), rtol=0, atol=1e-5)


LIKE_BERT = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
LIKE_BERT |= {"intermediate_size": 64, "max_position_embeddings": 7}


@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_without_a_head(tmp_path: Path, pooler: bool) -> None:
    """A classifier that starts from it computes its tokens and its pooled one; the files are several, with an index."""
    import transformers

    theirs = transformers.BertModel(transformers.BertConfig(**LIKE_BERT), add_pooling_layer=pooler).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    source = f"hf:{tmp_path / 'hf'}"
    net = network(bert(num_classes=3))
    model, (inputs, _) = net.model, inputs_of(net)
    kept = ["head.linear.bias", "head.linear.weight", *([] if pooler else ["head.pooler.bias", "head.pooler.weight"])]
    assert start_from(model, source) == kept
    expected = theirs(**inputs)
    tokens = model.trunk(model.embed(inputs["input_ids"], inputs["token_type_ids"]), inputs["attention_mask"].bool())
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)
    if pooler:
        got = model.head.pooler(tokens[:, 0]).tanh()
        torch.testing.assert_close(got, expected.pooler_output, rtol=0, atol=1e-5)
    assert {"head.dense.weight", "head.norm.weight"} < set(start_from(build_model(bert()), source))
    assert "an encoder without a head: only train.init_from" in complaint(source, tmp_path / "out")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    for harm in ({}, [], {"weight_map": {"x": 1}}, {"weight_map": {"x": "../model.safetensors"}}):
        index.write_text(json.dumps(harm))
        assert "index.json: " in complaint(source, tmp_path / "out")


def test_the_pooler_beside_a_language_head(tmp_path: Path) -> None:
    """A classifier takes it; a masked language model, and what is made of one, leaves it out."""
    import transformers

    theirs = transformers.BertForPreTraining(transformers.BertConfig(**LIKE_BERT)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    source = f"hf:{tmp_path / 'hf'}"
    model = build_model(bert(num_classes=3))
    assert set(start_from(model, source)) == {"head.linear.bias", "head.linear.weight"}
    assert torch.equal(model.head.pooler.weight, theirs.bert.pooler.dense.weight)
    assert start_from(build_model(bert()), source) == []
    assert read_model(source).card.model.num_classes == 0


WITHOUT_US = """
import importlib.util, pathlib, sys
sys.path[:] = [path for path in sys.path if path and not (pathlib.Path(path) / "acn_scale").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
assert importlib.util.find_spec("acn_scale") is None
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
batch = torch.load("batch.pt")
model = AutoModelForMaskedLM.from_pretrained(".", trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**batch["inputs"]).logits, batch["expected"], rtol=0, atol=1e-5)
assert model.network.head.decoder.weight is model.network.embed.token.weight
options = {"num_labels": 4, "dtype": torch.bfloat16, "trust_remote_code": True}
model = AutoModelForSequenceClassification.from_pretrained(".", **options)
loss = model(**batch["inputs"], labels=torch.tensor([0, 1, 3])).loss
loss.backward()
assert loss.isfinite() and model.network.head.linear.weight.shape == (4, 16)
assert not [name for name, weight in model.named_parameters() if weight.grad is None]
"""


def test_custom_code_needs_no_package_of_ours(exported: Callable[..., Path]) -> None:
    """In a process that does not find acn_scale; also as a classifier with a new head, in 16 bits, trained."""
    net = network(bert(connectivity="acn"))
    folder = exported(net, "hf", depth=2)
    inputs, expected = inputs_of(net.cut(2))
    torch.save({"inputs": inputs, "expected": expected}, folder / "batch.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT_US]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NAMED_MIXER = mixer(image_size=64, patch_size=32, depth=8, dim=512, token_dim=256, channel_dim=2048)


@pytest.mark.parametrize("model", [vit(), vit(pool="mean", mlp_ratio=3.4), NAMED_MIXER, mixer()], ids=described)
def test_timm(exported: Callable[..., Path], model: ModelConfig) -> None:
    import timm

    net = network(model)
    folder = exported(net, "timm")
    if model.dim == 16 and isinstance(model, MixerConfig):  # timm has no name for it
        values = json.loads((folder / "config.json").read_text())
        theirs = timm.models.mlp_mixer.MlpMixer(**values["model_args"], num_classes=values["num_classes"]).eval()
        theirs.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    inputs, expected = inputs_of(net)
    torch.testing.assert_close(theirs(inputs["pixel_values"]), expected, rtol=0, atol=1e-5 * expected.abs().max())
    for source in (folder, folder / "model.safetensors"):
        back = read_model(f"timm:{source}")
        assert same(back, net)
    assert back.card.images.classes == net.card.images.classes


@pytest.mark.parametrize("model", [
    vit(connectivity="acn"), mixer(connectivity="hyper"), bert(connectivity="acn"),
    bert(connectivity="value_residual", num_classes=3),
], ids=described)  # fmt: skip
def test_programs(exported: Callable[..., Path], model: ModelConfig) -> None:
    """ONNX and torch.export, with batches other than those they were made with."""
    import onnxruntime

    net = network(model)
    session = onnxruntime.InferenceSession(exported(net, "onnx") / "model.onnx")
    folder = exported(net, "export")
    program = torch.export.load(folder / "model.pt2").module()
    names = [each.name for each in session.get_inputs()]
    assert names == list(json.loads((folder / "config.json").read_text())["inputs"])
    assert ("segments" in names) == (isinstance(model, BertConfig) and model.num_classes > 0)
    theirs = {"images": "pixel_values", "tokens": "input_ids", "mask": "attention_mask", "segments": "token_type_ids"}
    for batch in (1, 5):
        given, expected = inputs_of(net, batch, segments=1 + ("segments" in names))
        inputs = [given[theirs[name]] for name in names]
        inputs = [each.bool() if name == "mask" else each for name, each in zip(names, inputs, strict=True)]
        torch.testing.assert_close(program(*inputs), expected, rtol=0, atol=1e-5)
        (got,) = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-5)


LETTERS = ["ệ", "ẹ", "ê", "é", "ǖ", "ü", "ガ", "カ", "각", "가", "ṩ", "ṣ"]
# As files and keyboards have them: in parts, of two marks too, and at half the width.
IN_PARTS = [*(unicodedata.normalize("NFD", letter) for letter in LETTERS), "ｶﾞ", "ｶ", "e\u0323"]

WORDS = sorted({word for topic in topics.values() for word in topic.split()})

LIKE_TEXT = st.lists(
    st.sampled_from([*WORDS[::7], *IN_PARTS, " ", " ", "  ", "\n", "\t", "\u00a0", "é", "ﬁ", "\u2581"])
)

ANY_TEXT = st.text() | LIKE_TEXT.map("".join)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours, and what Transformers loads; they know some letters with marks."""
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*topics.values(), *[" ".join(LETTERS)] * 100], 300, folder, model=request.param)
    out = folder / "hf"
    source = folder / "source"
    source.mkdir()
    write_export(network(bert(connectivity="acn"), read_tokenizer(folder)), source, "fp32")
    convert(str(source), "hf", out)
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(out)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_tokenizer(tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = tokenizers
    assume(not any(ours.IdToPiece(number) in text for number in range(5)))  # Transformers takes them for what they say
    assume(ours.Normalize(text) == ours.Normalize(unicodedata.normalize("NFKC", text)))  # not so: marks in odd places
    expected, (first, *got, last) = ours.EncodeAsIds(text), theirs(text).input_ids
    assert (first, last) == (2, 3)
    if got != expected:  # two splits of the same score, such as == = and = ==, in another precision
        scores, pieces = ([[each(number) for number in ids] for ids in (got, expected)]
                          for each in (ours.GetScore, ours.IdToPiece))  # fmt: skip
        assert sum(scores[0]) == pytest.approx(sum(scores[1]), rel=1e-6)
        assert "".join(pieces[0]) == "".join(pieces[1])
        assert len(got) == len(expected)


@pytest.mark.parametrize("text", IN_PARTS, ids=ascii)
def test_tokenizer_joins_letters_and_marks(tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = tokenizers
    assert ours.EncodeAsIds(text)[-1] > 4  # no [UNK]
    assert theirs(text).input_ids[1:-1] == ours.EncodeAsIds(text)


def test_tokenizer_knows_the_special_pieces(tokenizers: tuple[Any, Any]) -> None:
    _, theirs = tokenizers
    special = (theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
    assert special == (0, 1, 2, 3, 4)
    assert theirs("the [MASK] fox").input_ids[2:-2].count(4) == 1
    pair = theirs("the fox", "the dog", padding="max_length")
    assert pair.input_ids.count(3) == 2
    assert sorted(set(pair.token_type_ids)) == [0, 1]
    assert theirs.model_max_length == 7


@pytest.mark.parametrize(("channels", "augment"), [(1, "none"), (3, "none"), (3, "crop_flip")])
def test_image_processor(tmp_path: Path, vit: Callable[..., Config], channels: int, augment: str) -> None:
    """It makes of an image what our evaluation makes of it."""
    import transformers

    size = (8, 8) if augment == "none" else (13, 11)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    stats = {"mean": [0.4, 0.5, 0.6][:channels], "std": [0.2, 0.25, 0.3][:channels]}
    cfg = vit(data={"augment": augment} | stats, model={"channels": channels, "connectivity": "residual"})
    index = ShardIndex.load(cfg.data.eval)
    decoder = ImageDecoder(cfg.data, cfg.model, index, stats, training=False)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    sample = decoder.decode({"png": buffer.getvalue(), "cls": b"1"}, 0, Key(0, 0, 0))
    expected = decoder.collate([sample], [Key(0, 0, 0)])["images"]
    net = network(cfg.model)
    images = Images(**stats, classes=["a"] * 10, resize=9 if cfg.data.crops else None)
    net = Network(net.model, net.card.model_copy(update={"images": images}))
    (tmp_path / "hf").mkdir()
    write_hugging_face(net, tmp_path / "hf", "fp32")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    given = image if channels == 3 else image.convert("L")
    got = processor(given, return_tensors="pt").pixel_values
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_grey_shards_of_a_colour_model(
    one_rank: Callable, vit: Callable[..., Config], exported: Callable[..., Path]
) -> None:
    """Its mean and deviation are written for every channel: others take no fewer."""
    import transformers

    cfg = vit(model={"channels": 3, "connectivity": "residual"}, train={"length": "1step"})
    one_rank(run, cfg)
    net = read_model(run_folder(cfg))
    assert net.card.images.mean == ShardIndex.load(cfg.data.train).info["mean"] * 3
    folder = exported(net, "hf")
    assert read_model(f"hf:{folder}").card.images.std == net.card.images.std
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    assert processor(Image.new("RGB", (8, 8)), return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("model", [
    vit(pool="mean_all"), vit(positions="sincos"), vit(attention_norm=True), mixer(wrapper=True), bert(),
], ids=described)  # fmt: skip
def test_what_timm_has_not(exported: Callable[..., Path], tmp_path: Path, model: ModelConfig) -> None:
    assert "timm: " in complaint(exported(network(model), "safetensors"), tmp_path / "out", "timm")


def test_refused_folders_of_transformers(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A weight too many or too few, and options that ours have not, by name; no pickle is run."""
    folder, out = exported(network(bert()), "hf"), tmp_path / "out"
    source, path = f"hf:{folder}", folder / "model.safetensors"
    values, weights = json.loads((folder / "config.json").read_text()), load_file(path)
    for change, words in (
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"num_hidden_layers": 2}, "layer.2."),
        ({"num_hidden_layers": 4}, "lacks bert.encoder.layer.3."),
        ({"hidden_size": "x"}, "config.json: "),
    ):
        (folder / "config.json").write_text(json.dumps(values | change))
        assert words in complaint(source, out)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights | {"bert.extra": torch.zeros(1)}, path)
    assert "has bert.extra" in complaint(source, out)
    path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert read_model(source).card.model.depth == 3
    torch.save({"weights": Path("x")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: Weights only load failed" in complaint(source, out)
