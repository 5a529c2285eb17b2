"""Every shipped config loads, builds, and is told apart from its twin by what its header says."""

from itertools import takewhile
from pathlib import Path

import pytest
import torch

from acn_scale.cli import load_config
from acn_scale.durations import Horizon
from acn_scale.models import build_model

CONFIGS = Path(__file__).parents[1] / "configs"
paths = sorted(CONFIGS.rglob("*.toml"))
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
    header = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert f"acn_scale/pretrain.py --config configs/{path.relative_to(CONFIGS)}\n" in header
    assert "# Cost:" in header
    assert "# Expected:" in header


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
    """Their batches divide over 1, 2, 4 and 8 GPUs; bf16, and ZeRO shards the fp32 weights behind it."""
    for path in (path for path in paths if path.parent.name != "quickstart"):
        cfg = load_config(path)
        assert all(cfg.micro_batch_size(world_size) for world_size in (1, 2, 4, 8)), path
        assert (cfg.train.precision, cfg.train.zero_stage in (1, 2)) == ("bf16", True), path


def test_every_full_scale_config_has_a_twin() -> None:
    assert [ac.name for ac, residual in twins if not residual.exists()] == ["ac_bert.toml"]  # the text quickstart
