"""The three models: the laws that hold for all of them, exact sizes, and equality with the reference libraries."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale.config import BertConfig, MixerConfig, ViTConfig
from acn_scale.models import build_model
from acn_scale.models.connectivity import CONNECTIVITY
from acn_scale.models.layers import MLP, Attention, Wrapper

TRUNK = {"depth": 3, "dim": 16}
IMAGE = TRUNK | {"image_size": 8, "patch_size": 4, "num_classes": 5}


def vit(**keys: Any) -> nn.Module:
    return build_model(ViTConfig(**{"name": "vit", "connectivity": "acn", "num_heads": 2} | IMAGE | keys))


def mixer(**keys: Any) -> nn.Module:
    return build_model(
        MixerConfig(**{"name": "mixer", "connectivity": "acn", "token_dim": 6, "channel_dim": 20} | IMAGE | keys)
    )


def bert(**keys: Any) -> nn.Module:
    shape = {"vocab_size": 30, "max_tokens": 7, "num_heads": 2} | TRUNK
    return build_model(BertConfig(**{"name": "bert", "connectivity": "acn"} | shape | keys))


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    if type(model).__name__ != "Bert":
        return {"images": torch.randn(4, *model.embed.image_shape), "labels": torch.tensor([0, 1, 2, 4])}
    masked = torch.tensor([[1, 3], [0, 6], [2, 5], [4, 6]])
    return {"tokens": torch.randint(5, 30, (4, 7)), "masked": masked, "labels": torch.randint(5, 30, (4, 2))}


def randomize(model: nn.Module) -> None:
    """Also norms and biases, so that none hides behind its start."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.3)


every_model = pytest.mark.parametrize("build", [vit, mixer, bert])
every_pattern = pytest.mark.parametrize("connectivity", CONNECTIVITY)


@every_model
@every_pattern
def test_truncate_equals_readouts(build: Any, connectivity: str) -> None:
    """Bit for bit, at every depth, through the shared head."""
    model = build(connectivity=connectivity).eval()
    randomize(model)
    batch = batch_for(model)
    readouts = list(model.readouts(**batch))
    assert len(readouts) == 4
    for depth in (3, 2, 1, 0):
        model.trunk.truncate(depth)
        assert torch.equal(model(**batch)["logits"], readouts[depth])


@every_model
@every_pattern
def test_recompute_changes_nothing_and_every_weight_learns(build: Any, connectivity: str) -> None:
    model = build(connectivity=connectivity, dropout=0.1)
    batch = batch_for(model)
    gradients = []
    for recompute in (False, True):
        model.trunk.recompute = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch)["loss"].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


@every_model
def test_inner_patterns(build: Any) -> None:
    """The residual model is a chain of blocks with skips inside; an ACN takes these blocks as well."""
    torch.manual_seed(0)
    residual = build(connectivity="residual").eval()
    batch = batch_for(residual)
    torch.manual_seed(0)
    explicit = build(connectivity="feedforward", inner="residual").eval()
    assert torch.equal(residual(**batch)["logits"], explicit(**batch)["logits"])
    torch.manual_seed(0)
    acn = build(connectivity="acn", inner="residual").eval()
    x = residual.embed(*list(batch.values())[:1])
    torch.testing.assert_close(acn.trunk(x), sum(residual.trunk.readouts(x)))


