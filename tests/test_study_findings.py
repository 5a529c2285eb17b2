"""What each study says: of lines of metrics, and of networks, that are known."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from studied import read_out, setting, written

from acn_scale.depth import cost, cutoff
from acn_scale.early_exit import Point, Readings
from acn_scale.errors import UserError
from acn_scale.runs import run_folder
from acn_scale.studies import STUDIES, depth, early_exit, low_data, pruning, training_cost, training_ways, transfer
from acn_scale.studies.runner import reproduce
from acn_scale.studies.study import TOLERANCE, Findings, Runs, Setting, Study, Trial, step_seconds


def test_movement_at_other_sparsities(tmp_path: Path) -> None:
    line = {"step": 1, "eval/accuracy": 0.5, "prune/sparsity": 0.4}
    lines = [line | {"prune/sparsity": share / 10} for share in range(8)]
    runs = written(setting(tmp_path, 0), "acn-movement-40", lines)
    with pytest.raises(UserError, match=r"acn-movement-40/seed=0/metrics.jsonl: evaluated at 8 sparsities, must be 7$"):
        pruning.by_movement(runs)


def test_what_a_depth_study_says(tmp_path: Path) -> None:
    """Of the cut-off and the number of classes, whether it shows or not."""
    here = setting(tmp_path, 0, 1)
    curves = {"acn-2": [0.5, 0.9, 0.9, 0.9], "acn-5": [0.2, 0.6, 0.8, 0.8], "acn-10": [0.1, 0.3, 0.5, 0.7]}
    curves |= {name.replace("acn", "residual"): [0.1, 0.2, 0.3, 0.75] for name in curves}
    runs = {name: written(here, name, read_out(curve), read_out(curve)) for name, curve in curves.items()}
    found = depth.findings_of("depth-mixer", runs, here)
    assert isinstance(found.figure, Figure)
    cuts = {row[0]: row[2] for row in found.table[1:]}
    assert cuts == {name: f"{cutoff(curve, TOLERANCE):.1f} ± 0.0" for name, curve in curves.items()}
    model = runs["acn-2"].configs[0].model
    for row in found.table[1:]:
        there = cost(model, cutoff(curves[row[0]], TOLERANCE))
        assert row[4:7] == [
            f"{value:.3g}" for value in (there.parameters / 1e6, there.flops / 1e9, there.parameters / 2**18)
        ]
    assert "The ACN's cut-off grows with the number of classes: 1.0, 2.0, 3.0 blocks" in " ".join(found.sentences)
    assert "2 classes: the ACN's cut-off is below its twin's on 2 of 2 seeds" in found.sentences[0]
    assert "10 classes: the ACN's cut-off is below its twin's on 0 of 2 seeds" in found.sentences[2]
    runs["acn-10"] = runs["acn-2"]
    assert found.sentences[-1] == "Here: 12 blocks of width 64, train.length = 30ep of the ACN and 30ep of its twin."
    assert "does not grow" in " ".join(depth.findings_of("depth-mixer", runs, here).sentences)
    runs["acn-2"] = Runs(runs["acn-2"].configs[1:])  # whose first seed failed
    assert (
        "2 classes: the ACN's cut-off is below its twin's on 1 of 1"
        in depth.findings_of("depth-mixer", runs, here).sentences[0]
    )


def test_what_is_said_of_tasks(tmp_path: Path) -> None:
    """Each by its name, and beside what is published of it."""
    here = setting(tmp_path, 0)
    curves = {"acn": [0.0, 0.1, 0.2, 0.5], "acn-qqp": [0.5, 0.9, 0.9, 0.9]}
    curves |= {name.replace("acn", "residual"): [0.1, 0.2, 0.3, 0.75] for name in curves}
    found = depth.findings_of(
        "depth-bert", {name: written(here, name, read_out(each)) for name, each in curves.items()}, here
    )
    assert found.sentences[0].startswith("The ACN's cut-off is below its twin's on 0 of 1 seeds")
    assert found.sentences[1].startswith("qqp: the ACN's cut-off is below its twin's on 1 of 1 seeds")
    assert {row[0]: row[-1] for row in found.table}["acn-qqp"] == "3 of 12, 87.30 ± 0.07 %, 46M, 5.44 GFLOPs, 174 MB"


def test_what_is_said_of_low_data(tmp_path: Path, digits: Path) -> None:
    """By seed: whose lowest loss is lower, and whose mean over the epochs."""
    here = setting(tmp_path, 0, 1)
    epoch = 1400 / 64

    def lines(*losses: float) -> list[dict[str, float]]:
        names = ("train/loss", "eval/loss", "eval/accuracy")
        return [{"step": step * epoch} | dict.fromkeys(names, loss) for step, loss in enumerate(losses, 1)]

    acn = written(here, "acn", lines(0.9, 0.5, 0.1), lines(0.9, 0.8, 0.7), train=digits / "train")
    twin = written(here, "residual", lines(0.9, 0.8, 0.5), lines(0.9, 0.3, 0.4), train=digits / "train")
    found = low_data.findings({"acn": acn, "residual": twin}, here)
    head, *rows = found.table
    said = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["lowest test loss"] for row in said] == ["0.4000 ± 0.4243", "0.4000 ± 0.1414"]
    assert [row["mean test loss over the epochs"] for row in said] == ["0.6500 ± 0.2121", "0.6333 ± 0.1414"]
    assert (
        "lowest test loss is below its twin's on 1 of 2 seeds, its mean over the epochs on 1 of 2."
        in found.sentences[1]
    )
    assert "5.0 points less accurate" in found.sentences[2]  # 0.1 and 0.7, beside 0.5 and 0.4


def test_what_is_said_of_transfer(tmp_path: Path) -> None:
    """The ACN beside the others, seed by seed; a seed that one of them lacks is left out."""
    here = setting(tmp_path, 0, 1)
    ends = {"acn": (0.9, 0.5), "residual": (0.8, 0.6), "aligned": (0.8, 0.4), "layerskip": (0.1, 0.4)}
    runs = {}
    for name, (first, second) in ends.items():
        runs[name] = written(here, name, read_out([0.1, first]), read_out([0.1, second]))
        runs[f"{name}-source"] = written(here, f"{name}-source", read_out([0.1, 0.7]), read_out([0.1, 0.7]))
    runs["layerskip"] = Runs(runs["layerskip"].configs[1:])
    found = transfer.findings(runs, here)
    assert [row[2] for row in found.table[1:3]] == ["70.0 ± 28.3", "70.0 ± 14.1"]
    assert "the ACN is Eq. 1 alone" in found.sentences[-1]
    paper = transfer.findings(runs, here.model_copy(update={"scale": "paper"}))
    assert paper.sentences == found.sentences[:-1] and "LayerSkip drops no layers" in paper.sentences[-1]
    for name, said in {"residual": "1 of 2 seeds, by +0.0", "aligned": "2 of 2", "layerskip": "1 of 1"}.items():
        assert any(f"than {name} on {said}" in sentence for sentence in found.sentences), name


def run(speed: float, *cut: float, full: float = 0.9, blocks: int = 12) -> list[dict[str, float]]:
    """The lines of a run that was evaluated each 10 steps of 64 samples, two thirds of its depth as in `cut`, above it
    as at full depth.
    """
    lines = []
    for step, accuracy in enumerate(cut, 1):
        lines.append({"step": 10 * step, "speed/samples_per_second": speed})
        curve = [*[0.0] * min(8, blocks), accuracy, *[full] * (blocks - 8)]
        lines.append(*read_out(curve))
        lines[-1] |= {"step": 10 * step, "eval/accuracy": full}
    return lines


CLIPPED_TWIN = training_ways.OWN_TWINS["clip_before_unscale"]


def timed(here: Setting, digits: Path, name: str, *runs: list[dict[str, float]]) -> Runs:
    """Runs of 40 steps."""
    found = written(here, name, *runs, train=digits / "train")
    for cfg in found.configs:
        (run_folder(cfg) / "environment.json").write_text('{"steps": 40}')
    return found


def test_seconds_are_those_of_undisturbed_steps(tmp_path: Path, digits: Path) -> None:
    """Of as many blocks: one that is cut is faster from then on, and not before."""
    speeds = [(32.0, 12), (64.0, 12), (16.0, 12), (64.0, 4), (128.0, 4)]
    lines = [line for place, (speed, blocks) in enumerate(speeds)
             for line in run(speed, *[0.5] * (place + 1), blocks=blocks)[-2:]]  # fmt: skip
    cut = timed(setting(tmp_path, 0), digits, "vit-cut", lines)
    (cfg,) = cut.configs
    assert step_seconds(cfg) == {12: 1.0, 4: 0.5}
    assert [(each.steps, each.seconds) for each in training_cost.readings(cfg)] == [
        (10, 10.0), (20, 20.0), (30, 30.0), (40, 35.0), (50, 40.0),
    ]  # fmt: skip


def test_a_way_takes_as_long_as_its_slowest_seed(tmp_path: Path, digits: Path) -> None:
    """Whatever the mean is, which is in the table."""
    here, runs = setting(tmp_path, 0, 1), {}
    for task in ("vit", "mixer"):
        runs[f"{task}-residual"] = timed(here, digits, f"{task}-residual", *2 * [run(64.0, 0.1, 0.2, 0.3, 0.4)])
        runs[f"{task}-acn"] = timed(here, digits, f"{task}-acn", run(64.0, 0.1, 0.9, 0.9), run(32.0, 0.1, 0.1, 0.9))
    found = training_cost.findings(runs, here)
    assert [row[-2] for row in found.table if row[1] == "acn"] == ["1.00"] * 2  # 20 and 60 of 40 seconds
    assert found.sentences[0].startswith("On two tasks no way reached") and "acn: none of" in found.sentences[1]


def test_a_way_without_a_seed_of_its_twin_is_left_out(tmp_path: Path, digits: Path) -> None:
    here, runs = setting(tmp_path, 0, 1), {}
    for task in ("vit", "mixer"):
        for way in ("residual", "acn", "clip_before_unscale", CLIPPED_TWIN):
            runs[f"{task}-{way}"] = timed(here, digits, f"{task}-{way}", *2 * [run(64.0, 0.1, 0.9)])
    for name, seed in {"vit-residual": 0, "vit-acn": 1, "vit-clip_before_unscale": 0}.items():
        runs[name] = Runs([runs[name].configs[seed]])
    runs[f"mixer-{CLIPPED_TWIN}"] = Runs(runs["mixer-acn"].configs[:1])
    runs["mixer-clip_before_unscale"] = Runs(runs["mixer-clip_before_unscale"].configs[1:])
    found = training_cost.findings(runs, here)
    assert ["vit", "acn"] not in [row[:2] for row in found.table]
    assert "vit-acn is left out: none of its seeds is finished of its twin too." in found.sentences
    assert any(line.startswith("acn: mixer of mixer.") for line in found.sentences)
    assert any(line.startswith("vit, both") for line in found.sentences)
    assert not any(line.startswith("mixer, both") for line in found.sentences)


def test_what_is_said_of_training_cost(tmp_path: Path, digits: Path) -> None:
    """By what was read out at two thirds of the depth, and the seconds of training before it."""
    here = setting(tmp_path, 0, 1)
    runs = {}
    for task in ("vit", "mixer"):
        runs[f"{task}-residual"] = timed(here, digits, f"{task}-residual", *2 * [run(64.0, 0.1, 0.2, 0.3, 0.4)])
        runs[f"{task}-acn"] = timed(here, digits, f"{task}-acn", run(32.0, 0.5, 0.896, 0.9), run(64.0, 0.5, 0.8, 0.9))
    runs["vit-cut"] = timed(here, digits, "vit-cut", *2 * [run(64.0, 0.1, 0.9, blocks=4)])
    runs["mixer-cut"] = timed(here, digits, "mixer-cut", run(64.0, 0.1, 0.8), run(64.0, 0.9, 0.8))
    for way, cut in (("clip_before_unscale", 0.8), (CLIPPED_TWIN, 0.895)):  # which reaches the goal
        runs[f"mixer-{way}"] = timed(here, digits, f"mixer-{way}", *2 * [run(64.0, cut, cut, cut, full=cut + 0.05)])
    found = training_cost.findings(runs, here)
    rows = {(row[0], row[1]): row[2:-1] for row in found.table[1:]}
    published = {(row[0], row[1]): row[-1].partition(" ")[0] for row in found.table[1:] if row[-1]}
    assert published == {("vit", "acn"): "2.33", ("mixer", "acn"): "1.4"}
    assert rows["vit", "residual"] == ["90.0 ± 0.0", "40.0 ± 0.0", "0 of 2", "-", "-"]
    assert rows["vit", "acn"][2:] == ["2 of 2", "0.62", "0.88"]  # 20 and 30 of 40 steps; 40 and 30 of 40 seconds
    assert rows["vit", "cut"][2:] == ["2 of 2", "0.50", "0.50"]
    assert rows["mixer", "cut"][2:] == ["1 of 2", "0.25", "0.25"]
    said = "\n".join(found.sentences)
    assert "On two tasks a way reached" in said
    assert "as near to its full depth on: none of vit, mixer." in said
    assert "acn: vit, mixer of vit, mixer." in said and "cut: vit of vit, mixer." in said
    assert "Closest" not in said and f"{CLIPPED_TWIN}:" not in said
    assert "vit: cut lost 8, 8 of its 12 blocks, by seed." in said
    assert "mixer: cut lost no block and is the same as acn." in said
    assert "mixer, both with gradients clipped" in said and "vit, both" not in said
    cuts = "cut-offs within 0.5 points of full depth (blocks): acn 8.0 ± 0.0, residual 9.0 ± 0.0"
    assert f"vit: {cuts}." in said
    assert f"mixer: {cuts}, clip_before_unscale 9.0 ± 0.0, {CLIPPED_TWIN} 9.0 ± 0.0." in said
    assert "the ACN is 9.5 points lower than its twin, at two thirds of the depth 9.5 points lower." in said
    for name in ("vit-acn", "mixer-acn"):
        for cfg in runs[name].configs:
            cfg.train.__dict__["anneal"] = "30step"  # before that it is no ACN
    said = training_cost.findings(runs, here).sentences
    assert "no way reached" in said[0]
    # On the Mixer the two seeds of "cut" come to 0.8 and 0.9; those of "acn" to 0.9 at 30 steps, one of them too late:
    # of that seed nothing was read out in time.
    assert (
        "Closest to it, by the best evaluation within that time: cut on 2 of 2 tasks, vit (0.0 points above its twin), "
        "mixer (5.0 points below its twin)." in said
    )
    del runs["vit-cut"], runs["mixer-cut"]
    (closest,) = [line for line in training_cost.findings(runs, here).sentences if line.startswith("Closest")]
    assert (
        closest.count(";") == 1 and "clip_before_unscale on 1 of 2 tasks, mixer (14.5 points below its twin)" in closest
    )


@pytest.mark.parametrize(("own", "reached"), [(0.95, "0 of 1"), (0.5, "1 of 1")])
def test_a_way_is_held_to_the_better_twin(tmp_path: Path, digits: Path, own: float, reached: str) -> None:
    """Of the plain one and one whose updates are made alike."""
    here = setting(tmp_path, 0)
    accuracy = {"residual": 0.9, "muon": 0.9, "residual_muon": own}
    runs = {
        f"vit-{way}": timed(here, digits, f"vit-{way}", run(64.0, 0.1, 0.9, full=full))
        for way, full in accuracy.items()
    }
    found = training_cost.findings(runs, here)
    assert {row[1]: row[4] for row in found.table}["muon"] == reached
    assert any(line.startswith("vit, both with Muon: the ACN is") for line in found.sentences)


def test_ways_to_read_out() -> None:
    """Four samples, of which two are sure and right at once, one at depth 1, and one never sure."""
    measured = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [0.9, 0.2, 0.1], [0.9, 0.9, 0.9]])
    correct = torch.tensor([[True] * 3, [True] * 3, [False, True, True], [False, True, True]])
    reading = early_exit.Reading(Readings("entropy", measured, correct), cuts=[10, 20, 30], exits=[10, 21, 32])
    at = {way: reading.at(way) for way in (early_exit.FULL, early_exit.CUT, early_exit.EXIT, early_exit.CHEAPEST)}
    assert [(point.accuracy, point.depth, point.flops) for point in at.values()] == [
        (1.0, 2, 30),
        (1.0, 1, 20),
        (1.0, (0 + 0 + 1 + 2) / 4, (10 + 10 + 21 + 32) / 4),
        (1.0, (0 + 0 + 1 + 2) / 4, (10 + 10 + 21 + 32) / 4),
    ]


def test_what_is_said_of_early_exit() -> None:
    """By seed: FLOPs that the ACN takes less, and accuracy that it has more."""

    def at(accuracy: float, flops: float) -> Point:
        return Point(math.nan, accuracy, 3.0, flops)

    less, same, more = (at(0.9, 10), at(0.8, 20)), (at(0.9, 10), at(0.8, 10)), (at(0.7, 30), at(0.8, 20))
    pairs = [less, less, same, more]
    said = "the ACN takes fewer FLOPs than its twin on 2 of 4 seeds; its accuracy is 5.0 points higher."
    assert early_exit._compared(pairs) == said
    said = "the ACN takes fewer FLOPs than its twin on 1 of 4 seeds; its accuracy is 5.0 points lower."
    assert early_exit._compared([(twin, acn) for acn, twin in pairs]) == said
    assert early_exit._compared([]) == "no seed is finished of the ACN and its twin."


def test_what_is_said_of_pruning() -> None:
    """At the sparsities above 0 of the means, and at the highest by seed."""
    acn = [[0.1, *[0.9] * 4, 0.5, 0.8], [0.1, *[0.9] * 4, 0.5, 0.4]]
    twin = [[0.9, *[0.8] * 4, 0.6, 0.5], [0.9, *[0.8] * 4, 0.6, 0.4]]
    said = ": the ACN's mean accuracy is above its twin's at {} of 6 sparsities; at {} zeros by {} points, above it on "
    for way, zeros in ((pruning.WHOLE, "95%"), (pruning.MOVEMENT[0.2], "74%")):
        assert pruning._compared(way, acn, twin) == way + said.format(5, zeros, "+15.0") + "1 of 2 seeds."
        assert pruning._compared(way, twin, acn) == way + said.format(1, zeros, "-15.0") + "0 of 2 seeds."


TINY = ["model.depth=3", "model.dim=16", "model.token_dim=8", "model.channel_dim=16", "train.length=14step"]
PRUNED = ["prune.every=2step", "eval.every=2step"]


def test_what_is_read_off_networks(tmp_path: Path) -> None:
    """Pruning and early exit: of what the runs' checkpoints hold, in agreement with what the runs measured."""
    here = setting(tmp_path, 0)
    whole = STUDIES["pruning"]

    def trials(where: Setting) -> list[Trial]:
        return [
            replace(trial, overrides=[*trial.overrides, *TINY, *(PRUNED if trial.after else [])])
            for trial in whole.trials(where)
        ]

    kept: dict[str, Runs] = {}

    def findings(runs: Mapping[str, Runs], where: Setting) -> Findings:
        kept.update(runs)
        return whole.findings(runs, where)

    reproduce("pruning", Study("small", trials, findings), here, workers=1)
    head, *rows = json.loads((here.folder / "report/pruning.json").read_text())["table"]
    said = {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}
    assert len(said) == len(rows) == 4 * 7
    published = {way for (way, _), row in said.items() if row["published"]}
    assert published == {pruning.WHOLE, *pruning.MOVEMENT.values()}
    for name in ("acn", "residual"):
        (end,) = kept[name].last("eval/accuracy")
        assert said[pruning.WHOLE, "0%"][f"{name} (%)"] == f"{100 * end:.1f}"
        for share, sparsity in ((0.2, "74%"), (0.4, "95%")):
            pruned = kept[pruning.moved(name, share)]
            assert not kept[name].configs[0].prune.share
            assert pruned.configs[0].train.init_from == str(run_folder(kept[name].configs[0]))
            (zeros,), (last,) = pruned.last("prune/sparsity"), pruned.last("eval/accuracy")
            assert zeros == pytest.approx(pruning.SPARSITIES[share][-1], abs=0.01)
            assert said[pruning.MOVEMENT[share], sparsity][f"{name} (%)"] == f"{100 * last:.1f}"
        sentences = " ".join(json.loads((here.folder / "report/pruning.json").read_text())["sentences"])
        assert f"the {name}'s {max(1, kept[name].cutoffs[0])}.0" in sentences
    runs = {f"{name}{kind}": kept[name] for name in ("acn", "residual") for kind in ("", "-shared")}
    found = early_exit.findings(runs, here)
    assert {row[0]: row[-1] for row in found.table[-2:]} == {"residual-branches": "2.2x", "acn-branches": "2.6x"}
    for name, way, accuracy, depths, speed, _ in found.table[1:-2]:
        curve = kept[name.removesuffix("-shared")].accuracy[0]
        if way == early_exit.FULL:
            assert (accuracy, depths, speed) == (f"{100 * curve[-1]:.1f}", "3.0", "1.00x")
        if way == early_exit.CUT:
            assert (accuracy, depths) == (
                f"{100 * curve[cutoff(curve, TOLERANCE)]:.1f}",
                f"{cutoff(curve, TOLERANCE)}.0",
            )
