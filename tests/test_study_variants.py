"""The studies of connectivity, gradients and noise: what their tables say is what the run folders hold."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import studied
import torch
from ranks import Ranks
from studied import read_out, written
from test_pretrain import run

from acn_scale import checkpoint, pretrain
from acn_scale.config import OF_SUBLAYERS, Config
from acn_scale.data.image_noise import PAPER
from acn_scale.depth import cost, cutoff
from acn_scale.downstream.noise_table import PUBLISHED
from acn_scale.engine import Step
from acn_scale.errors import UserError
from acn_scale.gradients import backward_paths
from acn_scale.models.connectivity import patterns
from acn_scale.results import Measurement, read_measurements, write_measurements
from acn_scale.runs import read_config, read_json, read_metrics, run_folder, write_json
from acn_scale.studies import STUDIES, connectivity, gradients, noise, runner
from acn_scale.studies.study import TOLERANCE, Findings, Runs, Setting


def setting(folder: Path, scale: str = "laptop") -> Setting:
    return Setting(scale=scale, seeds=[0], data="digits", folder=folder)


@pytest.fixture
def runs(twins: list[Path], tmp_path: Path) -> dict[str, Runs]:
    """Copies of an ACN and its residual twin, which a study may write to."""
    found = {}
    for name, folder in zip(("acn", "residual"), twins, strict=True):
        shutil.copytree(folder, tmp_path / name)
        cfg = read_config(folder)
        found[name] = Runs([replaced(cfg, "run", dir=str(tmp_path), name=name)])
    return found


def replaced(cfg: Config, section: str, **keys: object) -> Config:
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=keys)})


def rows(found: Findings) -> dict[str, list[str]]:
    assert len({len(row) for row in found.table}) == 1
    return {" ".join(row[:2]): row[2:] for row in found.table}


@pytest.mark.parametrize("name", ["connectivity", "gradients", "noise"])
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_variants_differ_in_the_connectivity_alone(tmp_path: Path, name: str, scale: str) -> None:
    """Stochastic depth in drop_path; the paper trains an ACN longer than its twin, and its dense Mixer is another."""
    here = setting(tmp_path, scale)
    configs = {trial.name: trial.config_of(0, here, []) for trial in STUDIES[name].trials(here)}
    same = {"connectivity": "acn", "drop_path": 0.0}
    if table_5 := (name, scale) == ("connectivity", "paper"):
        same |= {"wrapper": True, "inner": "auto", "depth": 16}
    seen = {replaced(cfg, "model", **same).model_dump_json(exclude={"run"}) for cfg in configs.values()}
    assert len(seen) == (2 if (name, scale) == ("noise", "paper") else 1)
    assert len({(cfg.model.connectivity, cfg.model.drop_path) for cfg in configs.values()}) == len(configs)
    for trial, cfg in configs.items():
        assert cfg.model.connectivity == (trial if trial != "stochastic_depth" else "residual")
    assert len(configs) == {"connectivity": 13 - table_5, "gradients": 4, "noise": 2}[name]


def test_the_networks_of_table_5(tmp_path: Path) -> None:
    """The authors' Mixers, as far as a pattern leaves their wrapper its place, and their DenseNet of ten blocks."""
    here = setting(tmp_path, "paper")
    configs = {trial.name: trial.config_of(0, here, []) for trial in STUDIES["connectivity"].trials(here)}
    assert {name for name, cfg in configs.items() if not cfg.model.wrapper} == {*OF_SUBLAYERS} - {"value_residual"}
    for name, parameters in (("acn", 2_527_002), ("residual", 2_527_002), ("dense", 2_483_476 + 10 * 128 * 128)):
        cfg = configs[name]  # ours mixes the output too: each of ten matrices takes in one block more
        assert (cfg.train.length, cost(cfg.model, cfg.model.depth).parameters) == ("700ep", parameters)