@every_model
def test_twins_start_from_the_same_weights(build: Any) -> None:
    weights = []
    for connectivity in ("acn", "residual"):
        torch.manual_seed(0)
        weights.append(build(connectivity=connectivity).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes() -> None:
    with torch.device("meta"):
        imagenet = {"image_size": 224, "patch_size": 16, "num_classes": 1000}
        vit_b = {"dim": 768, "num_heads": 12, "depth": 12} | imagenet
        for depth, parameters in ((12, 86_567_656), (7, 51_128_296), (6, 44_040_424)):
            model = vit(**vit_b)
            model.trunk.truncate(depth)
            assert size(model) == parameters
        bert_base = {"vocab_size": 32_768, "max_tokens": 128, "dim": 768, "depth": 12, "num_heads": 12}
        assert size(bert(**bert_base, num_classes=2)) == 110_913_794
        authors = {"image_size": 32, "dim": 128, "depth": 16, "token_dim": 64, "channel_dim": 512, "num_classes": 10}
        assert size(mixer(**authors, pool="cls", wrapper=True)) == 2_527_002
        assert size(mixer(**authors, pool="cls")) == 2_258_714
        for name, parameters in (("Ti", 5_717_416), ("S", 22_050_664), ("B", 86_567_656), ("L", 304_326_632)):
            cfg = ViTConfig(name="vit", size=name, connectivity="acn", **imagenet)
            assert size(build_model(cfg)) == parameters  # timm's vit_*_patch16_224


def copy_weights(target: nn.Module, source: nn.Module, names: dict[str, str]) -> None:
    """source's weights -> target under target's names; "{}" stands for the block. Strict both ways."""
    depth = range(TRUNK["depth"])
    table = {ours.format(i): theirs.format(i) for ours, theirs in names.items() for i in depth}
    weights = {
        ours + kind: source.state_dict()[theirs + kind]
        for ours, theirs in table.items()
        for kind in (".weight", ".bias", "")
        if theirs + kind in source.state_dict()
    }
    shapes = {name: weight.shape for name, weight in target.state_dict().items()}
    target.load_state_dict({name: weight.reshape(shapes[name]) for name, weight in weights.items()})


VIT_NAMES = {
    "embed.proj": "patch_embed.proj",
    "trunk.blocks.{}.blocks.0.norm": "blocks.{}.norm1",
    "trunk.blocks.{}.blocks.0.op.qkv": "blocks.{}.attn.qkv",
    "trunk.blocks.{}.blocks.0.op.proj": "blocks.{}.attn.proj",
    "trunk.blocks.{}.blocks.1.norm": "blocks.{}.norm2",
    "trunk.blocks.{}.blocks.1.op.fc1": "blocks.{}.mlp.fc1",
    "trunk.blocks.{}.blocks.1.op.fc2": "blocks.{}.mlp.fc2",
    "embed.pos_embed": "pos_embed",
    "head.linear": "head",
}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_residual_vit_equals_timm(pool: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "depth": 3, "num_heads": 2}
    theirs = VisionTransformer(**shape, global_pool={"cls": "token", "mean": "avg"}[pool], class_token=pool == "cls")
    ours = vit(connectivity="residual", pool=pool)
    randomize(theirs)
    names = {"embed.cls_token": "cls_token", "head.norm": "norm"} if pool == "cls" else {"head.norm": "fc_norm"}
    copy_weights(ours, theirs, VIT_NAMES | names)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(images)["logits"], theirs.eval()(images), rtol=0, atol=1e-5)


def test_residual_mixer_equals_timm() -> None:
    from timm.models.mlp_mixer import MlpMixer

    shape = {"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "num_blocks": 3}
    theirs = MlpMixer(**shape, mlp_ratio=(0.5, 4.0))
    ours = mixer(connectivity="residual", token_dim=8, channel_dim=64)
    randomize(theirs)
    names = {"embed.proj": "stem.proj", "head.norm": "norm", "head.linear": "head"}
    for index, (norm, mlp) in enumerate((("norm1", "mlp_tokens"), ("norm2", "mlp_channels"))):
        op = f"trunk.blocks.{{}}.blocks.{index}.op" + (".mlp" if mlp == "mlp_tokens" else "")
        names |= {f"{op}.{fc}": f"blocks.{{}}.{mlp}.{fc}" for fc in ("fc1", "fc2")}
        names[f"trunk.blocks.{{}}.blocks.{index}.norm"] = f"blocks.{{}}.{norm}"
    copy_weights(ours, theirs, names)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours.eval()(images)["logits"], theirs.eval()(images), rtol=0, atol=1e-5)


