"""What comes out of a conversion computes what went in, and a mistake leaves nothing behind."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made import write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import batch_for, randomize
from test_pretrain import refused, run, run_until
from torch import Tensor

from acn_scale import pretrain, reshape
from acn_scale.checkpoint import complete
from acn_scale.config import BertConfig, Config, MixerConfig, ModelConfig, ViTConfig
from acn_scale.convert import convert, read_model
from acn_scale.convert.export import write_export
from acn_scale.convert.hugging_face import write_hugging_face
from acn_scale.convert.network import Card, Images, Network
from acn_scale.convert.start import start_from
from acn_scale.data.images import ImageDecoder
from acn_scale.data.samples import Key
from acn_scale.data.shards import ShardIndex
from acn_scale.data.tokenizer import TOKENIZER_NAME, load_tokenizer, train_tokenizer
from acn_scale.errors import UserError
from acn_scale.models import build_model
from acn_scale.models.connectivity import CONNECTIVITY
from acn_scale.runs import run_folder

CONVERT = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
CONVERT = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
IMAGES = {"image_size": 8, "patch_size": 4, "num_classes": 5, "depth": 3, "dim": 16}
TEXTS = {"vocab_size": 300, "max_tokens": 7, "num_heads": 2, "depth": 3, "dim": 16}
CURVE = [0.1, 0.2, 0.59, 0.6]


def vit(**keys: Any) -> ViTConfig:
    return ViTConfig(**{"name": "vit", "connectivity": "residual", "num_heads": 2} | IMAGES | keys)


def mixer(**keys: Any) -> MixerConfig:
    widths = {"token_dim": 6, "channel_dim": 20}
    return MixerConfig(**{"name": "mixer", "connectivity": "residual"} | widths | IMAGES | keys)


def bert(**keys: Any) -> BertConfig:
    return BertConfig(**{"name": "bert", "connectivity": "residual"} | TEXTS | keys)


def network(model: ModelConfig, tokenizer: bytes | None = None) -> Network:
    """No weight is zero."""
    torch.manual_seed(0)
    module = build_model(model).eval().requires_grad_(False)
    randomize(module)
    images = None
    if not isinstance(model, BertConfig):
        channels = model.channels
        classes = [f"kind {number}" for number in range(model.num_classes)]
        images = Images(mean=[0.4] * channels, std=[0.2] * channels, classes=classes, resize=9)
    card = Card(model=model, source="here", full_depth=model.depth, accuracy=CURVE, evaluated_at=1, images=images)
    return Network(module, card, tokenizer)


def same(one: Network, other: Network) -> bool:
    first, second = one.weights(), other.weights()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """Converts a network by way of the library's own function, to a new folder."""

    def export(net: Network, to: str, **keys: Any) -> Path:
        source, out = tmp_path / f"source_{to}", tmp_path / f"{to}_{len(list(tmp_path.iterdir()))}"
        source.mkdir()
        write_export(net, source, "fp32")
        convert(str(source), to, out, **keys)
        shutil.rmtree(source)
        return out

    return export


def inputs_of(net: Network) -> tuple[dict[str, Tensor], Tensor]:
    """A batch, and our logits: at every position where there is no class."""
    model = net.card.model
    if not isinstance(model, BertConfig):
        images = torch.randn(3, model.channels, model.image_size, model.image_size)
        return {"pixel_values": images}, net.model(images)["logits"]
    tokens, segments = torch.randint(5, model.vocab_size, (3, 7)), torch.randint(0, 2, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [5], [6]])
    places = None if model.num_classes else torch.arange(7).expand(3, -1)
    logits = net.model(tokens, places, segments=segments, mask=mask)["logits"]
    return {"input_ids": tokens, "token_type_ids": segments, "attention_mask": mask.long()}, logits


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
    bert(connectivity="denseformer", norm="pre"),
]


def described(model: ModelConfig) -> str:
    return f"{model.name}-{model.connectivity}-{model.num_classes}"


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


named_mixer = mixer(image_size=64, patch_size=32, depth=8, dim=512, token_dim=256, channel_dim=2048)


@pytest.mark.parametrize("model", [vit(), vit(pool="mean", mlp_ratio=3.4), named_mixer, mixer()], ids=described)
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