def test_the_gradients_of_figure_2_are_of_mixers(tmp_path: Path) -> None:
    """Without the authors' block, in which a residual network has no direct part."""
    here = setting(tmp_path, "paper")
    for trial in STUDIES["gradients"].trials(here):
        cfg = trial.config_of(0, here, [])
        assert (cfg.model.name, cfg.model.depth, cfg.model.wrapper, cfg.train.length) == ("mixer", 16, False, "100ep")


def test_what_the_connectivity_study_says(runs: dict[str, Runs], tmp_path: Path) -> None:
    found = connectivity.findings(runs, setting(tmp_path))
    for name, accuracy, cut, blocks, step, memory, published in found.table[1:]:
        lines = read_metrics(tmp_path / name)
        last = [line for line in lines if "eval/loss" in line][-1]
        curve = [last[f"eval/depth_{depth:02d}/accuracy"] for depth in range(4)]
        assert (float(accuracy), float(cut), blocks) == (round(100 * curve[-1], 1), cutoff(curve, TOLERANCE), "3")
        speeds = [line["speed/samples_per_second"] for line in lines if "speed/samples_per_second" in line]
        assert float(step) == pytest.approx(1000 * 64 / max(speeds), abs=0.051)
        assert 0 < float(memory) == pytest.approx(connectivity.step_mebibytes(runs[name].configs[0]), abs=0.051)
        assert published == connectivity.PUBLISHED[name]
    plain, dense = (replaced(runs["acn"].configs[0], "model", connectivity=name) for name in ("feedforward", "dense"))
    assert connectivity.step_mebibytes(dense) > connectivity.step_mebibytes(plain)


def test_the_cutoff_of_a_network_that_learned_little_says_little(tmp_path: Path) -> None:
    """Little beside the best, of what is above chance, a tenth."""
    here = studied.setting(tmp_path, 0)
    curves = {"feedforward": [0.1, 0.1, 0.1, 0.1], "acn": [0.1, 0.7, 0.9, 0.9], "residual": [0.1, 0.2, 0.5, 0.92]}
    curves |= {"highway": [0.1, 0.2, 0.4, 0.49], "rezero": [0.1, 0.2, 0.4, 0.52]}
    said = connectivity.sentences({name: written(here, name, read_out(curve)) for name, curve in curves.items()})
    assert "below its twin's on 1 of 1 seeds; its accuracy at full depth is 2.0 points lower" in said[0]
    assert said[1] == "residual is the most accurate; of the 2 within 3 points of it, acn has the lowest cut-off."
    assert said[2:] == [
        f"{name} is not half as far above chance as residual: its cut-off says little."
        for name in ("feedforward", "highway")
    ]


def test_dense_is_said_to_have_no_skips_inside(tmp_path: Path) -> None:
    """As the published one has, where it has none."""
    (trial,) = [each for each in STUDIES["connectivity"].trials(setting(tmp_path)) if each.name == "dense"]
    model = trial.config_of(0, setting(tmp_path), []).model
    said = connectivity.differences(setting(tmp_path))[0]
    assert ("where here it has none inside" in said) == (patterns("dense", model.inner) == ("dense", "feedforward"))


def test_what_the_gradient_study_says(runs: dict[str, Runs], tmp_path: Path) -> None:
    for each in runs.values():
        gradients.measure(each.configs[0])
    found = gradients.findings(runs, setting(tmp_path))
    table = rows(found)
    for name in runs:
        splits = read_json(tmp_path / name / gradients.SPLITS)
        assert [each["step"] for each in splits] == [20, 40]
        for row, each in (("after 50% of the run", splits[0]), ("after 100% of the run", splits[-1])):
            parts = [each["parts"][f"block_{block:02d}"] for block in (1, 2, 3)]
            shares = [part["direct"] / part["full"] for part in parts]
            assert list(map(float, table[f"{name} direct / all, {row}"])) == pytest.approx(shares, rel=0.06)
            assert shares[-1] == 1.0 and shares[0] != 1.0
        lines = [line for line in read_metrics(tmp_path / name) if "grad_norm/block_01" in line]
        for row, line in (("first", lines[0]), ("last", lines[-1])):
            norms = [line[f"grad_norm/block_{block:02d}"] for block in (1, 2, 3)]
            assert list(map(float, table[f"{name} gradient norm, {row} tenth"])) == pytest.approx(norms, rel=0.06)
    assert table["acn paths back to the block"] == ["3", "2", "1"]
    assert table["residual paths back to the block"] == ["4", "2", "1"]
    assert "after clipping; these are of whole blocks of a small ViT, and before clipping." in found.sentences[-1]
    first = [gradients.direct_shares(runs[name])[0.5][0, 0] for name in runs]
    assert first[0] != first[1]