BERT_NAMES = {
    "embed.token": "bert.embeddings.word_embeddings",
    "embed.position": "bert.embeddings.position_embeddings",
    "embed.segment": "bert.embeddings.token_type_embeddings",
    "embed.norm": "bert.embeddings.LayerNorm",
    "trunk.blocks.{}.blocks.0.op.qkv": "bert.encoder.layer.{}.attention.self.qkv",
    "trunk.blocks.{}.blocks.0.op.proj": "bert.encoder.layer.{}.attention.output.dense",
    "trunk.blocks.{}.norms.0": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "trunk.blocks.{}.blocks.1.op.fc1": "bert.encoder.layer.{}.intermediate.dense",
    "trunk.blocks.{}.blocks.1.op.fc2": "bert.encoder.layer.{}.output.dense",
    "trunk.blocks.{}.norms.1": "bert.encoder.layer.{}.output.LayerNorm",
}
MLM_NAMES = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder": "cls.predictions.decoder",
}


class Fused(nn.Module):
    """A Transformers model whose state dict shows query, key and value as one matrix, as ours holds them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        weights = self.model.state_dict()
        for layer in range(TRUNK["depth"]):
            prefix = f"bert.encoder.layer.{layer}.attention.self."
            for kind in (".weight", ".bias"):
                parts = [weights[prefix + part + kind] for part in ("query", "key", "value")]
                weights[f"{prefix}qkv{kind}"] = torch.cat(parts)
        return weights


@pytest.mark.parametrize("num_classes", [0, 3])
def test_residual_bert_equals_transformers(num_classes: int) -> None:
    """With segments and padding: logits and loss."""
    import transformers

    shape = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 7, "num_labels": 3}
    kind = transformers.BertForSequenceClassification if num_classes else transformers.BertForMaskedLM
    theirs = kind(transformers.BertConfig(**shape)).eval()
    ours = bert(connectivity="residual", num_classes=num_classes).eval()
    randomize(theirs)
    pooler = {"head.pooler": "bert.pooler.dense", "head.linear": "classifier"}
    copy_weights(ours, Fused(theirs), BERT_NAMES | (pooler if num_classes else MLM_NAMES))

    tokens, segments = torch.randint(5, 30, (4, 7)), torch.randint(0, 2, (4, 7))
    mask = torch.arange(7) < torch.tensor([[7], [5], [6], [7]])
    masked = torch.tensor([[1, 3], [0, 4], [2, 5], [4, 6]])
    inputs = {"input_ids": tokens, "token_type_ids": segments, "attention_mask": mask.long()}
    if num_classes:
        labels = torch.tensor([0, 1, 2, 1])
        expected = theirs(**inputs, labels=labels)
        got, logits = ours(tokens, labels=labels, segments=segments, mask=mask), expected.logits
    else:
        labels = torch.randint(5, 30, (4, 2))
        everywhere = torch.full_like(tokens, -100).scatter(1, masked, labels)
        expected = theirs(**inputs, labels=everywhere)
        got = ours(tokens, masked, labels, segments, mask)
        logits = expected.logits.gather(1, masked[..., None].expand(-1, -1, 30))
    torch.testing.assert_close(got["logits"], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["loss"], expected.loss, rtol=0, atol=1e-5)


def test_decoder_is_tied() -> None:
    model = bert()
    assert model.head.decoder.weight is model.embed.token.weight


def test_layer_options_of_the_authors() -> None:
    x = torch.randn(2, 3, 4)
    mlp = MLP(4, 6, bypass=True)
    identity = torch.eye(6, 4)
    hidden = F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias + x @ identity.T)
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias + hidden @ identity)
    plain, normed = Attention(4, 2), Attention(4, 2, out_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(normed(x), F.layer_norm(plain(x), (4,), eps=1e-6))
    wrapper = Wrapper(mlp, 4)
    torch.testing.assert_close(wrapper(x), F.layer_norm(F.relu(wrapper.proj(mlp(x)) + x), (4,)))


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 9, 8\): the model takes \(3, 8, 8\)"):
        vit()(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="8 tokens: the model takes at most 7"):
        bert()(torch.zeros(1, 8, dtype=torch.long))


def test_models_import_without_the_training_side() -> None:
    heavy = ["deepspeed", "webdataset", "torchvision", "datasets", "sklearn", "matplotlib", "tensorboard"]
    code = f"import sys, acn_scale.models; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
