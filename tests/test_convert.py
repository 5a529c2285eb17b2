"""A network out of a checkpoint, whole or cut, is the one that was trained; a mistake leaves nothing behind."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from made import write_folder
from networks import CURVE, bert, complaint, described, mixer, network, vit
from safetensors.torch import load_file
from test_models import batch_for
from test_pretrain import refused, run, run_until
from torch import Tensor

from acn_scale import pretrain, reshape
from acn_scale.checkpoint import complete
from acn_scale.config import BertConfig, Config, ModelConfig
from acn_scale.convert import convert, read_model
from acn_scale.convert.network import Masks, digest_of
from acn_scale.convert.start import OF_CLASSES, START, start_from
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.errors import UserError
from acn_scale.models import build_model
from acn_scale.models.connectivity import CONNECTIVITY
from acn_scale.runs import read_json, read_metrics, run_folder, write_json

CONVERT = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"


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
        weights = dict(zip(reshape.names_in_order(engine), reshape.in_order(engine.optimizer)[1], strict=True))
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
            data={"kind": "text", "train": str(tmp_path / "train"), "eval": str(tmp_path / "eval"), "streams": 2}
            | {"mask_ratio": 0.3},
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
    assert net.card.masks == Masks(mask_ratio=0.3, whole_words=False)
    assert net.tokenizer == {TOKENIZER_NAME: (Path(cfg.data.train) / TOKENIZER_NAME).read_bytes()}


@pytest.mark.parametrize("model", [
    *(vit(connectivity=connectivity) for connectivity in CONNECTIVITY), mixer(connectivity="acn"),
    bert(connectivity="acn"), bert(connectivity="highway", norm="pre", num_classes=3),
], ids=described)  # fmt: skip
def test_a_cut_network_is_the_readout(exported: Callable[..., Path], model: ModelConfig) -> None:
    """Bit for bit after a reload, at every depth, and to rounding where the tokens that nobody reads are left out; by
    tolerance, at the cut-off."""
    net = network(model)
    batch = batch_for(net.model) | {"labels": torch.zeros(4, dtype=torch.long)}
    batch = {name: values for name, values in batch.items() if name != "labels"}
    if model.num_classes and isinstance(model, BertConfig):
        del batch["masked"]
    readouts = list(net.model.readouts(**batch))
    cuts = [({"depth": depth}, depth) for depth in (1, 2, 3)] + [({"tolerance": 1.5}, 2), ({"tolerance": 45.0}, 1)]
    for keys, depth in cuts:
        back = read_model(exported(net, "safetensors", **keys))
        *_, last = back.model.readouts(**batch)
        assert torch.equal(last, readouts[depth])
        torch.testing.assert_close(back.model(**batch)["logits"], last)
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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


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
                          ({"version": 1}, "version = 1: must be 2"), ({"extra": 1}, "extra: ")):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(values | change))
        assert words in complaint(folder, out)


def test_refused_checkpoints(
    two_ranks: Callable, vit: Callable[..., Config], exported: Callable[..., Path], tmp_path: Path
) -> None:
    cfg = vit(train={"zero_stage": 2, "length": "2step"})
    two_ranks(run, cfg)
    out, folder = tmp_path / "out", run_folder(cfg)
    checkpoint = complete(folder)[-1]
    assert "keeps no average of the weights" in complaint(checkpoint, out, average=True)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"attention_norm": false', '"attention_norm": true'))
    assert "lacks trunk.blocks" in complaint(folder, out)
    (folder / "config.json").write_text(config)
    part = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = part.read_bytes()
    flip(part)
    assert "its sha256 is not the one in state.json" in complaint(folder, out)
    part.unlink()
    assert f"{part}: No such file" in complaint(checkpoint, out)
    command = [CONVERT, folder, "--to", "safetensors", "--out", out]
    done = forked.command(*command)
    warning, error = done.stderr.splitlines()
    assert (done.returncode, out.exists()) == (2, False)
    assert warning.startswith(f"{checkpoint.name} is damaged and passed over: {part}: ")
    assert error.startswith(f"error: {part}: ")
    part.write_bytes(whole)
    shutil.copytree(checkpoint, checkpoint.with_name("step_00000003"))
    flip(checkpoint.with_name("step_00000003") / part.name)
    done = forked.command(*command, "--tolerance", 100)
    assert "step_00000003 is damaged and passed over: " in done.stderr
    assert done.stdout.startswith(f"{out}: vit, acn, 1 of 3 blocks, ")
    card = read_model(out).card
    assert (card.run, card.step, card.source) == ("tiny", 2, "tiny")
    assert card.data == f"{Path(cfg.data.train).parent.name}/train"
    theirs = exported(network(bert()), "hf")
    convert(f"hf:{theirs}", "safetensors", tmp_path / "again")
    assert read_model(tmp_path / "again").card.source == f"hf:{theirs.name}"


def test_a_curve_is_the_network_s_own(two_ranks: Callable, vit: Callable[..., Config], tmp_path: Path) -> None:
    """A checkpoint's is of its own step; without an evaluation there, and for an average, there is none."""
    cfg = vit(train={"ema_decay": 0.5}, checkpoint={"keep": 9})
    two_ranks(run, cfg)
    folder = run_folder(cfg)
    curves = {
        line["step"]: [line[f"eval/depth_{depth:02d}/accuracy"] for depth in range(4)]
        for line in read_metrics(folder)
        if "eval/loss" in line
    }
    assert curves[10] != curves[20]
    for step in (10, 20):
        card = read_model(folder / "checkpoints" / f"step_{step:08d}").card
        assert (card.accuracy, card.evaluated_at) == (curves[step], step)
    out, between = tmp_path / "out", folder / "checkpoints" / "step_00000015"
    assert f"{between} has no accuracy by depth of its own; give --depth" in complaint(between, out, tolerance=0.5)
    assert "the average in " in complaint(folder, out, tolerance=0.5, average=True)


