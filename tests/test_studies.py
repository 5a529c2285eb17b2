"""Studies: what a report says is what the run folders hold; what is finished is not run again; what fails is named."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import forked
import pytest
import torch
from made import png, write_folder
from matplotlib.figure import Figure
from networks import bert, mixer, network
from test_launch import sweep

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.convert.export import write_export
from acn_scale.data import build_evaluation
from acn_scale.depth import cutoff
from acn_scale.durations import Horizon
from acn_scale.early_exit import Point, Readings
from acn_scale.errors import UserError
from acn_scale.runs import read_metrics, run_folder
from acn_scale.studies import STUDIES, depth, early_exit, low_data, pruning, runner, training_cost, transfer
from acn_scale.studies.runner import reproduce
from acn_scale.studies.study import CONFIGS, TOLERANCE, Findings, Runs, Setting, Study, Trial, per_cent, step_seconds

SMALL = ["train.length=6step", "model.depth=2", "model.dim=16", "model.num_heads=2", "eval.every=3step"]


MORE_THAN_TWINS = {"connectivity", "gradients", "continual", "training-cost"}


def setting(folder: Path, *seeds: int, scale: str = "laptop") -> Setting:
    return Setting(scale=scale, seeds=list(seeds), data="digits", folder=folder / "runs" / "study")


def note(cfg: Config) -> None:
    (run_folder(cfg) / "noted").write_text("")


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

    return Study("twins", trials, findings, note, "not*")


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
    (here.folder / "acn/seed=1/noted").unlink()  # a study that was killed before it had measured this run
    done = [*here.folder.glob("*/*/metrics.jsonl"), *here.folder.glob("*/*/noted")]
    before = {path: path.stat().st_mtime_ns for path in done}
    more = setting(tmp_path, 0, 1, 2)
    reproduce("twins", study(), more, workers=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(here.folder.glob("*/*/metrics.jsonl"))) == 6 == len(list(here.folder.glob("*/*/noted")))


def test_what_is_submitted_is_what_is_left(tmp_path: Path) -> None:
    """All variants of a seed before the next seed."""
    here = setting(tmp_path, 0, 1)
    names = [cfg.run.name for cfg in runner.first_runs("twins", study(), here)]
    assert names == ["acn/seed=0", "residual/seed=0", "acn/seed=1", "residual/seed=1"]
    reproduce("twins", study(), setting(tmp_path, 0), workers=1)
    assert [cfg.run.name for cfg in runner.first_runs("twins", study(), here)] == names[2:]


def test_a_variant_that_fails_is_left_out(tmp_path: Path) -> None:
    """Of the table, where the findings can do without it, and named."""
    whole = study("data.mean=[1e30]", "health.on_bad_step=fail")

    def trials(here: Setting) -> list[Trial]:
        return [replace(trial, needed=trial.name == "acn") for trial in whole.trials(here)]

    here = setting(tmp_path, 0)
    reproduce("twins", replace(whole, trials=trials), here, workers=1)
    said = json.loads((here.folder / "report/twins.json").read_text())
    assert [row[0] for row in said["table"][1:]] == ["acn"]
    assert said["sentences"][1].startswith("failed: residual/seed=0: step 1")


def test_a_report_names_the_data_that_was_used(tmp_path: Path) -> None:
    """What the study made, and what the configs name."""
    here, whole = setting(tmp_path, 0), study()

    def trials(where: Setting) -> list[Trial]:
        acn, twin = whole.trials(where)
        reproduce("first", whole, where, workers=1)
        shards = runner._data(twin, where)  # as a config of the paper names its own
        return [acn, replace(twin, name="other", data=None, overrides=[*shards, *twin.overrides])]

    reproduce("twins", replace(whole, trials=trials), here, workers=1)
    said = json.loads((here.folder / "report/twins.json").read_text())["setting"]
    assert said == f"laptop scale, digits, {here.folder.parent}/data/digits/first_classes=4-per_class=20/train, seeds 0"


@pytest.mark.parametrize(
    ("name", "scale", "what"),
    [("depth-bert", "laptop", "is of pydoc"), ("depth-vit", "paper", "is of the shards that its configs name")],
)
def test_data_that_nothing_takes_is_refused(tmp_path: Path, name: str, scale: str, what: str) -> None:
    here = setting(tmp_path, 0, scale=scale).model_copy(update={"data": "cifar:images"})
    with pytest.raises(UserError, match=f"^--data cifar:images: {name} at {scale} scale {what}; leave --data out$"):
        reproduce(name, STUDIES[name], here, workers=1)
    assert not here.folder.exists()


@pytest.mark.parametrize(("place", "more"), [("tools/reproduce.py", []), ("launchers/study.py", ["--dry-run"])])
def test_the_commands_come_to_the_study(tmp_path: Path, place: str, more: list[str]) -> None:
    """And say in one line what it cannot take."""
    options = ["depth-vit", "--data", f"folder:{tmp_path}/none", "--out", tmp_path / "runs", "--seeds", 1, *more]
    done = forked.command(CONFIGS.parent / place, *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{tmp_path}/none" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(4, (2, 2)), (5, (2, 2)), (6, (3, 2)), (7, (3, 2)), (10, (5, 2)), (12, (5, 2)), (17, (5, 3)), (25, (5, 5)),
     (37, (7, 5)), (100, (20, 5))],
)  # fmt: skip
def test_classes_come_out_even(tmp_path: Path, classes: int, expected: tuple[int, int]) -> None:
    """Each config of the continual study holds for as many classes as its data then have."""
    for split in ("train", "val"):
        for number in range(classes):
            (tmp_path / "images" / split / f"{number:03d}").mkdir(parents=True)
            (tmp_path / "images" / split / f"{number:03d}" / "one.png").write_bytes(png())
    here = setting(tmp_path, 0).model_copy(update={"data": f"folder:{tmp_path}/images"})
    for trial in STUDIES["continual"].trials(here):
        left = trial.selection.get("first_classes", classes)
        cfg = trial.config_of(0, here, [f"model.num_classes={left}"])
        assert (cfg.continual.tasks, left // cfg.continual.tasks) == expected


@pytest.mark.parametrize(
    ("name", "classes", "least", "why"),
    [
        ("continual", 3, 4, "for two tasks of two each"),
        ("transfer", 3, 4, "for two halves of two each"),
        ("transfer", 1, 4, "for two halves of two each"),
        ("depth-mixer", 3, 10, "for the first 2, 5, 10"),
        ("depth-vit", 1, 2, "to tell apart"),
    ],
)
def test_too_few_classes(tmp_path: Path, name: str, classes: int, least: int, why: str) -> None:
    """Are told by --data, before anything is made of them."""
    for split, colour in (("train", 10), ("val", 50)):
        photos(tmp_path / "photos", split, colour, classes)
    here = setting(tmp_path, 0).model_copy(update={"data": f"folder:{tmp_path}/photos"})
    message = f"--data folder:{tmp_path}/photos: {classes} classes: must be {least} or more, {why}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        reproduce(name, STUDIES[name], here, workers=1)
    assert not here.folder.parent.exists()


def test_a_folder_of_other_images(tmp_path: Path) -> None:
    """Is told by --data and --out, before anything is made of the images."""
    here = setting(tmp_path, 0)
    (cfg, _) = runner.first_runs("twins", study(), here)
    run_folder(cfg).mkdir(parents=True)
    (run_folder(cfg) / "config.json").write_text(cfg.model_dump_json())
    assert len(runner.first_runs("twins", study(), here)) == 2
    for split, colour in (("train", 10), ("val", 50)):
        photos(tmp_path / "photos", split, colour, 4)
    other = here.model_copy(update={"data": f"folder:{tmp_path}/photos"})
    message = f"--data {other.data}: {here.folder} has runs on other images, {cfg.data.train}; name another --out"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        reproduce("twins", study(), other, workers=1)
    assert [path.name for path in (here.folder.parent / "data").iterdir()] == ["digits"]


def test_a_sweep_trains_what_the_study_would(tmp_path: Path) -> None:
    """As the README has it for clusters."""
    here = setting(tmp_path, 1, scale="paper")
    (trial, _) = STUDIES["depth-vit"].trials(here)
    (seed,) = sweep.combinations([], [1])
    values = [*seed, f"run.dir={here.folder}", f"run.name=acn/{sweep.run_name(seed)}"]
    assert load_config(CONFIGS / "vit/ac_vit_b16.toml", values) == trial.config_of(1, here, [])


@pytest.mark.parametrize("name", sorted(MORE_THAN_TWINS - {"continual"}))
def test_a_study_ends_where_a_twin_is_lost(tmp_path: Path, name: str) -> None:
    """And not where another variant is."""
    needed = [trial.name for trial in STUDIES[name].trials(setting(tmp_path, 0)) if trial.needed]
    twins = ["acn", "residual"]
    assert sorted(needed) == (
        [f"{task}-residual" for task in ("bert", "mixer", "vit")] if name == "training-cost" else twins
    )


def photos(folder: Path, split: str, colour: int, classes: int = 2) -> None:
    """Photos that are not square, under names that do not tell of the split."""
    for label, name in enumerate(("ant", "bee", "cat", "dog")[:classes]):
        (folder / split / name).mkdir(parents=True)
        for number in range(4):
            content = png(30 + number, 22, colour + 50 * label + number)
            (folder / split / name / f"{number}.png").write_bytes(content)


def test_a_study_of_a_folder_of_photos(tmp_path: Path) -> None:
    """Cropped to squares, and never evaluated on what it was trained on."""
    here = setting(tmp_path, 0)
    photos(tmp_path / "photos", "train", 10)
    photos(tmp_path / "photos", "val", 50)
    trial = study().trials(here)[0]
    data = runner._images(tmp_path / "data", replace(trial, selection={}), f"folder:{tmp_path}/photos")
    cfg = trial.config_of(0, here, data)
    batch, _ = next(iter(build_evaluation(cfg)))
    assert batch["images"].shape == (8, 1, 16, 16) and batch["labels"].tolist().count(0) == 4
    train = {bytes(image) for image in batch["images"].numpy()}
    trained_on = cfg.model_copy(update={"data": cfg.data.model_copy(update={"eval": cfg.data.train})})
    assert train.isdisjoint(bytes(image) for image in next(iter(build_evaluation(trained_on)))[0]["images"].numpy())
    for source in (f"folder:{tmp_path}/photos/train", f"wds:{tmp_path}/data/*/all/train/*.tar"):
        with pytest.raises(UserError, match=f"^--data {re.escape(source)}: its images .* must be .* in train/ and in "):
            reproduce("twins", study(), here.model_copy(update={"data": source}), workers=1)
        assert not here.folder.exists()


def config_of(trial: Trial, here: Setting) -> Config:
    return trial.config_of(0, here, [])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_every_trial_is_a_run(tmp_path: Path, name: str, scale: str) -> None:
    """With a config that holds and a folder of its own; one that starts from another's run comes after a known one."""
    here = setting(tmp_path, 0, scale=scale)
    trials = {trial.name: trial for trial in STUDIES[name].trials(here)}
    assert len(trials) == len(STUDIES[name].trials(here))
    # A recipe takes its model from the run it starts from, which is not there.
    configs = [config_of(trial, here) for trial in trials.values() if not (trial.after and scale == "paper")]
    assert len({str(run_folder(cfg)) for cfg in configs}) == len(configs)
    assert {trial.after for trial in trials.values()} <= trials.keys() | {None}


