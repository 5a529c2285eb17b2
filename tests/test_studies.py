"""Studies: what a report says is what the run folders hold; what is finished is not run again; what fails is named."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import pytest
from matplotlib.figure import Figure

from acn_scale.config import Config
from acn_scale.depth import cutoff
from acn_scale.errors import UserError
from acn_scale.runs import read_metrics, run_folder
from acn_scale.studies import STUDIES, depth
from acn_scale.studies.runner import reproduce
from acn_scale.studies.study import CONFIGS, TOLERANCE, Findings, Runs, Setting, Study, Trial, per_cent

SMALL = ["train.length=6step", "model.depth=2", "model.dim=16", "model.num_heads=2", "eval.every=3step"]


def setting(folder: Path, *seeds: int, scale: str = "laptop") -> Setting:
    return Setting(scale=scale, seeds=list(seeds), data="digits", folder=folder / "runs" / "study")


def study(*extra: str) -> Study:
    """Twins of 6 steps on four digits, 20 images each; `extra` overrides keys of the second one."""

    def trials(_: Setting) -> list[Trial]:
        selection = {"first_classes": 4, "per_class": 20}
        return [
            Trial(
                name, CONFIGS / "studies/vit.toml", [*SMALL, f"model.connectivity={name}", *more], "images", selection
            )
            for name, more in (("acn", ()), ("residual", extra))
        ]

    def findings(runs: Mapping[str, Runs], _: Setting) -> Findings:
        rows = [[name, per_cent([curve[-1] for curve in each.accuracy])] for name, each in runs.items()]
        return Findings([["network", "accuracy"], *rows], depth.curves(runs), ["a sentence"])

    return Study("twins", trials, findings)


def test_a_study_is_what_its_runs_say(tmp_path: Path) -> None:
    here = setting(tmp_path, 0, 1)
    text = reproduce("twins", study(), here, workers=2)
    values = json.loads((here.folder / "report/twins.json").read_text())
    for name, said in values["table"][1:]:
        runs = [read_metrics(here.folder / name / f"seed={seed}") for seed in (0, 1)]
        last = [[line for line in lines if "eval/loss" in line][-1]["eval/depth_02/accuracy"] for lines in runs]
        assert said.startswith(f"{100 * fmean(last):.1f} ± ")
    assert (here.folder / "report/twins.png").read_bytes().startswith(b"\x89PNG")
    assert "a sentence" in text
    config = json.loads((here.folder / "acn/seed=1/config.json").read_text())
    assert (config["model"]["num_classes"], config["run"]["seed"]) == (4, 1)
    before = {path: path.stat().st_mtime_ns for path in here.folder.glob("*/*/metrics.jsonl")}
    more = setting(tmp_path, 0, 1, 2)
    reproduce("twins", study(), more, workers=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(here.folder.glob("*/*/metrics.jsonl"))) == 6


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of residual was finished: step 1"):
        reproduce("twins", study("data.mean=[1e30]", "health.on_bad_step=fail"), setting(tmp_path, 0), workers=1)


def config_of(trial: Trial, here: Setting) -> Config:
    return trial.config_of(0, here, [])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_twins_differ_in_one_thing(tmp_path: Path, name: str, scale: str) -> None:
    """At laptop scale in the connectivity alone; the paper trains its ACNs longer."""
    here = setting(tmp_path, 0, scale=scale)
    configs = {trial.name: config_of(trial, here) for trial in STUDIES[name].trials(here)}
    for trial, cfg in configs.items():
        twin = configs[trial.replace("acn", "residual")]
        assert twin.model.connectivity == "residual"
        changed = {"connectivity": "residual"}
        assert cfg.model.model_copy(update=changed) == twin.model
        if scale == "laptop":
            assert (cfg.data, cfg.optim, cfg.train) == (twin.data, twin.optim, twin.train)
    assert len({str(run_folder(cfg)) for cfg in configs.values()}) == len(configs)


def written(here: Setting, name: str, *runs: list[dict[str, float]]) -> Runs:
    """Runs as they are on the disk, of these lines of metrics."""
    configs = []
    for seed, lines in zip(here.seeds, runs, strict=True):
        trial = Trial(name, CONFIGS / "studies/mixer.toml", [f"data.train={here.folder.parent}/shards"])
        configs.append(trial.config_of(seed, here, []))
        folder = run_folder(configs[-1])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(configs[-1].model_dump_json())
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Runs(configs)


def read_out(curve: list[float]) -> list[dict[str, float]]:
    """The lines of a run that was evaluated once."""
    depths = {f"eval/depth_{depth:02d}/accuracy": value for depth, value in enumerate(curve)}
    return [{"step": 1, "eval/loss": 1.0, "eval/accuracy": curve[-1], "depth/blocks": len(curve) - 1} | depths]


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
    assert "The ACN's cut-off grows with the number of classes: 1.0, 2.0, 3.0 blocks" in " ".join(found.sentences)
    assert "2 classes: the ACN's cut-off is below its twin's on 2 of 2 seeds" in found.sentences[0]
    assert "10 classes: the ACN's cut-off is below its twin's on 0 of 2 seeds" in found.sentences[2]
    runs["acn-10"] = runs["acn-2"]
    assert "does not grow" in " ".join(depth.findings_of("depth-mixer", runs, here).sentences)
    runs["acn-2"] = Runs(runs["acn-2"].configs[1:])  # whose first seed failed
    assert (
        "2 classes: the ACN's cut-off is below its twin's on 1 of 1"
        in depth.findings_of("depth-mixer", runs, here).sentences[0]
    )
