"""The three models: the laws that hold for all of them, exact sizes, options and heads."""

import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acn_scale.config import OF_SUBLAYERS, POST_NORM, BertConfig, MixerConfig, ViTConfig
from acn_scale.models import build_model
from acn_scale.models.connectivity import CONNECTIVITY
from acn_scale.models.layers import MLP, Attention, Dropout, Wrapper

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


def networks() -> Iterator[Any]:
    """Every model with every pattern that it takes; post-LN BERT where that does."""
    for name in CONNECTIVITY:
        post = name in POST_NORM or name not in OF_SUBLAYERS
        norm = {"norm": "post" if post else "pre"}
        builds = [(vit, {}), (bert, norm)] + [(mixer, {})] * (name != "value_residual")
        for build, keys in builds:
            yield pytest.param(partial(build, connectivity=name, **keys), id=f"{build.__name__}-{name}")


every_model = pytest.mark.parametrize("build", [vit, mixer, bert])
every_network = pytest.mark.parametrize("build", list(networks()))


@every_network
def test_truncate_equals_readouts(build: Any) -> None:
    """Bit for bit, at every depth; through the shared head, of the tokens that it takes, to rounding."""
    model = build(dropout=0.1).eval()
    randomize(model)
    batch = batch_for(model)
    x, mask = (
        model.embed(*[batch[name] for name in ("images", "tokens", "segments") if name in batch]),
        batch.get("mask"),
    )
    readouts, logits = list(model.trunk.readouts(x, mask)), list(model.readouts(**batch))
    assert len(readouts) == len(logits) == 4
    for depth in (3, 2, 1, 0):
        model.trunk.truncate(depth)
        assert torch.equal(model.trunk(x, mask), readouts[depth])
        torch.testing.assert_close(model(**batch)["logits"], logits[depth])


@every_model
def test_sums_of_lower_depths_are_not_kept(build: Any) -> None:
    """Not beyond the next one, also where gradients are wanted."""
    model, sums = build(depth=6), []
    for join in model.trunk.joins:
        join.register_forward_hook(lambda *given: sums.append(weakref.ref(given[-1][1])))
    alive = []
    model.trunk.blocks[-1].register_forward_hook(lambda *_: alive.extend(each() is not None for each in sums))
    model(**batch_for(model))
    assert len(sums) == 6 and alive == [False] * 4 + [True]


@every_network
def test_recompute_changes_nothing_and_every_weight_learns(build: Any) -> None:
    """Bit for bit, with dropout; the block does run twice."""
    batch = batch_for(build())
    losses, gradients, calls = [], [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(dropout=0.1, recompute=recompute)
        for name, parameter in model.named_parameters():
            if "joins" in name.split("."):  # as after a step: at first ReZero passes nothing on, and streams are alike
                parameter.data += torch.rand_like(parameter)
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


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float) -> None:
    """Each number is 0 with probability p, alone, and else 1 / (1 - p) times as much; so is its gradient."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    stays = y.detach().flatten() > 0
    assert torch.allclose(y.detach().flatten()[stays], torch.tensor(1 / (1 - p)))
    deviation = (p * (1 - p) / len(stays)) ** 0.5
    assert abs(stays.float().mean() - (1 - p)) < 5 * deviation
    for distance in (1, 2, 1001):  # the other half of the 64 bits, those after them, the row below
        both = torch.stack([stays[:-distance], stays[distance:]]).double()
        assert abs(torch.corrcoef(both)[0, 1]) < 5 / len(stays) ** 0.5
    assert torch.equal(Dropout(p).eval()(x), x)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout(masked: bool) -> None:
    """As PyTorch's where nothing is dropped; on the mean over many draws the same, and not in one of them."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 8)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None] if masked else None
    rare, half = Attention(8, 2, dropout=1e-12), Attention(8, 2, dropout=0.5)
    half.load_state_dict(rare.state_dict())
    expected = rare.eval()(x, mask)
    torch.testing.assert_close(rare.train()(x, mask), expected)
    drawn = torch.stack([half(x, mask) for _ in range(4000)])
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - expected).abs() <= 5 * error + 1e-6).all()
    assert (error > 0).all() and torch.equal(half.eval()(x, mask), expected)


def test_value_residual_is_its_equation() -> None:
    """Attention of block 1 has its own values, later ones the mean of theirs and those."""
    model = bert(connectivity="value_residual").eval()
    randomize(model)
    batch = batch_for(model)
    x, first = model.embed(batch["tokens"], batch["segments"]), None
    expected = x
    for block in model.trunk.blocks:
        attention, mlp = block.blocks
        op = attention.op
        q, k, v = (part.view(4, 7, 2, 8).transpose(1, 2) for part in op.qkv(expected).chunk(3, dim=-1))
        first = v if first is None else first
        scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~batch["mask"][:, None, None], -torch.inf)
        mixed = scores.softmax(dim=-1) @ ((v + first) / 2)
        expected = block.norms[0](expected + op.proj(mixed.transpose(1, 2).flatten(2)))
        expected = block.norms[1](expected + mlp.op(expected))
    torch.testing.assert_close(model.trunk(x, batch["mask"]), expected)