def started(name: str, here: Setting) -> dict[str, Config]:
    """The trials of a study at the paper's scale that start from others' runs, of which there are small ones, and of
    the shards only what tells their classes. The shards' folder is relative."""
    for data, classes in {"glue/sst2": 2, "cifar10": 10}.items():
        info = {"classes": [str(number) for number in range(classes)]}
        write_folder(Path("data") / data / "train", [[{"txt": ""}]], info)
    found = {}
    for trial in STUDIES[name].trials(here):
        if trial.after:
            source = here.folder / trial.after / "seed=0"
            source.mkdir(parents=True)
            write_export(network(mixer()) if name == "transfer" else network(bert(), b"pieces"), source, "fp32")
            found[trial.name] = config_of(trial, here)
    return found


@pytest.mark.parametrize("name", ["pruning", "transfer"])
def test_a_trial_takes_the_model_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for cfg in started(name, setting(tmp_path, 0, scale="paper")).values():
        expected = mixer() if name == "transfer" else bert()
        classes = {"pruning": 2, "transfer": 10}[name]
        assert cfg.model == expected.model_copy(update={"num_classes": classes, "dropout": 0.0})


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_movement_comes_to_each_sparsity_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    """Trained with it for as long as with the others: at the paper's scale, an epoch of SST-2."""
    monkeypatch.chdir(tmp_path)
    here = setting(tmp_path, 0, scale=scale)
    if scale == "paper":
        configs = started("pruning", here)
    else:
        configs = {trial.name: config_of(trial, here) for trial in STUDIES["pruning"].trials(here)}
    for twin in ("acn", "residual"):
        cfg = configs[f"{twin}-movement"]
        horizon = Horizon.of(cfg.train.length, 67_349, cfg.train.global_batch_size)
        every = horizon.count(cfg.prune.every)
        evaluated = [step for step in range(1, horizon.steps + 1) if step % horizon.count(cfg.eval.every) == 0]
        assert evaluated[-1] == horizon.steps
        # An evaluation after so many updates; before the last of them so many prunings were due.
        assert [(step - 1) // every for step in evaluated] == [*range(pruning.TIMES + 1)]
        assert scale == "laptop" or every == horizon.count("1ep")


def test_movement_at_other_sparsities(tmp_path: Path) -> None:
    line = {"step": 1, "eval/accuracy": 0.5, "prune/sparsity": 0.4}
    runs = written(setting(tmp_path, 0), "acn-movement", [line | {"prune/sparsity": share / 10} for share in range(8)])
    with pytest.raises(UserError, match=r"acn-movement/seed=0/metrics.jsonl: evaluated at 8 sparsities, must be 7$"):
        pruning.by_movement(runs)


def test_longer_is_longer(tmp_path: Path) -> None:
    """Than its plain twin, whatever the unit of the config's length is."""
    for scale in ("laptop", "paper"):
        here = setting(tmp_path, 0, scale=scale)
        trials = {trial.name: trial for trial in STUDIES["training-cost"].trials(here)}
        for task in training_cost.TASKS:
            steps = [
                Horizon.of(config_of(trials[f"{task}-{way}"], here).train.length, 1000, 10).steps
                for way in ("acn", "acn_longer")
            ]
            assert steps[1] == 1.5 * steps[0]


def test_a_short_warmup_is_half_of_the_usual_one(tmp_path: Path) -> None:
    """Whatever its unit is."""
    for scale in ("laptop", "paper"):
        here = setting(tmp_path, 0, scale=scale)
        trials = {trial.name: trial for trial in STUDIES["training-cost"].trials(here)}
        for task in ("vit", "mixer"):
            steps = [
                Horizon(50_000, 64, 100_000).count(config_of(trials[f"{task}-{way}"], here).optim.warmup)
                for way in ("acn", "short_warmup")
            ]
            assert 0 < 2 * steps[1] == pytest.approx(steps[0], abs=1)


def test_the_twin_is_clipped_as_the_acn_is(tmp_path: Path) -> None:
    here = setting(tmp_path, 0)
    trials = {trial.name: trial for trial in STUDIES["training-cost"].trials(here)}
    for task in ("vit", "mixer"):
        acn = config_of(trials[f"{task}-clip_before_unscale"], here)
        twin = config_of(trials[f"{task}-{training_cost.CLIPPED_TWIN}"], here)
        assert (acn.model.connectivity, twin.model.connectivity) == ("acn", "residual")
        assert acn.train == twin.train != config_of(trials[f"{task}-acn"], here).train


@pytest.mark.parametrize("name", sorted(STUDIES.keys() - MORE_THAN_TWINS))
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_twins_differ_in_one_thing(tmp_path: Path, name: str, scale: str) -> None:
    """At laptop scale in the connectivity alone; the paper trains its ACNs longer."""
    here = setting(tmp_path, 0, scale=scale)
    trials = STUDIES[name].trials(here)
    # A recipe takes its model from the run it starts from, so that such twins differ as those do.
    configs = {trial.name: config_of(trial, here) for trial in trials if not (trial.after and scale == "paper")}
    for trial, cfg in configs.items():
        twin = configs[trial.replace("acn", "residual")]
        assert twin.model.connectivity == "residual"
        changed = {"connectivity": "residual"}
        assert cfg.model.model_copy(update=changed) == twin.model
        if scale == "laptop":
            start = cfg.train.init_from and cfg.train.init_from.replace("acn", "residual")
            train = cfg.train.model_copy(update={"init_from": start})
            assert (cfg.data, cfg.optim, train, cfg.early_exit) == (twin.data, twin.optim, twin.train, twin.early_exit)


def written(here: Setting, name: str, *runs: list[dict[str, float]], train: Path = Path("shards")) -> Runs:
    """Runs as they are on the disk, of these lines of metrics."""
    configs = []
    for seed, lines in zip(here.seeds, runs, strict=True):
        trial = Trial(name, CONFIGS / "studies/mixer.toml", [f"data.train={train}"])
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
    assert found.sentences[-1] == "Here: 12 blocks of width 64, train.length = 30ep of the ACN and 30ep of its twin."
    assert "does not grow" in " ".join(depth.findings_of("depth-mixer", runs, here).sentences)
    runs["acn-2"] = Runs(runs["acn-2"].configs[1:])  # whose first seed failed
    assert (
        "2 classes: the ACN's cut-off is below its twin's on 1 of 1"
        in depth.findings_of("depth-mixer", runs, here).sentences[0]
    )


def test_what_a_depth_study_is_of(tmp_path: Path) -> None:
    """At the paper's scale its ViTs and BERTs are trained as published, its Mixers longer."""
    here = setting(tmp_path, 0, scale="paper")
    for name, said in {
        "depth-vit": "12 blocks of width 768, train.length = 700ep of the ACN and 300ep of its twin.",
        "depth-bert": "12 blocks of width 768, train.length = 2ep of the ACN and 1ep of its twin.",
        "depth-mixer": "16 blocks of width 128, train.length = 700ep of the ACN and 700ep of its twin.",
    }.items():
        runs = {trial.name: Runs([config_of(trial, here)]) for trial in STUDIES[name].trials(here)}
        assert depth.trained(runs) == f"Here: {said}"


def test_a_run_starts_from_the_one_of_its_seed(tmp_path: Path) -> None:
    """And is not begun where that one failed."""
    here = setting(tmp_path, 0, 1, 2)
    config = CONFIGS / "studies/vit.toml"
    first, second, third = Trial("a", config), Trial("b", config, after="a"), Trial("c", config, after="b")
    assert runner._stages([third, second, first]) == [[first], [second], [third]]
    done = {"a": Runs([first.config_of(seed, here, []) for seed in (0, 2)])}
    configs = runner._configs(second, here, done)
    assert [cfg.run.seed for cfg in configs] == [0, 2]
    assert [cfg.train.init_from for cfg in configs] == [str(run_folder(cfg)) for cfg in done["a"].configs]


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
    for name, said in {"residual": "1 of 2 seeds, by +0.0", "aligned": "2 of 2", "layerskip": "1 of 1"}.items():
        assert any(f"than {name} on {said}" in sentence for sentence in found.sentences), name


def run(speed: float, *cut: float, full: float = 0.9, blocks: int = 12) -> list[dict[str, float]]:
    """The lines of a run that was evaluated each 10 steps of 64 samples, two thirds of its depth as in `cut`."""
    lines = []
    for step, accuracy in enumerate(cut, 1):
        lines.append({"step": 10 * step, "speed/samples_per_second": speed})
        depth = {f"eval/depth_{min(8, blocks):02d}/accuracy": accuracy}
        lines.append({"step": 10 * step, "eval/accuracy": full, "depth/blocks": blocks} | depth)
    return lines


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
    assert [row[-1] for row in found.table if row[1] == "acn"] == ["1.00"] * 2  # 20 and 60 of 40 seconds
    assert found.sentences[0].startswith("On two tasks no way reached") and "acn: none of" in found.sentences[1]


def test_a_way_without_a_seed_of_its_twin_is_left_out(tmp_path: Path, digits: Path) -> None:
    here, runs = setting(tmp_path, 0, 1), {}
    for task in ("vit", "mixer"):
        for way in ("residual", "acn", "clip_before_unscale", training_cost.CLIPPED_TWIN):
            runs[f"{task}-{way}"] = timed(here, digits, f"{task}-{way}", *2 * [run(64.0, 0.1, 0.9)])
    for name, seed in {"vit-residual": 0, "vit-acn": 1, "vit-clip_before_unscale": 0}.items():
        runs[name] = Runs([runs[name].configs[seed]])
    runs[f"mixer-{training_cost.CLIPPED_TWIN}"] = Runs(runs["mixer-acn"].configs[:1])
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
    for way, cut in (("clip_before_unscale", 0.8), (training_cost.CLIPPED_TWIN, 0.895)):  # which reaches the goal
        runs[f"mixer-{way}"] = timed(here, digits, f"mixer-{way}", *2 * [run(64.0, cut, cut, cut, full=cut + 0.05)])
    found = training_cost.findings(runs, here)
    rows = {(row[0], row[1]): row[2:] for row in found.table[1:]}
    assert rows["vit", "residual"] == ["90.0 ± 0.0", "40.0 ± 0.0", "0 of 2", "-", "-"]
    assert rows["vit", "acn"][2:] == ["2 of 2", "0.62", "0.88"]  # 20 and 30 of 40 steps; 40 and 30 of 40 seconds
    assert rows["vit", "cut"][2:] == ["2 of 2", "0.50", "0.50"]
    assert rows["mixer", "cut"][2:] == ["1 of 2", "0.25", "0.25"]
    said = "\n".join(found.sentences)
    assert "On two tasks a way reached" in said
    assert "as near to its full depth on: none of vit, mixer." in said
    assert "acn: vit, mixer of vit, mixer." in said and "cut: vit of vit, mixer." in said
    assert "Closest" not in said and f"{training_cost.CLIPPED_TWIN}:" not in said
    assert "mixer, both with gradients clipped" in said and "vit, both" not in said
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
        closest.count(";") == 1 and "clip_before_unscale on 1 of 2 tasks, mixer (10.0 points below its twin)" in closest
    )


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
    said = "x: the ACN's mean accuracy is above its twin's at {} of 6 sparsities; at 95% zeros by {} points, above it "
    assert pruning._compared("x", acn, twin) == said.format(5, "+15.0") + "on 1 of 2 seeds."
    assert pruning._compared("x", twin, acn) == said.format(1, "-15.0") + "on 0 of 2 seeds."


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
    for name in ("acn", "residual"):
        (end,) = kept[name].last("eval/accuracy")
        assert said[name, pruning.WHOLE]["0 % zero"] == f"{100 * end:.1f}"
        moved = kept[f"{name}-movement"]
        assert not kept[name].configs[0].prune.share
        assert moved.configs[0].train.init_from == str(run_folder(kept[name].configs[0]))
        (zeros,), (last,) = moved.last("prune/sparsity"), moved.last("eval/accuracy")
        assert zeros == pytest.approx(pruning.SPARSITIES[-1], abs=0.01)
        assert said[name, pruning.MOVEMENT]["95 % zero"] == f"{100 * last:.1f}"
        assert said[name, pruning.CUT]["blocks"] == f"{max(1, kept[name].cutoffs[0])}.0"
    runs = {f"{name}{kind}": kept[name] for name in ("acn", "residual") for kind in ("", "-shared")}
    found = early_exit.findings(runs, here)
    for name, way, accuracy, depths, speed, _ in found.table[1:]:
        curve = kept[name.removesuffix("-shared")].accuracy[0]
        if way == early_exit.FULL:
            assert (accuracy, depths, speed) == (f"{100 * curve[-1]:.1f}", "3.0", "1.00x")
        if way == early_exit.CUT:
            assert (accuracy, depths) == (
                f"{100 * curve[cutoff(curve, TOLERANCE)]:.1f}",
                f"{cutoff(curve, TOLERANCE)}.0",
            )