@pytest.mark.parametrize("model", [vit(connectivity="acn"), mixer(), bert(connectivity="acn"), bert(num_classes=3)],
                         ids=described)  # fmt: skip
def test_programs(exported: Callable[..., Path], model: ModelConfig) -> None:
    """ONNX and torch.export, with batches other than those they were made with."""
    import onnxruntime

    net = network(model)
    text = isinstance(model, BertConfig)
    session = onnxruntime.InferenceSession(exported(net, "onnx") / "model.onnx")
    program = torch.export.load(exported(net, "export") / "model.pt2").module()
    names = [each.name for each in session.get_inputs()]
    for batch in (1, 5):
        if text:
            tokens, mask = torch.randint(300, (batch, 7)), torch.arange(7).expand(batch, -1) < 6
            inputs = [tokens, mask]
            places = None if model.num_classes else torch.arange(7).expand(batch, -1)
            expected = net.model(tokens, places, mask=mask)["logits"]
        else:
            inputs = [torch.randn(batch, 3, 8, 8)]
            expected = net.model(*inputs)["logits"]
        torch.testing.assert_close(program(*inputs), expected, rtol=0, atol=1e-5)
        (got,) = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-5)


def trained(cfg: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A whole run; the engine's own fp32 weights after it, and this rank's part of their average."""
    from deepspeed.utils import safe_get_full_fp32_param

    class Kept(pretrain.Trainer):
        def run(self) -> bool:
            trainers.append(self)
            return super().run()

    trainers: list[pretrain.Trainer] = []
    whole, pretrain.Trainer = pretrain.Trainer, Kept
    try:
        run(cfg)
    finally:
        pretrain.Trainer = whole
    engine = trainers[0].engine
    named = dict(engine.module.named_parameters())
    if cfg.train.zero_stage:
        weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in named.items()}
    else:
        weights = dict(zip(reshape.names_in_order(engine), reshape._in_order(engine.optimizer)[1], strict=True))
    return {name: weight.detach().clone() for name, weight in weights.items()}, trainers[0].average.average


def check_read(two_ranks: Callable, cfg: Config) -> None:
    (weights, first), (_, second) = two_ranks(trained, cfg)
    for read, expected in ((read_model(run_folder(cfg)), weights),
                           (read_model(run_folder(cfg), average=True), first | second)):  # fmt: skip
        got = read.weights()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
    assert read.card.step == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_of_every_stage(two_ranks: Callable, vit: Callable[..., Config], stage: int, precision: str) -> None:
    """Those that the optimizer keeps in fp32, bit for bit; some do not divide by the ranks."""
    train = {"zero_stage": stage, "precision": precision, "length": "2step", "ema_decay": 0.5}
    check_read(two_ranks, vit(model={"depth": 1, "dim": 6, "connectivity": "denseformer"}, train=train))


@pytest.fixture
def text_run(tmp_path: Path) -> Callable[..., Config]:
    """A tiny run on random tokens."""
    random, model = np.random.default_rng(0), bert(connectivity="acn", depth=2)
    records = [{"npy": random.integers(5, 300, (1, 7)).astype(np.uint16)} for _ in range(40)]
    for split in ("train", "eval"):
        folder = write_folder(tmp_path / split, [records], {"kind": "text", "vocab_size": 300, "tokens": 7})
        (folder / TOKENIZER_NAME).write_bytes(b"pieces")

    def build(**train: Any) -> Config:
        return Config(
            run={"name": "text", "dir": str(tmp_path / "runs")},
            model=model.model_dump(),
            data={"kind": "text", "train": str(tmp_path / "train"), "eval": str(tmp_path / "eval"), "streams": 2},
            optim={"lr": 1e-3},
            train={"length": "2step", "global_batch_size": 8, "ema_decay": 0.5} | train,
        )

    return build


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_weights_are_stored_once(two_ranks: Callable, text_run: Callable[..., Config], stage: int) -> None:
    cfg = text_run(zero_stage=stage)
    check_read(two_ranks, cfg)
    out = run_folder(cfg) / "export"
    convert(str(run_folder(cfg)), "safetensors", out)
    assert "head.decoder.weight" not in load_file(out / "model.safetensors")
    net = read_model(out)
    assert net.model.head.decoder.weight is net.model.embed.token.weight
    assert net.tokenizer == (Path(cfg.data.train) / TOKENIZER_NAME).read_bytes()


@pytest.mark.parametrize("model", [
    *(vit(connectivity=connectivity) for connectivity in CONNECTIVITY), mixer(connectivity="acn"),
    bert(connectivity="acn"), bert(connectivity="highway", norm="pre", num_classes=3),
], ids=described)  # fmt: skip
def test_a_cut_network_is_the_readout(exported: Callable[..., Path], model: ModelConfig) -> None:
    """Bit for bit after a reload, at every depth; by tolerance, at the cut-off."""
    net = network(model)
    batch = batch_for(net.model) | {"labels": torch.zeros(4, dtype=torch.long)}
    batch = {name: values for name, values in batch.items() if name != "labels"}
    if model.num_classes and isinstance(model, BertConfig):
        del batch["masked"]
    readouts = list(net.model.readouts(**batch))
    cuts = [({"depth": depth}, depth) for depth in (1, 2, 3)] + [({"tolerance": 1.5}, 2), ({"tolerance": 45.0}, 1)]
    for keys, depth in cuts:
        back = read_model(exported(net, "safetensors", **keys))
        assert torch.equal(back.model(**batch)["logits"], readouts[depth])
        assert back.card.model.depth == len(back.model.trunk.blocks) == depth
        assert back.card.full_depth == 3
        assert back.card.accuracy == CURVE


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits(exported: Callable[..., Path], dtype: str) -> None:
    """Each weight is rounded once."""
    net = network(vit(connectivity="acn"))
    out = exported(net, "safetensors", dtype=dtype)
    expected = net.weights(dtype)
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert all(torch.equal(weight, expected[name].float()) for name, weight in read_model(out).weights().items())


WORDS = sorted({word for topic in topics.values() for word in topic.split()})
LIKE_TEXT = st.lists(
    st.sampled_from([*WORDS[::7], " ", " ", "  ", "\n", "\t", "\u00a0", "é", "ﬁ", "e\u0301", "\u2581"])
)
ANY_TEXT = st.text() | LIKE_TEXT.map("".join)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours, and what Transformers loads."""
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(topics.values(), 300, folder, model=request.param)
    out = folder / "hf"
    source = folder / "source"
    source.mkdir()
    write_export(network(bert(connectivity="acn"), (folder / TOKENIZER_NAME).read_bytes()), source, "fp32")
    convert(str(source), "hf", out)
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(out)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_tokenizer(tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = tokenizers
    assume(not any(ours.IdToPiece(number) in text for number in range(5)))  # Transformers takes them for what they say
    expected, (first, *got, last) = ours.EncodeAsIds(text), theirs(text).input_ids
    assert (first, last) == (2, 3)
    if got != expected:  # two splits of the same score, such as == = and = ==, in another precision
        scores, pieces = ([[each(number) for number in ids] for ids in (got, expected)]
                          for each in (ours.GetScore, ours.IdToPiece))  # fmt: skip
        assert sum(scores[0]) == pytest.approx(sum(scores[1]), rel=1e-6)
        assert "".join(pieces[0]) == "".join(pieces[1])
        assert len(got) == len(expected)


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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def complaint(source: Path | str, out: Path, to: str = "safetensors", **keys: Any) -> str:
    """What a conversion that cannot be done says, in one line; nothing is left of it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert(str(source), to, out, **keys)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refused_exports(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = exported(network(vit(connectivity="acn")), "safetensors"), tmp_path / "out"
    assert "--depth 4: must be 1 to 3" in complaint(folder, out, depth=4)
    assert "--depth 0: must be 1 to 3" in complaint(folder, out, depth=0)
    assert "is there already" in complaint(folder, folder)
    assert "holds no average" in complaint(f"hf:{folder}", out, average=True)
    assert "no complete checkpoint and no export" in complaint(folder / "..", out)
    assert "model_type = None: must be bert or vit" in complaint(f"hf:{folder}", out)
    assert "residual networks only" in complaint(folder, out, "timm")
    assert "ONNX Runtime has no bf16" in complaint(folder, out, "onnx", dtype="bf16")
    weights = folder / "model.safetensors"
    for harm, words in ((flip, "its sha256 is not the one in config.json"), (cut, "model.safetensors: ")):
        whole = weights.read_bytes()
        harm(weights)
        assert words in complaint(folder, out)
        weights.write_bytes(whole)
    values = json.loads((folder / "config.json").read_text())
    for change, words in (({"model": values["model"] | {"depth": 4}}, "lacks trunk.blocks.3"),
                          ({"model": values["model"] | {"dim": 8}}, "has (16,), and (8,) in a model of this config"),
                          ({"version": 2}, "version = 2: must be 1"), ({"extra": 1}, "extra: ")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(values | change))
        assert words in complaint(folder, out)


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
    for change, words in (({"hidden_act": "relu"}, "hidden_act = 'relu'"), ({"num_hidden_layers": 2}, "layer.2."),
                          ({"num_hidden_layers": 4}, "lacks bert.encoder.layer.3."), ({"hidden_size": "x"}, "config")):  # fmt: skip
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


def test_refused_checkpoints(
    one_rank: Callable, two_ranks: Callable, vit: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = vit(train={"zero_stage": 2, "length": "2step"})
    two_ranks(run, cfg)
    out, folder = tmp_path / "out", run_folder(cfg)
    checkpoint = complete(folder)[-1]
    assert "keeps no average of the weights" in complaint(checkpoint, out, average=True)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"depth": 3', '"depth": 2'))
    assert "which this model has not" in complaint(folder, out)
    (folder / "config.json").write_text(config)
    part = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = part.read_bytes()
    flip(part)
    assert "its sha256 is not the one in state.json" in complaint(folder, out)
    part.unlink()
    assert f"{part}: No such file" in complaint(checkpoint, out)
    command = [sys.executable, str(CONVERT), str(folder), "--to", "safetensors", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), out.exists()) == (2, 1, False)
    assert done.stderr.startswith(f"error: {part}")
    part.write_bytes(whole)
    done = subprocess.run([*command, "--tolerance", "100"], capture_output=True, text=True)
    assert done.stdout.startswith(f"{out}: vit, acn, 1 of 3 blocks, ")
    assert read_model(out).card.run == "tiny"


def test_start_from(exported: Callable[..., Path]) -> None:
    """An ACN starts from residual weights; what may differ keeps its start and is named, all else is refused."""
    source = network(vit())
    folder = exported(source, "safetensors")
    for keys, kept in (({"connectivity": "acn"}, []), ({"num_classes": 7}, ["head.linear.bias", "head.linear.weight"]),
                       ({"connectivity": "denseformer"}, [f"trunk.joins.{join}.weight" for join in range(3)])):  # fmt: skip
        model = build_model(vit(**keys))
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        assert start_from(model, vit(**keys), str(folder)) == kept
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name] if name in kept else source.weights()[name])
    for keys in ({"dim": 8}, {"depth": 2}, {"mlp_ratio": 2.0}, {"image_size": 12}):
        with pytest.raises(UserError, match=r"train.init_from = .*: .* in it, .* in this run's model"):
            start_from(build_model(vit(**keys)), vit(**keys), str(folder))
    masked = exported(network(bert()), "hf")
    classifier = bert(num_classes=2, connectivity="acn")
    kept = start_from(build_model(classifier), classifier, f"hf:{masked}")
    assert kept == [f"head.{part}.{kind}" for part in ("linear", "pooler") for kind in ("bias", "weight")]


def test_runs_start_from_weights(two_ranks: Callable, vit: Callable[..., Config], tmp_path: Path) -> None:
    """On all ranks, once: a run that goes on does not look at them again."""
    first = vit(run={"name": "first"}, model={"connectivity": "residual"}, train={"zero_stage": 3, "length": "2step"})
    two_ranks(run, first)
    source = tmp_path / "source"
    convert(str(run_folder(first)), "safetensors", source)
    train = {"zero_stage": 1, "length": "10step", "init_from": str(source)}
    cfg = vit(run={"name": "second"}, train=train, optim={"lr": 1e-9})
    two_ranks(run_until, cfg, 7)
    net = read_model(run_folder(cfg))
    assert net.card.step == 5
    expected = read_model(source).weights()
    assert all((weight - expected[name]).abs().max() < 1e-7 for name, weight in net.weights().items())
    shutil.rmtree(source)
    two_ranks(run, cfg)
    assert read_model(run_folder(cfg)).card.step == 10
    refusal = two_ranks(refused, vit(run={"name": "third"}, train=train))
    assert "source: holds no complete checkpoint and no export" in refusal[0]
