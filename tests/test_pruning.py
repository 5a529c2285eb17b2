"""Pruning: what becomes zero and stays so, that stopping changes nothing, and what is told of networks side by side."""

import math
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from made import write_folder
from networks import bert, mixer, network, same
from networks import vit as vit_model
from pydantic import ValidationError
from test_pretrain import dying, measured, named, run, run_until
from torch import nn

from acn_scale import distributed, movement
from acn_scale.config import Config, ModelConfig
from acn_scale.convert import read_model
from acn_scale.convert.export import write_export
from acn_scale.data import build_stream
from acn_scale.durations import Horizon
from acn_scale.engine import build_engine, train_step
from acn_scale.errors import UserError
from acn_scale.models import build_model
from acn_scale.movement import Movement
from acn_scale.optim import build_optimizer, learning_rate
from acn_scale.pruning import prunable, prune_by_magnitude, prune_by_movement, sparsity
from acn_scale.report.subject import open_subjects
from acn_scale.runs import read_json, read_metrics, run_folder, write_json
from acn_scale.sparsity import prune_networks

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("model", "maps"), [
    (vit_model(connectivity="highway", inner="dense", attention_norm=True), {"qkv", "proj", "fc1", "fc2"}),
    (mixer(connectivity="dense", wrapper=True), {"proj", "fc1", "fc2"}),
    (bert(), {"qkv", "proj", "fc1", "fc2"}),
], ids=lambda each: getattr(each, "name", ""))  # fmt: skip
def test_by_magnitude(model: ModelConfig, maps: set[str]) -> None:
    """Exactly so many zeros, the smallest weights of all blocks together, and nothing but the blocks' linear maps."""
    net = network(model).model
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    mine = [name for name in before if name.startswith("trunk.blocks.") and name.split(".")[-2] in maps]
    mine = [name for name in mine if name.endswith(".weight")]
    assert [id(weight) for weight in prunable(net)] == [id(net.get_parameter(name)) for name in mine]
    count = sum(before[name].numel() for name in mine)
    total = sum(weight.numel() for weight in before.values())
    for share in (0.0, 0.3, 0.999, 1.0):
        prune_by_magnitude(net, share)
        pruned = {name: net.get_parameter(name) == 0 for name in mine}
        zeros = sum(int(each.sum()) for each in pruned.values())
        assert zeros == round(share * count)
        assert sparsity(net) == pytest.approx({"sparsity": zeros / count, "sparsity_all": zeros / total})
        for name, weight in net.named_parameters():
            kept = ~pruned[name] if name in pruned else torch.ones_like(weight, dtype=torch.bool)
            assert torch.equal(weight[kept], before[name][kept])
        low = torch.cat([before[name][each].abs() for name, each in pruned.items()])
        high = torch.cat([before[name][~each].abs() for name, each in pruned.items()])
        assert not len(low) or not len(high) or low.max() <= high.min()


PRUNE = {"prune": {"share": 0.3, "every": "4step"}, "eval": {"every": "4step"}}


def test_a_run_that_prunes(two_ranks: Callable, vit: Callable[..., Config]) -> None:
    """Each sparsity is trained with before it is measured; stopped anywhere, it is the same run bit for bit."""
    train = {"log_every": "1step", "micro_batch_size": 4}
    whole = vit(run={"name": "whole"}, train=train, model={"dropout": 0.1, "connectivity": "dense"}, **PRUNE)
    broken = named(whole, "broken")
    two_ranks(run, whole)
    found = [line["prune/sparsity"] for line in measured(whole) if "prune/sparsity" in line]
    assert found == pytest.approx([1 - 0.7**times for times in range(5)], abs=1e-3)
    assert all(line["prune/sparsity_all"] < line["prune/sparsity"] for line in measured(whole)[9::10])
    for step in (9, 14):  # right after a pruning, before any checkpoint knows of it, and in between
        two_ranks(run_until, broken, step)
    two_ranks(run, broken)
    assert measured(broken) == measured(whole)
    assert same(*(read_model(run_folder(each)) for each in (whole, broken)))


