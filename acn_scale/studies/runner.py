"""A study from its data to its report; runs that are finished are never run again."""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from acn_scale.checkpoint import trained
from acn_scale.config import Config
from acn_scale.data.image_sources import open_images
from acn_scale.data.make_images import make_image_shards
from acn_scale.data.make_text import make_text_shards, train_source_tokenizer
from acn_scale.data.shards import ShardIndex
from acn_scale.data.sources import EVAL_NAMES
from acn_scale.data.text_sources import TextSources
from acn_scale.data.tokenizer import TOKENIZER_NAME
from acn_scale.errors import UserError
from acn_scale.files import write_together
from acn_scale.runs import check_run_folder, read_json, run_folder
from acn_scale.studies.study import Findings, Runs, Setting, Study, Trial, check_classes
from acn_scale.studies.workers import train_all
from acn_scale.tables import aligned, markdown

TEXT = "pydoc"  # the source of it at laptop scale
SMALL = 16  # pixels: laptop scale
STEPS = 1500  # of a run on other images than the digits, of which an epoch may be long


def reproduce(name: str, study: Study, setting: Setting, workers: int) -> str:
    """Make the data, run what is missing, write report/<study>.md, .png and .json; return the report as text.

    A run that fails does not stop the others; the report names it. A trial of which no run was finished has no place in
    the report, and ends the study where the findings need it. Raises UserError, and RunFailed where a signal stopped
    it.
    """
    trials = _trials(name, study, setting)
    done: dict[str, Runs] = {}
    failures: dict[str, str] = {}
    for stage in _stages(trials):
        configs = {trial.name: _configs(trial, setting, done) for trial in stage}
        each = _by_seed(configs.values())
        failures |= train_all(name, [cfg for cfg in each if not finished(cfg, study)], study.measure, workers)
        for trial in stage:
            if ended := [cfg for cfg in configs[trial.name] if finished(cfg, study)]:
                done[trial.name] = Runs(ended)
            elif trial.needed:
                reasons = [failures[cfg.run.name] for cfg in configs[trial.name] if cfg.run.name in failures]
                raise UserError(f"{name}: no run of {trial.name} was finished: {(reasons or ['stopped'])[0]}")
    sources = {"images": setting.data, "text": TEXT}
    data = [sources.get(trial.data, done[trial.name].configs[0].data.train) for trial in trials if trial.name in done]
    where = f"{setting.scale} scale, {', '.join(dict.fromkeys(data))}, seeds {', '.join(map(str, setting.seeds))}"
    return _write(name, study, setting.folder / "report", where, study.findings(done, setting), failures)


def first_runs(name: str, study: Study, setting: Setting) -> list[Config]:
    """Those that start from no other's and are not trained yet; their data is made. Raises UserError."""
    stage = _stages(_trials(name, study, setting))[0]
    return [cfg for cfg in _by_seed(_configs(trial, setting, {}) for trial in stage) if not trained(cfg)]


def _trials(name: str, study: Study, setting: Setting) -> Sequence[Trial]:
    """Raises UserError for data that the study cannot take."""
    trials = study.trials(setting)
    if any(trial.data == "images" for trial in trials):
        check_classes(setting.data, 2, "to tell apart")
        _check_splits(setting.data)
        _check_same_images(setting, [trial for trial in trials if trial.data == "images"])
    elif setting.data != "digits":
        what = "the shards that its configs name" if setting.scale == "paper" else TEXT
        raise UserError(f"--data {setting.data}: {name} at {setting.scale} scale is of {what}; leave --data out")
    return trials


def _by_seed(runs: Iterable[Sequence[Config]]) -> list[Config]:
    """All variants of a seed before the next seed: what the machine does meanwhile is then alike for all.

    Raises UserError for a folder that holds another run.
    """
    each = sorted((cfg for configs in runs for cfg in configs), key=lambda cfg: cfg.run.seed)
    for cfg in each:
        check_run_folder(cfg)
    return each


