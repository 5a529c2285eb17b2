"""Studies: what a report says is what the run folders hold; what is finished is not run again; what fails is named."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import forked
import pytest
from made import png
from studied import setting, study

from acn_scale.data import build_evaluation
from acn_scale.data.shards import ShardIndex
from acn_scale.durations import Horizon
from acn_scale.errors import UserError
from acn_scale.runs import read_metrics, run_folder
from acn_scale.studies import STUDIES, runner, training_ways
from acn_scale.studies.runner import reproduce
from acn_scale.studies.study import CONFIGS, Runs, Setting, Trial


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


def of_classes(folder: Path, classes: int) -> Setting:
    """A study on an image of each class, for training and for evaluation."""
    for split in ("train", "val"):
        for number in range(classes):
            (folder / "images" / split / f"{number:03d}").mkdir(parents=True)
            (folder / "images" / split / f"{number:03d}" / "one.png").write_bytes(png())
    return setting(folder, 0).model_copy(update={"data": f"folder:{folder}/images"})


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(4, (2, 2)), (5, (2, 2)), (6, (3, 2)), (7, (3, 2)), (10, (5, 2)), (12, (5, 2)), (17, (5, 3)), (25, (5, 5)),
     (37, (7, 5)), (100, (20, 5))],
)  # fmt: skip
def test_classes_come_out_even(tmp_path: Path, classes: int, expected: tuple[int, int]) -> None:
    """Each config of the continual study holds for as many classes as its data then have."""
    here = of_classes(tmp_path, classes)
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


@pytest.mark.parametrize(
    ("selection", "expected"), [({}, (8, 8)), ({"per_class": 1}, (2, 8)), ({"eval_per_class": 3}, (8, 6))]
)
def test_each_split_has_its_own_number_of_images(
    tmp_path: Path, selection: dict[str, int], expected: tuple[int, int]
) -> None:
    for split in ("train", "val"):
        photos(tmp_path / "photos", split, 10)
    trial = replace(study().trials(setting(tmp_path, 0))[0], selection=selection)
    runner._images(tmp_path / "data", trial, f"folder:{tmp_path}/photos")
    indices = [ShardIndex.load(next((tmp_path / "data").glob(f"*/*/{split}"))) for split in ("train", "eval")]
    assert tuple(index.num_samples for index in indices) == expected


@pytest.mark.parametrize("classes", [4, 10, 100])
def test_a_study_takes_no_longer_for_more_images(tmp_path: Path, classes: int) -> None:
    """Where it could: low-data has epochs of so many of each class, and training-cost evaluates often."""
    here = of_classes(tmp_path, classes)
    for trial in STUDIES["low-data"].trials(here):
        length = trial.config_of(0, here, [f"model.num_classes={classes}"]).train.length
        steps = Horizon.of(length, trial.selection["per_class"] * classes, 64).steps
        assert steps == round(min(classes, 10) * 100 * 150 / 64)
    for trial in STUDIES["training-cost"].trials(here):
        assert trial.data == "text" or trial.selection["eval_per_class"] * classes == training_ways.EVALUATED


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
