"""What comes out of a conversion computes what went in, and a mistake leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_models import randomize
from torch import Tensor

from acn_scale.config import BertConfig, MixerConfig, ModelConfig, ViTConfig
from acn_scale.convert import convert, read_model
from acn_scale.convert.network import Card, Images, Network
from acn_scale.models import build_model

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
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Converts a network by way of the library's own function, to a new folder."""

    def export(net: Network, to: str, **keys: Any) -> Path:
        source, out = tmp_path / f"source_{to}", tmp_path / f"{to}_{len(list(tmp_path.iterdir()))}"
        source.mkdir()
        from acn_scale.convert.export import write_export

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


def test_custom_code_needs_no_package_of_ours(exported: Callable[..., Path]) -> None:
    """In a process that does not find acn_scale; also as a classifier with a new head, in 16 bits, and trained."""
    net = network(bert(connectivity="acn"))
    folder = exported(net, "hf", depth=2)
    inputs, expected = inputs_of(net.cut(2))
    torch.save({"inputs": inputs, "expected": expected}, folder / "batch.pt")
    code = f"""
import sys, importlib.util
sys.path[:] = [path for path in sys.path if path and not importlib.util.spec_from_file_location("x", path + "/acn_scale/__init__.py")
               or not __import__("os").path.exists(path + "/acn_scale/__init__.py")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, transformers
assert importlib.util.find_spec("acn_scale") is None
batch = torch.load({str(folder / "batch.pt")!r})
keys = dict(trust_remote_code=True)
model = transformers.AutoModelForMaskedLM.from_pretrained({str(folder)!r}, **keys).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**batch["inputs"]).logits, batch["expected"], rtol=0, atol=1e-5)
assert model.network.head.decoder.weight is model.network.embed.token.weight
model = transformers.AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, num_labels=4, dtype=torch.bfloat16, **keys)
loss = model(**batch["inputs"], labels=torch.tensor([0, 1, 3])).loss
loss.backward()
assert loss.isfinite() and model.network.head.linear.weight.shape == (4, 16)
assert not [name for name, weight in model.named_parameters() if weight.grad is None]
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
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