def test_layernorm_scaling_is_its_equation() -> None:
    model = vit(connectivity="layernorm_scaling").eval()
    randomize(model)
    x = expected = torch.randn(2, 5, 16)
    for number, block in enumerate(model.trunk.blocks, start=1):
        for sublayer in block.blocks:
            norm = F.layer_norm(expected, (16,), sublayer.norm.weight, sublayer.norm.bias, 1e-6)
            expected = expected + sublayer.op(norm / number**0.5)
    torch.testing.assert_close(model.trunk(x), expected)


@pytest.mark.parametrize("connectivity", ["residual", "value_residual", "hyper"])
def test_stochastic_depth(connectivity: str) -> None:
    """A sample passes both sublayers of block l of 3 by with probability 0.6 l / 3; in eval() none does.

    What stays is scaled up, so that the mean is that of eval(): here of the first sublayer's output alone.
    """
    torch.manual_seed(0)
    model, plain = (vit(connectivity=connectivity, drop_path=rate) for rate in (0.6, 0.0))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 5, 16).expand(4000, 5, 16)
    assert torch.equal(model.trunk.eval()(x[:2]), plain.trunk.eval()(x[:2]))
    for number, block in enumerate(model.trunk.train().blocks, start=1):
        for sublayer in block.blocks:
            whole = sublayer.eval()(x)
            got = sublayer.train()(x)
            whole, got = (each[0] if isinstance(each, tuple) else each for each in (whole, got))
            dropped = (got == 0).flatten(1).all(dim=1)
            assert dropped.double().mean() == pytest.approx(0.2 * number, abs=0.04)
            torch.testing.assert_close(got[~dropped], whole[~dropped] / (1 - 0.2 * number))


def test_stochastic_depth_is_a_row_of_the_connection_matrix() -> None:
    """What is drawn once makes a linear pattern: the trunk's output is x and the sublayers' outputs, some of them 0."""
    torch.manual_seed(0)
    model = vit(connectivity="residual", drop_path=0.9).train()
    outputs = []
    for block in model.trunk.blocks:
        for sublayer in block.blocks:
            sublayer.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = torch.randn(8, 5, 16)
    found = model.trunk(x)
    torch.testing.assert_close(found, x + sum(outputs))
    dropped = torch.stack([(output == 0).flatten(1).all(dim=1) for output in outputs])
    assert dropped[2:].any() and not dropped.all()


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


def test_identity_like_start() -> None:
    """The maps of a block without skips: an attention that looked at each token alone and an MLP change nothing."""
    x = torch.randn(2, 5, 16)
    attention, mlp = (sublayer.op for sublayer in vit(init="identity").trunk.blocks[0].blocks)
    torch.testing.assert_close(mlp(x), x)
    torch.testing.assert_close(attention(x[:, :1]), x[:, :1])
    assert (attention.qkv.weight[:32].abs() <= (6 / 64) ** 0.5).all()
    narrow = mixer(init="identity", channel_dim=8).trunk.blocks[0].blocks[1].op
    projected = narrow(x)
    torch.testing.assert_close(narrow(projected), projected)
    assert torch.linalg.matrix_rank(projected.flatten(0, 1)) == 4


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


def test_sizes_of_the_joins() -> None:
    """For 3 blocks of 2 sublayers and width 16."""
    counts = {"h_acn": 3, "layer_scale": 6 * 16, "rezero": 6, "hyper": 6 * (4 + 16 + 4)}
    counts |= {"highway": 3 * (16 * 16 + 16), "dense": (2 + 3 + 4) * 16 * 16, "denseformer": 2 + 3 + 4}
    for name in CONNECTIVITY:
        assert size(vit(connectivity=name)) == size(vit()) + counts.get(name, 0), name
    assert size(vit(connectivity="dense", inner="through")) == size(vit()) + sum(range(2, 8)) * 16 * 16
    inner = [join for block in vit(connectivity="hyper").trunk.blocks for join in block.joins]
    assert [join.into.argmax().item() for join in inner] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    "build, keys, message",
    [
        (mixer, {"connectivity": "value_residual"}, "value_residual: takes attention, which a Mixer has not"),
        (mixer, {"connectivity": "rezero", "wrapper": True}, "wrapper = true: connectivity = rezero would go through"),
        (bert, {"connectivity": "hyper"}, "connectivity = hyper, inner = auto: norm = 'post' takes feedforward, "),
        (bert, {"inner": "through"}, "connectivity = acn, inner = through: norm = 'post' takes"),
        (bert, {"connectivity": "layernorm_scaling", "inner": "residual"}, "norm = 'post' takes"),
        (vit, {"inner": "value_residual"}, "value_residual is a connectivity with inner = through"),
        (vit, {"connectivity": "h_acn", "inner": "residual"}, "h_acn is a connectivity with inner = through"),
        (vit, {"drop_path": 0.1}, "drop_path = 0.1: .* nothing is carried past a sublayer that is left out"),
        (vit, {"connectivity": "residual", "inner": "feedforward", "drop_path": 0.1}, "nothing is carried past"),
    ],
)
def test_what_a_config_refuses(build: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**keys)


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