def test_start_from(exported: Callable[..., Path]) -> None:
    """An ACN starts from residual weights; what may differ keeps its start and is named, all else is refused."""
    source = network(vit())
    folder = exported(source, "safetensors")
    joins = [f"trunk.joins.{join}.weight" for join in range(3)]
    inner_joins = [f"trunk.blocks.{block}.joins.{join}.scale" for block in range(3) for join in range(2)]
    for keys, kept in (
        ({"connectivity": "acn"}, []),
        ({"num_classes": 7}, ["head.linear.bias", "head.linear.weight"]),
        ({"connectivity": "denseformer"}, joins),
        ({"connectivity": "rezero"}, inner_joins),
    ):
        model = build_model(vit(**keys))
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        assert start_from(model, str(folder)) == kept
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name] if name in kept else source.weights()[name])
    for keys in ({"dim": 8}, {"depth": 2}, {"mlp_ratio": 2.0}, {"image_size": 12}):
        with pytest.raises(UserError, match=r"train.init_from = .*: .* in it, .* in this run's model"):
            start_from(build_model(vit(**keys)), str(folder))
    masked = network(bert())
    for source in (exported(masked, "safetensors"), f"hf:{exported(masked, 'hf')}"):
        model = build_model(bert(num_classes=2, connectivity="acn", max_tokens=5))
        kept = start_from(model, str(source), note=folder)
        assert json.loads((folder / START).read_text())["source"] == str(source)
        assert kept == [f"head.{part}.{kind}" for part in ("linear", "pooler") for kind in ("bias", "weight")]
        expected = masked.weights()
        expected["embed.position.weight"] = expected["embed.position.weight"][:5]
        assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters() if name not in kept)
    with pytest.raises(UserError, match=r"embed.position.weight: \(7, 16\) in it, \(9, 16\) in this run's model"):
        start_from(build_model(bert(num_classes=2, max_tokens=9)), str(source))


def test_the_map_to_other_classes_is_not_taken(exported: Callable[..., Path]) -> None:
    """Of a run of ours, as many as they are; another's network may name the same ones otherwise."""
    net = network(vit())
    ours = replace(net, card=net.card.model_copy(update={"run": "first"}))
    same, others = net.card.class_names(), [f"other {number}" for number in range(5)]
    for source, classes, kept in (
        (ours, others, [*OF_CLASSES]),
        (ours, same[::-1], [*OF_CLASSES]),
        (ours, same, []),
        (ours, [], []),
        (net, others, []),
    ):
        assert start_from(build_model(vit()), str(exported(source, "safetensors")), classes) == kept


def test_a_digest_is_of_the_values() -> None:
    """Whatever they are stored in: a Hugging Face folder may hold 16 bits."""
    half = torch.arange(6.0).view(2, 3).to(torch.bfloat16)
    assert digest_of({"x": half.T}) == digest_of({"x": half.T.float().contiguous()}) != digest_of({"y": half.T})


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
    card = read_json(source / "config.json")
    card["images"]["classes"] = [f"other {name}" for name in card["images"]["classes"]]
    write_json(source / "config.json", card)
    other = vit(run={"name": "other"}, train=train, optim={"lr": 1e-9})
    two_ranks(run_until, other, 7)
    weights = read_model(run_folder(other)).weights().items()
    assert {name for name, weight in weights if (weight - expected[name]).abs().max() > 1e-7} == {*OF_CLASSES}
    shutil.rmtree(source)
    two_ranks(run, cfg)
    assert read_model(run_folder(cfg)).card.step == 10
    refusal = two_ranks(refused, vit(run={"name": "third"}, train=train))
    assert "source: holds no complete checkpoint and no export" in refusal[0]
