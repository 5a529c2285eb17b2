"""Every shipped config loads, builds, and is told apart from its twin by what its header says."""

import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from acn_scale.cli import load_config
from acn_scale.durations import Horizon
from acn_scale.models import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "launchers"))

from chain import read_chain

CONFIGS = Path(__file__).parents[1] / "configs"
everything = sorted(CONFIGS.rglob("*.toml"))
# What is no run by itself: stages, recipes whose model comes from a source, and what a study changes.
COMMANDS = {
    "chain": "launchers/chain.py",
    "glue": "acn_scale/finetune.py|launchers/glue.py",
    "transfer": "acn_scale/finetune.py",
    "studies": "tools/reproduce.py",
}
paths = [path for path in everything if path.parent.name not in COMMANDS]
twins = [(path, path.with_name(path.name.replace("ac_", "residual_"))) for path in paths if "ac_" in path.name]


@pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)
def test_config_loads_builds_and_says_what_it_is(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.run.name == str(path.relative_to(CONFIGS).with_suffix(""))
    assert cfg.micro_batch_size(1)
    horizon = Horizon.of(cfg.train.length, 1_281_167, cfg.train.global_batch_size)  # images of ImageNet
    assert horizon.count(cfg.optim.warmup) < horizon.steps
    with torch.device("meta"):
        build_model(cfg.model)
    assert f"acn_scale/pretrain.py --config configs/{path.relative_to(CONFIGS)}\n" in header_of(path)


def header_of(path: Path) -> str:
    return "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))


@pytest.mark.parametrize("path", everything, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_says_how_it_is_run_and_what_comes_of_it(path: Path) -> None:
    for part in ("# Command:", COMMANDS.get(path.parent.name, "acn_scale/pretrain.py"), "# Cost:", "# Expected:"):
        assert any(each in header_of(path) for each in part.split("|")), part


def test_what_is_no_run_is_read_too() -> None:
    """Recipes with the model of a network; studies as they are; chains with their configs."""
    sources = {"glue": "bert/ac_bert_base.toml", "transfer": "mixer/ac_mixer_cifar100.toml"}
    for path in (path for path in everything if path.parent.name in COMMANDS):
        if path.parent.name == "chain":
            assert read_chain(path).stage
            continue

        def complete(values: dict[str, Any], kind: str = path.parent.name) -> dict[str, Any]:
            model = load_config(CONFIGS / sources[kind]).model.model_dump() if kind in sources else {}
            classes = {"num_classes": 2 if kind == "glue" else 10} if model else {}
            data = {"tokenizer": "data/tokenizer"} if kind == "glue" else {}
            train = {"init_from": "runs/network"} if model else {}
            return values | {
                "model": model | classes | values.get("model", {}),
                "data": data | values["data"],
                "train": train | values["train"],
            }

        assert load_config(path, (), complete).micro_batch_size(1)


@pytest.mark.parametrize(("ac", "residual"), [pair for pair in twins if pair[1].exists()], ids=lambda path: path.stem)
def test_twins_differ_in_connectivity_alone(ac: Path, residual: Path) -> None:
    """And, where the paper trains the ACN for longer, in length."""
    first, second = (load_config(path).model_dump() for path in (ac, residual))
    assert (first["model"].pop("connectivity"), second["model"].pop("connectivity")) == ("acn", "residual")
    for values in (first, second):
        values["run"].pop("name")
        values["train"].pop("length")
    assert first == second


def test_full_scale_runs_fit_whole_nodes() -> None:
    """Their batches divide over 1, 2, 4 and 8 GPUs; bf16, and ZeRO shards the fp32 weights behind it, but where updates
    are edited."""
    for path in (path for path in paths if path.parent.name != "quickstart"):
        cfg = load_config(path)
        assert all(cfg.micro_batch_size(world_size) for world_size in (1, 2, 4, 8)), path
        if cfg.continual.tasks > 1:
            continue
        assert (cfg.train.precision, cfg.train.zero_stage in (1, 2)) == ("bf16", True), path


def test_every_full_scale_config_has_a_twin() -> None:
    assert [ac.name for ac, residual in twins if not residual.exists()] == ["ac_bert.toml"]  # the text quickstart