def _stages(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Those that start from others come after them."""
    stages: list[list[Trial]] = []
    left, known = list(trials), {None}  # one that starts from none can be run at once
    while left:
        stages.append([trial for trial in left if trial.after in known])
        assert stages[-1], "a trial starts from one that is not there"
        known |= {trial.name for trial in stages[-1]}
        left = [trial for trial in left if trial.name not in known]
    return stages


def _configs(trial: Trial, setting: Setting, done: Mapping[str, Runs]) -> list[Config]:
    """For each seed; a trial that starts from another's runs has none where those failed."""
    seeds = done[trial.after].seeds if trial.after else setting.seeds
    data = _data(trial, setting)
    return [trial.config_of(seed, setting, data) for seed in seeds]


def finished(cfg: Config, study: Study) -> bool:
    """Trained and, where the study asks for more, measured."""
    return trained(cfg) and (study.measure is None or any(run_folder(cfg).glob(study.leaves)))


def _data(trial: Trial, setting: Setting) -> list[str]:
    """Overrides that name the trial's shards, which are made where they are not there yet."""
    if trial.data is None:
        return []
    root = _root(setting)
    return _text(root / TEXT) if trial.data == "text" else _images(root, trial, setting.data)


def _root(setting: Setting) -> Path:
    """Of all data that studies make."""
    return setting.folder.parent / "data"


def _images_of(root: Path, source: str) -> Path:
    return root / re.sub(r"\W+", "_", source)


def _text(folder: Path) -> list[str]:
    """Of the language reference that comes with Python, as in the quickstart."""
    source, tokenizer = TextSources([TEXT]), folder / "tokenizer"
    if not (tokenizer / TOKENIZER_NAME).exists():
        train_source_tokenizer(source, 1024, tokenizer, eval_share=0.1, character_coverage=1.0)
    make_text_shards(source, tokenizer, folder, tokens=64)
    return [f'data.train="{folder}/train"', f'data.eval="{folder}/eval"']


def _images(root: Path, trial: Trial, source: str) -> list[str]:
    part = "-".join(f"{key}={value}" for key, value in trial.selection.items()) or "all"
    folder = _images_of(root, source) / part
    resize = None if source == "digits" else SMALL
    for split in ("train", "eval"):
        keys = dict(trial.selection)
        numbers = {"train": keys.pop("per_class", None), "eval": keys.pop("eval_per_class", None)}
        keys |= {"per_class": numbers[split], "resize": resize, "square": resize is not None}
        make_image_shards(source, split, folder / split, workers=os.cpu_count() or 1, **keys)
    info = ShardIndex.load(folder / "train").info
    values = [f'data.train="{folder}/train"', f'data.eval="{folder}/eval"']
    values.append(f"model.num_classes={len(info['classes'])}")
    if resize:
        values += [f"model.image_size={SMALL}", "model.patch_size=4", f"model.channels={len(info['mean'])}"]
        values.append(f"train.length={STEPS}step")
    return values


def _check_splits(source: str) -> None:
    """Raises UserError where images are trained on and evaluated on alike: not all sources tell splits apart."""
    train, evaluation = (open_images(source, split) for split in ("train", "eval"))
    # What a source calls its images may be the same in both splits; so are their bytes only where there is one split.
    if train.identity == evaluation.identity and [*train.read(0, 100)] == [*evaluation.read(0, 100)]:
        raise UserError(
            f"--data {source}: its images for training and evaluation are the same; must be digits, cifar:FOLDER, "
            f"hf:NAME, or folder:FOLDER with folders of classes in train/ and in one of {'/, '.join(EVAL_NAMES)}/"
        )


def _check_same_images(setting: Setting, trials: Sequence[Trial]) -> None:
    """Raises UserError where the study's folder has runs on images of another source."""
    images = _images_of(_root(setting), setting.data).resolve()
    for trial in trials:
        for path in (setting.folder / trial.name).glob("seed=*/config.json"):
            shards = read_json(path)["data"]["train"]
            if not Path(shards).resolve().is_relative_to(images):
                raise UserError(
                    f"--data {setting.data}: {setting.folder} has runs on other images, {shards}; name another --out"
                )


def _write(name: str, study: Study, folder: Path, where: str, findings: Findings, failures: Mapping[str, str]) -> str:
    """The report; `where`: at which scale, of what data and seeds."""
    lines = [*findings.sentences, *(f"failed: {run}: {reason}" for run, reason in failures.items())]
    text = f"# {name}: {study.what}\n\n{where}\n\n{markdown(findings.table)}\n\n" + "\n".join(
        f"- {line}" for line in lines
    )
    picture = io.BytesIO()
    findings.figure.savefig(picture, dpi=150, format="png")
    values = {"study": name, "setting": where, "table": findings.table, "sentences": lines}
    files = {
        f"{name}.md": f"{text}\n\n![{name}]({name}.png)\n".encode(),
        f"{name}.png": picture.getvalue(),
        f"{name}.json": (json.dumps(values, indent=1) + "\n").encode(),
    }
    write_together(folder, files)
    return (
        f"{aligned(findings.table)}\n\n"
        + "\n".join(lines)
        + f"\n\nReport:   {folder / name}.md\nPicture:  {folder / name}.png"
    )