def run_stopped(cfg: Config, step: int) -> None:
    """As if a signal had asked for it in this step."""
    whole_step = pretrain.train_step

    def stopping_step(engine: Any, *args: Any, **keywords: Any) -> Step:
        result = whole_step(engine, *args, **keywords)
        return replace(result, stop=engine.global_steps == step)

    with patch.object(pretrain, "train_step", stopping_step):
        run(cfg)


@pytest.mark.parametrize(("scale", "measured"), [("laptop", [5, 10, 15, 21]), ("paper", [7, 12, 16, 21])])
def test_what_is_measured_is_after_each_quarter(
    one_rank: Ranks, vit: Callable[..., Config], tmp_path: Path, scale: str, measured: list[int]
) -> None:
    """The first checkpoint from there on, were it of a stop. The paper's run keeps its own time between two of them."""
    study = STUDIES["gradients"].trials(setting(tmp_path, scale))[0]
    keys = dict(each.removeprefix("checkpoint.").split("=") for each in study.overrides if "checkpoint." in each)
    cfg = vit(train={"length": "21step"}, checkpoint={"every": "4step"} | keys)
    for step in (3, 7, 18):
        one_rank(run_stopped, cfg, step)
        assert checkpoint.complete(run_folder(cfg))[-1].name == f"step_{step:08d}"
    one_rank(run, cfg)
    gradients.measure(cfg)
    splits = read_json(run_folder(cfg) / gradients.SPLITS)
    assert [(each["share"], each["step"]) for each in splits] == [*zip((0.25, 0.5, 0.75, 1.0), measured, strict=True)]


def test_steps_that_a_seed_lacks_are_left_out(tmp_path: Path) -> None:
    """A bad step has no gradient norms, and where a save failed nothing was measured."""
    here = studied.setting(tmp_path, 0, 1)

    def line(step: int) -> dict[str, float]:
        return {"step": step} | {f"grad_norm/block_{block:02d}": 100.0 * step + block for block in range(1, 13)}

    bad, half_bad = {"step": 2}, line(4) | {"grad_norm/block_01": 1.0}
    del half_bad["grad_norm/block_07"]
    runs = written(here, "acn", [line(1), bad, line(3), line(4)], [line(1), line(2), line(3), half_bad])
    found = gradients.norms(runs)
    assert found.shape == (12, 2) and found[4].tolist() == [105.0, 305.0]
    for cfg, parts in zip(runs.configs, ((1, 3, 4), (1, 2, 4)), strict=True):
        splits = [{"share": part / 4, "parts": {"block_01": {"direct": part, "full": 4}}} for part in parts]
        write_json(run_folder(cfg) / gradients.SPLITS, splits)
    shares = {share: part.tolist() for share, part in gradients.direct_shares(runs).items()}
    assert shares == {0.25: [[0.25], [0.25]], 1.0: [[1.0], [1.0]]}