def test_what_is_pruned_is_masked_everywhere(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """As PyTorch alone does it, with masks on gradients, weights and Adam's moments at every step."""
    cfg = vit(train={"length": "12step", "clip_norm": 0.5}, optim={"weight_decay": 0.1, "eps": 1e-4}, **PRUNE)
    one_rank(run, cfg)
    expected = plain_run(cfg)
    weights = read_model(run_folder(cfg)).weights()
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
        assert torch.equal(weights[name] == 0, weight == 0)


def plain_run(cfg: Config) -> nn.Module:
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model)
    optimizer, stream = build_optimizer(model, cfg.optim), build_stream(cfg)
    horizon = Horizon.of(cfg.train.length, stream.samples.num_samples, cfg.train.global_batch_size)
    linear = [part.weight for part in model.trunk.modules() if isinstance(part, nn.Linear)]
    masks = [torch.ones_like(weight) for weight in linear]
    total = sum(weight.numel() for weight in linear)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, horizon, step)
        model(**next(stream))["loss"].backward()
        if step in (4, 8):
            scores = [(weight * weight.grad).detach().abs() for weight in linear]
            left = torch.cat([score[mask > 0] for score, mask in zip(scores, masks, strict=True)])
            threshold = left.sort().values[len(left) - round(total * 0.7 ** (step // 4))]
            for mask, score in zip(masks, scores, strict=True):
                mask *= score >= threshold
        hold(linear, masks, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        hold(linear, masks, optimizer)
        optimizer.zero_grad()
    return model


@torch.no_grad()
def hold(weights: list[nn.Parameter], masks: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    for weight, mask in zip(weights, masks, strict=True):
        state = optimizer.state[weight]
        for values in (weight, weight.grad, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)):
            values *= mask


def sparsities_around_a_bad_step(cfg: Config) -> list[tuple[bool, float]]:
    engine = build_engine(build_model(cfg.model), cfg, CPU, distributed.world_size())
    horizon = Horizon(1400, cfg.train.global_batch_size, 20)
    found = []
    for step, value in enumerate((0.5, np.nan, 0.5)):
        batch = {"images": torch.rand(16, 1, 8, 8) * value, "labels": torch.arange(16) % 10}
        edit = partial(prune_by_movement, cfg.prune, horizon, engine, step)
        applied = train_step(engine, iter([batch]), 1e-3, edit=edit).applied
        found.append((applied, sparsity(engine.module)["sparsity"]))
    return found


def test_a_bad_step_prunes_nothing(one_rank: Callable, vit: Callable[..., Config]) -> None:
    """What was due at it is pruned at the next good one."""
    ((first, bad, good),) = one_rank(sparsities_around_a_bad_step, vit(prune={"share": 0.5, "every": "1step"}))
    assert (first, bad) == ((True, 0.0), (False, 0.0))
    assert good == (True, pytest.approx(0.75, abs=1e-3))


@pytest.mark.parametrize(("train", "message"), [
    ({"zero_stage": 1}, "train.zero_stage = 1: prune.share = 0.3 takes 0"),
    ({"precision": "bf16"}, "train.precision = bf16: prune.share = 0.3 takes fp32"),
    ({"ema_decay": 0.9}, "train.ema_decay = 0.9: prune.share = 0.3 takes 0.0"),
])  # fmt: skip
def test_what_a_run_that_prunes_cannot_be(vit: Callable[..., Config], train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        vit(train=train, **PRUNE)


def command(*arguments: Any) -> None:
    """python tools/prune.py ARGUMENTS, in this process."""
    tool = ROOT / "tools" / "prune.py"
    with patch.object(sys, "argv", [str(tool), *map(str, arguments)]):
        runpy.run_path(str(tool))["main"]()


def test_networks_side_by_side(
    twins: list[Path], tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each at its own cut-off; what is pruned most is exported whole, and is then evaluated the same."""
    out, export = tmp_path / "out", tmp_path / "export"
    options = ["--tolerance", 5, "--out", out, "--export", export, "--json", tmp_path / "numbers.json"]
    command(*twins, "--method", "magnitude", "--sparsities", 0.5, 0, 1, 0.5, *options)
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"magnitude_pruning.json", "magnitude_pruning.png"}
    assert (out / "magnitude_pruning.json").read_bytes() == (tmp_path / "numbers.json").read_bytes()
    numbers = read_json(tmp_path / "numbers.json")["networks"]
    for folder, net in zip(twins, numbers, strict=True):
        last = [line for line in read_metrics(folder) if "eval/loss" in line][-1]
        whole, cut = read_model(folder), read_model(folder).cut_within(5.0)
        depth = cut.card.model.depth
        sizes = [sum(weight.numel() for weight in each.model.parameters()) for each in (whole, cut)]
        assert (net["depth"], net["full_depth"], net["full_parameters"], net["parameters"]) == (depth, 3, *sizes)
        assert [point["sparsity"] for point in net["points"]] == pytest.approx([0, 0.5, 1], abs=1e-3)
        assert net["points"][0]["accuracy"] == pytest.approx(last[f"eval/depth_{depth:02d}/accuracy"], abs=1e-9)
        linear = sum(weight.numel() for weight in prunable(cut.model))
        assert net["points"][-1]["left"] <= sizes[1] - linear
        name = f"  {folder.name}, {depth} of 3 blocks"
        cells = [f"{100 * point['accuracy']:.1f}" for point in net["points"]]
        assert [name.split() + cells] == [line.split() for line in printed.splitlines() if line.startswith(name)][:1]

    again = read_json(export / "ac_vit" / "config.json")
    assert (again["sparsity"], again["accuracy"], again["full_depth"]) == (1.0, None, 3)
    prune_networks([export / "ac_vit"], [0.0], data=f"{digits}/eval", out=out)
    (net,) = read_json(out / "magnitude_pruning.json")["networks"]
    assert net["points"] == [pytest.approx(numbers[0]["points"][-1])]


def moved(folders: list[Path], die_in: int, *options: Any) -> None:
    """In this process, which is in a group of ranks already."""
    movement.process_group = lambda: nullcontext(CPU)
    keys = ["--sparsities", 0, 0.6, "--share", 0.4, "--every", "5step", "--set", "optim.lr=1e-3"]
    with dying(die_in):
        command(*folders, "--method", "movement", "--depth", 2, *keys, *options)


def test_by_movement(one_rank: Callable, twins: list[Path], tmp_path: Path) -> None:
    """A run of each network, which the same command takes up where it was; the curve is its metrics'. What the network
    was trained with is kept, but for what would change which network it is."""
    annealed = shutil.copytree(twins[0], tmp_path / twins[0].name)
    config = read_json(annealed / "config.json")
    config["train"] |= {"anneal": "20step", "freeze": True, "init_from": "elsewhere", "zero_stage": 3}
    write_json(annealed / "config.json", config)
    twins = [annealed, twins[1]]
    out, export, unbroken = tmp_path / "out", tmp_path / "export", tmp_path / "unbroken"
    one_rank(moved, twins, 12, "--out", out, "--export", export)
    assert {path.name for path in out.iterdir()} == {"movement"}
    assert not export.exists()
    one_rank(moved, twins, 99, "--out", out, "--export", export)
    one_rank(moved, twins, 99, "--out", unbroken)
    files = [folder / "movement_pruning.json" for folder in (out, unbroken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for folder, net in zip(twins, read_json(files[0])["networks"], strict=True):
        found = out / "movement" / folder.name / "depth_02_share_0.4_times_2"
        lines = [line for line in read_metrics(found) if "prune/sparsity" in line]
        assert [line["step"] for line in lines] == [5, 10, 15]
        assert [line["prune/sparsity"] for line in lines] == pytest.approx([0, 0.4, 0.64], abs=1e-3)
        assert [point["accuracy"] for point in net["points"]] == [line["eval/accuracy"] for line in lines]
        assert [point["sparsity"] for point in net["points"]] == [line["prune/sparsity"] for line in lines]
        train = read_json(found / "config.json")["train"]
        assert [train[key] for key in ("anneal", "freeze", "zero_stage", "clip_norm")] == ["0step", False, 0, 1.0]
        start, end, exported = read_model(found / "start"), read_model(found), read_model(export / folder.name)
        assert same(start, read_model(folder).cut(2))
        assert same(end, exported)
        assert (net["depth"], net["full_depth"]) == (exported.card.model.depth, exported.card.full_depth) == (2, 3)


def test_an_epoch_of_tasks_is_of_one_of_them(one_rank: Callable, vit: Callable[..., Config], tmp_path: Path) -> None:
    """As everywhere in a run that learns tasks one after another."""
    cfg = vit(continual={"tasks": 5})
    one_rank(run, cfg)
    (subject,) = open_subjects([run_folder(cfg)], None)
    found = movement._config(subject, Movement(0.5, 0.5, "1ep", []), tmp_path / "out")
    assert found.train.length == f"{2 * Horizon(1400 // 5, 16).count('1ep')}step"


def test_a_masked_language_model(tmp_path: Path) -> None:
    """An export, on data that it is given."""
    net, export = network(bert()), tmp_path / "export"
    export.mkdir()
    write_export(net, export, "fp32")
    random = np.random.default_rng(0)
    records = [{"npy": random.integers(5, 300, (1, 7)).astype(np.uint16)} for _ in range(40)]
    data = write_folder(tmp_path / "data", [records], {"kind": "text", "vocab_size": 300, "tokens": 7})
    printed = prune_networks([export], [0.0, 0.9], data=str(data))
    assert printed.splitlines()[1] == "accuracy on masked tokens (%)"
    (numbers,) = read_json(export / "report" / "magnitude_pruning.json")["networks"]
    assert numbers["points"][0]["loss"] != numbers["points"][1]["loss"]


def test_refusals(twins: list[Path], tmp_path: Path) -> None:
    """In one line, before anything is written or trained."""
    out, file, export = tmp_path / "out", tmp_path / "file", tmp_path / "source"
    file.touch()
    export.mkdir()
    write_export(network(vit_model()), export, "fp32")

    def move(sparsity: float = 0.5, share: float = 0.5, *overrides: str) -> Movement:
        return Movement(sparsity, share, "1ep", overrides)

    cases: list[tuple[Path, Any, dict[str, Any], str]] = [
        (tmp_path, [0.5], {}, "no complete checkpoint and no export"),
        (twins[0], [0.5], {"depth": 4}, "--depth 4: must be 1 to 3"),
        (twins[0], [0.5], {"tolerance": -1.0}, "--tolerance -1.0: must be 0 to 100"),
        (twins[0], [0.5], {"tolerance": math.nan}, "--tolerance nan: must be 0 to 100"),
        (twins[0], [0.5], {"out": file / "out"}, "no folder that can be written to"),
        (twins[0], [0.5], {"numbers": file / "x.json"}, "is not a folder"),
        (twins[0], [0.5], {"export": twins[0]}, f"--export {twins[0]}: is there already"),
        (twins[0], [0.5], {"export": file / "x"}, f"--export {file}/x: {file} is no folder that can be written to"),
        (export, [0.5], {}, "an export has no evaluation shards of its own"),
        (export, move(), {"data": f"{twins[0]}"}, "index.json: No such file"),
        (twins[0], move(share=0.0), {}, "--share 0.0: must be more than 0 and less than 1"),
        (twins[0], move(share=1.0), {}, "--share 1.0: must be"),
        (twins[0], move(sparsity=1.0), {}, "--sparsities 1: movement"),
        (twins[0], move(0.5, 0.5, "optim.lrr=1"), {}, "optim.lrr: no such key; the nearest is optim.lr"),
        (twins[0], move(0.5, 0.5, "optim.lr"), {}, "an override is key.sub=value"),
        (twins[0], move(0.5, 0.5, "model.depth=1"), {}, "--set model.depth=1: that is set by the pruning itself"),
        (twins[0], move(0.5, 0.5, 'train={length="1ep"}'), {}, "that is set by the pruning itself"),
        (twins[0], move(0.5, 0.5, "prune.every=1ep"), {}, "that is set by the pruning itself"),
        (twins[0], move(0.5, 0.5, "train.zero_stage=2"), {}, "train.zero_stage = 2: prune.share = 0.5 takes 0"),
        (twins[0], move(0.5, 0.5, "data.train=nowhere"), {}, "nowhere/index.json: No such file"),
    ]
    for folder, plan, keys, message in cases:
        with pytest.raises(UserError) as caught:
            prune_networks([folder], plan, **{"out": out} | keys)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not out.exists()
