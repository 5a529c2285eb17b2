"""Cut-off, savings, schedules, and that every tool has its help."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from acn_scale.config import MixerConfig, OptimConfig, ViTConfig
from acn_scale.depth import cost, cutoff
from acn_scale.durations import Horizon
from acn_scale.models import build_model
from acn_scale.optim import learning_rate, parameter_groups

TOOLS = Path(__file__).parents[1] / "tools"


def test_cutoff_is_the_smallest_depth_within_tolerance() -> None:
    accuracy = [0.1, 0.5, 0.945, 0.93, 0.95]
    assert [cutoff(accuracy, tolerance) for tolerance in (0, 0.4, 0.5, 2, 60, 100)] == [4, 4, 2, 2, 1, 0]
    assert cutoff([0.3], 0) == 0


def test_cost_is_that_of_the_cut_model() -> None:
    """ViT-B/16: the paper's 33.7 and 19.7 GFLOPs count linear maps alone; attention's products come on top, and what
    the last block leaves out goes off: all but q, k and v of the tokens that the head does not take."""
    cfg = ViTConfig(name="vit", size="B", connectivity="acn", image_size=224, patch_size=16, num_classes=1000)
    attention = 2 * 2 * 197 * 768  # of a token
    left_out = 196 * (2 * 9 * 768 * 768 + attention)
    for depth, paper in ((12, 33.7), (7, 19.75)):
        assert cost(cfg, depth).flops == pytest.approx(paper * 1e9 + depth * 197 * attention - left_out, abs=5e7)
    assert (cost(cfg, 7).parameters, cost(cfg, 12).parameters) == (51_128_296, 86_567_656)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_learning_rates(schedule: str) -> None:
    """Up in a line, never above the peak, down to final_lr at the end; constant in between with wsd only."""
    cfg = OptimConfig(lr=2.0, schedule=schedule, warmup="10step", decay="0.2run", final_lr=0.1)
    rates = [learning_rate(cfg, Horizon(1, 1, 100), step) for step in range(101)]
    assert rates[:10] == pytest.approx([2 * (step + 1) / 11 for step in range(10)])
    assert max(rates) == rates[10] == 2.0
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert (rates[79] == 2.0) == (schedule == "wsd")
    assert rates[55] == pytest.approx({"cosine": 1.1, "linear": 1.1, "wsd": 2.0}[schedule])


def test_no_weight_decay_on_vectors() -> None:
    shape = {"depth": 2, "dim": 8, "image_size": 4, "patch_size": 2, "num_classes": 3, "token_dim": 4, "channel_dim": 4}
    model = build_model(MixerConfig(name="mixer", connectivity="denseformer", **shape))
    decayed, others = parameter_groups(model, OptimConfig(lr=1e-3, weight_decay=0.3))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted(TOOLS.glob("*.py")), ids=lambda tool: tool.stem)
def test_tools_answer_help(tool: Path) -> None:
    done = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage:" in done.stdout