@pytest.mark.parametrize("depth", [2, 12])
def test_closed_forms_against_autograd(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def worst() -> float:
        return float(gradients.line_sentence(depth).partition("gradients to ")[2].split()[0])

    assert worst() < 1e-12
    for pattern in gradients.PATTERNS:
        entering = [2**block if pattern == "residual" else 1 for block in range(depth)]
        paths = [count * into for count, into in zip(backward_paths(pattern, depth), entering, strict=True)]
        assert gradients.line_gradients(pattern, torch.ones(depth)).tolist() == paths
    assert "times that of the paths that enter the block." in gradients.line_sentence(depth)
    right = gradients.line_gradients
    monkeypatch.setattr(gradients, "line_gradients", lambda pattern, weights: right("acn", weights))
    assert worst() > 1e-3


def test_what_the_noise_study_says(one_rank: Ranks, runs: dict[str, Runs], tmp_path: Path) -> None:
    """The numbers that tools/evaluate_images.py leaves in a run, at full depth and at the cut-off by clean images."""
    study = STUDIES["noise"]
    with pytest.raises(UserError, match="acn/eval: lacks results"):
        study.findings(runs, setting(tmp_path))
    for each in runs.values():
        assert not runner.finished(each.configs[0], study)
        one_rank(noise.measure, each.configs[0])
        assert runner.finished(each.configs[0], study)
    found = study.findings(runs, setting(tmp_path))
    for name, each in runs.items():
        full, cut = [row for row in found.table if row[0] == name]
        curves = curves_of(run_folder(each.configs[0]))
        clean = curves.pop(next(task for task in curves if "+" not in task))
        assert full[1] == "3" and cut[1] == f"cut-off, {cutoff(clean, TOLERANCE):.1f} of 3"
        columns = [clean, *(next(v for task, v in curves.items() if task.endswith(f"+{each}")) for each in PAPER)]
        assert full[2:] == [f"{100 * column[-1]:.1f}" for column in columns]
        assert cut[2:] == [f"{100 * column[cutoff(clean, TOLERANCE)]:.1f}" for column in columns]
    assert found.table[-1][2:] == [f"{value:.2f}" for value in PUBLISHED["AC-ViT, published"]]


def curves_of(folder: Path) -> dict[str, list[float]]:
    tasks: dict[str, list[float]] = {}
    for line in read_measurements(folder):
        if line.metric == "accuracy":
            tasks.setdefault(line.task, []).append(line.value)
    return tasks


def test_noise_is_read_at_full_depth_and_at_the_cutoff(vit: Callable[..., Config], tmp_path: Path) -> None:
    configs = {name: vit(run={"name": name}, data={"eval": "birds/eval"}) for name in ("acn", "residual")}
    for cfg in configs.values():
        run_folder(cfg).mkdir(parents=True)
        for task, curve in {"birds": [0.1, 0.598, 0.6], **{f"birds+{each}": [0.1, 0.5, 0.4] for each in PAPER}}.items():
            lines = [Measurement(task=task, metric="accuracy", value=v, depth=depth) for depth, v in enumerate(curve)]
            write_measurements(run_folder(cfg), task, lines)
        assert noise.by_depth(cfg) == [[0.6, *[0.4] * 6], [0.598, *[0.5] * 6]]
    # Of what training measured, which need not have come to the same cut-off, nothing is taken.
    found = noise.findings({name: Runs([cfg]) for name, cfg in configs.items()}, setting(tmp_path))
    assert [row[1] for row in found.table[1:5]] == ["2", "cut-off, 1.0 of 2"] * 2


def test_what_noise_takes() -> None:
    accurate: Callable[[Sequence[float]], list] = lambda losses: [[[0.9, *(0.9 - loss for loss in losses)]] * 2]  # noqa: E731
    measured = {"acn": accurate([0.1] * 6), "residual": accurate([0.0, 0.4] * 3)}
    said = noise.sentences(measured)
    assert "is 10.0 points in the ACN and 20.0 in its residual twin" in said[0]
    assert said[0].endswith("the ACN's is smaller on 1 of 1 seeds.")
    assert said[1] == "Published: 20.4 points and 25.6."
