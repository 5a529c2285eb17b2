"""The three models: the laws that hold for all of them, exact sizes, options and heads."""

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
    inputs = {"tokens": torch.randint(5, 30, (4, 7)), "masked": masked, "labels": torch.randint(5, 30, (4, 2))}
    mask = torch.arange(7) < torch.tensor([[4], [7], [6], [7]])
    return inputs | {"segments": torch.randint(0, 2, (4, 7)), "mask": mask}


def randomize(model: nn.Module) -> None:
    """Also norms and biases, so that none hides behind its start."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.3)


every_model = pytest.mark.parametrize("build", [vit, mixer, bert])
every_pattern = pytest.mark.parametrize("connectivity", CONNECTIVITY)


@every_model
@every_pattern
def test_truncate_equals_readouts(build: Any, connectivity: str) -> None:
    """Bit for bit, at every depth, through the shared head; dropout is off."""
    model = build(connectivity=connectivity, dropout=0.1).eval()
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
    """Bit for bit, with dropout; the block does run twice."""
    batch = batch_for(build())
    losses, gradients, calls = [], [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(connectivity=connectivity, dropout=0.1, recompute=recompute)
        model.trunk.blocks[0].register_forward_pre_hook(lambda *_, recompute=recompute: calls.append(recompute))
        losses.append(model(**batch)["loss"])
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert calls == [False, True, True]
    assert torch.equal(*losses)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


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


@pytest.mark.parametrize("build, norm", [(vit, "pre"), (mixer, "pre"), (bert, "pre"), (bert, "post")])
def test_acn_is_equation_1(build: Any, norm: str) -> None:
    """The trunk is x_0 + f_1(x_0) + ...; a block f_i has no skips, and post-LN norms the branch alone."""
    model = build(**({"norm": norm} if build is bert else {})).eval()
    randomize(model)
    batch = batch_for(model)
    mask = batch.get("mask")
    outputs = [model.embed(*(batch[name] for name in ("images", "tokens", "segments") if name in batch))]
    for block in model.trunk.blocks:
        x = outputs[-1]
        for index, sublayer in enumerate(block.blocks):
            assert isinstance(sublayer.norm, nn.LayerNorm) == (norm == "pre")
            x = sublayer.op(sublayer.norm(x), mask)
            x = block.norms[index](x) if norm == "post" else x
        outputs.append(x)
    torch.testing.assert_close(model.trunk(outputs[0], mask), sum(outputs))


@every_model
def test_twins_start_from_the_same_weights(build: Any) -> None:
    weights = []
    for connectivity in ("acn", "residual"):
        torch.manual_seed(0)
        weights.append(build(connectivity=connectivity).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@every_model
def test_initial_weights(build: Any) -> None:
    """Each scheme's own for a map from 16 to 64; a join keeps the start of its pattern."""
    shape = {"channel_dim": 64} if build is mixer else {}
    for init, bound in (("xavier", (6 / 80) ** 0.5), ("normal", 0.1), ("torch", 0.25)):
        model = build(connectivity="highway", init=init, **shape)
        assert all((join.gate.bias == -2).all() for join in model.trunk.joins)
        fc1 = model.trunk.blocks[0].blocks[1].op.fc1
        assert 0.5 * bound < fc1.weight.abs().max() < bound
        assert (fc1.bias == 0).all() == (init != "torch")


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


def test_options_reach_the_model() -> None:
    attention, mlp = vit(attention_norm=True, mlp_bypass=True).trunk.blocks[0].blocks
    assert isinstance(attention.op.out_norm, nn.LayerNorm) and mlp.op.bypass
    embed = vit(positions="sincos", image_size=12).embed  # 3 x 3 patches
    embed.proj.weight.data.zero_()
    angle = torch.tensor([1.0, 2.0]).outer(1e4 ** -(torch.arange(4) / 3))  # of column 1, row 2
    expected = torch.cat([angle[0].sin(), angle[0].cos(), angle[1].sin(), angle[1].cos()])
    torch.testing.assert_close(embed(torch.zeros(1, 3, 12, 12))[0, 1 + 2 * 3 + 1], expected)


def test_pooling_of_the_authors() -> None:
    for model in (vit(pool="mean_all"), mixer(pool="cls")):
        randomize(model)
        head, x = model.head, torch.randn(2, model.embed.num_tokens, 16)
        assert x.shape[1] == 1 + 4
        pooled = head.norm(x.mean(dim=1)) if head.pool == "mean_all" else head.norm(x[:, 0])
        torch.testing.assert_close(head(x), head.linear(pooled))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_pre_norm_bert_norms_the_readout(num_classes: int) -> None:
    model = bert(norm="pre", num_classes=num_classes)
    randomize(model)
    head, x = model.head, torch.randn(2, 5, 16)
    normed = F.layer_norm(x, (16,), *head.final_norm.parameters(), eps=1e-12)
    if num_classes:
        expected = head.linear(head.pooler(normed[:, 0]).tanh())
    else:
        expected = head.decoder(head.norm(F.gelu(head.dense(normed))))
    torch.testing.assert_close(head(x, torch.arange(5).expand(2, 5)), expected)


@every_model
def test_loss_is_fp32_in_bf16(build: Any) -> None:
    model = build().bfloat16()
    assert model(**batch_for(model))["loss"].dtype == torch.float32


def test_label_smoothing() -> None:
    model = vit(label_smoothing=0.1)
    batch = batch_for(model)
    out = model(**batch)
    target = 0.9 * F.one_hot(batch["labels"], 5) + 0.1 / 5
    torch.testing.assert_close(out["loss"], -(target * out["logits"].log_softmax(dim=-1)).sum(dim=-1).mean())


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 9, 8\): the model takes \(3, 8, 8\)"):
        vit()(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="8 tokens: the model takes at most 7"):
        bert()(torch.zeros(1, 8, dtype=torch.long))


def test_models_import_without_the_training_side() -> None:
    heavy = ["deepspeed", "webdataset", "torchvision", "datasets", "sklearn", "matplotlib", "tensorboard"]
    code = f"import sys, acn_scale.models; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
