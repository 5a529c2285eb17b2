"""A fine-tuned classifier of texts on its task: GLUE's metrics at every depth, and the files that its server takes."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acn_scale import distributed
from acn_scale.config import Config, SentenceDataConfig
from acn_scale.convert.network import Network
from acn_scale.convert.sources import read_model, results_folder, run_of
from acn_scale.convert.start import START
from acn_scale.data import evaluation_of
from acn_scale.data.samples import Samples
from acn_scale.data.sentences import TextNoise
from acn_scale.data.shards import INDEX_NAME, ShardIndex
from acn_scale.data.tasks import TASKS, Task
from acn_scale.downstream.metrics import measure
from acn_scale.downstream.predictions import Predictions, as_table, predict
from acn_scale.errors import RunFailed, UserError
from acn_scale.files import csv_lines, write_together
from acn_scale.results import Measurement, read_measurements, write_measurements
from acn_scale.runs import read_config, read_json

log = logging.getLogger(__name__)

DIGITS = 3  # of predicted numbers, as they are written and measured
SAME = "all samples are given the same class"


@dataclass(frozen=True)
class Split:
    """Shards of a task: what `name` its results get, and the server's file where it is a test set."""

    name: str
    index: ShardIndex
    task: Task
    server: str | None


def evaluate_tasks(
    sources: Sequence[Path],
    device: torch.device,
    *,
    data: str | None = None,
    noises: dict[str, TextNoise] | None = None,
    out: Path | None = None,
) -> Iterator[str]:
    """evaluate_task() of one source after the other: what it found, as text. One that fails does not stop the others.

    Raises UserError or RunFailed at the end, as the first that failed did, naming all that did.
    """
    if out and len(sources) > 1:
        raise UserError(f"--out {out}: is for the results of one source, and there are {len(sources)}")
    failures: list[tuple[Path, UserError | RunFailed]] = []
    for source in sources:
        try:
            found = evaluate_task(source, device, data=data, noises=noises, out=out)
        except (UserError, RunFailed) as error:
            failures.append((source, error))
        else:
            yield f"{source}\n{summaries(found)}" if len(sources) > 1 else summaries(found)
    if failures and len(sources) == 1:
        raise failures[0][1]
    if failures:
        said = [str(error).removeprefix(f"{source}: ") for source, error in failures]
        named = "; ".join(f"{source}: {text}" for (source, _), text in zip(failures, said, strict=True))
        raise type(failures[0][1])(f"{len(failures)} of {len(sources)} failed: {named}")


def evaluate_task(
    source: Path,
    device: torch.device,
    *,
    data: str | None = None,
    noises: dict[str, TextNoise] | None = None,
    out: Path | None = None,
) -> list[Measurement]:
    """Read out a run, a checkpoint or an export of a classifier of texts at every depth, on its evaluation shards and
    every split that lies beside them; `data` takes the place of these.

    Writes, to `out` or the folder of the run or export, eval/<task>.json, eval/predictions/<split>.tsv, from which
    alone the metrics are computed, and, where there are test sets, submission/*.tsv for the GLUE server. With `noises`,
    only eval/<task>+<noise>.json, on noisy texts. Call it on every rank; rank 0 writes. Raises UserError.
    """
    with distributed.together():
        net = read_model(source)
        cfg, batch_size, seed = _data_of(source, net, data)
        folder = results_folder(source, net, out)
        splits = _splits(Path(cfg.eval), net, source)
        if noises and all(split.server for split in splits):
            raise UserError(f"--data {cfg.eval}: has no labels, by which to judge what noise does")
        run = run_of(source, net)
        start = run and start_task(run)
    model, digest = net.model.to(device), net.digest()
    found, files = [], {}
    passes = [(split, name, noise) for split in splits for name, noise in (noises or {"": None}).items()]
    for split, noise_name, noise in passes:
        if noise and split.server:
            continue
        evaluation = evaluation_of(
            cfg.model_copy(update={"eval": str(split.index.folder)}),
            net.card.model,
            batch_size=batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            share=distributed.union,
            noise=noise,
        )
        name = f"{split.name}+{noise_name}" if noise else split.name
        predictions = _written(predict(model, evaluation, device, name), split.task)
        if split.server:
            files[f"submission/{split.server}.tsv"] = _submission(predictions, split, evaluation.samples)
        else:
            found += _measured(predictions, split, name, digest, seed, start)
            if distributed.rank() == 0:
                _warn(predictions, split.task, name)
        if not noise:
            files[f"eval/predictions/{split.name}.tsv"] = as_table(predictions, labelled=not split.server)
    with distributed.together():
        if distributed.rank() == 0:
            _write(folder, found, files)
    return found


def is_evaluated(run: Path) -> bool:
    """Whether all that evaluate_task would write of a run is there: of its weights, and newer than the shards."""
    net = read_model(run)
    splits = _splits(Path(_data_of(run, net, None)[0].eval), net, run)
    paths = {run / (f"submission/{split.server}.tsv" if split.server else f"eval/{split.name}.json"): split
             for split in splits}  # fmt: skip
    if any(not path.exists() or path.stat().st_mtime < (split.index.folder / INDEX_NAME).stat().st_mtime
           for path, split in paths.items()):  # fmt: skip
        return False
    names, digest = {split.name for split in splits}, net.digest()
    return all(each.checkpoint == digest for each in read_measurements(run) if each.task in names)


def _write(folder: Path, found: Sequence[Measurement], files: dict[str, bytes]) -> None:
    for place in {str(Path(name).parent) for name in files}:
        part = {Path(name).name: content for name, content in files.items() if str(Path(name).parent) == place}
        write_together(folder / place, part)
    for task in dict.fromkeys(each.task for each in found):
        mine = [each for each in found if each.task == task]
        log.info("%s: %s", write_measurements(folder, task, mine), summaries(mine))


def summaries(found: Sequence[Measurement]) -> str:
    """At full depth, a line for each task."""
    lines = []
    for task in dict.fromkeys(each.task for each in found):
        mine = [each for each in found if each.task == task]
        rows = [each for each in mine if each.depth == mine[-1].depth]
        values = (f"{each.metric} {100 * each.value:.2f} ({' to '.join(f'{100 * end:.2f}' for end in each.interval)})"
                  for each in rows)  # fmt: skip
        lines.append(f"{task}, {rows[0].samples:,} samples: {', '.join(values)}")
    return "\n".join(lines)


def _data_of(source: Path, net: Network, data: str | None) -> tuple[SentenceDataConfig, int, int | None]:
    """(data, batch size, seed)."""
    if run := run_of(source, net):
        cfg: Config = read_config(run)
        if not isinstance(cfg.data, SentenceDataConfig):
            raise UserError(f"{source}: data.kind = {cfg.data.kind}: must be a run on sentences")
        found = cfg.data.model_copy(update={"eval": data}) if data else cfg.data
        return found, cfg.eval.batch_size, cfg.run.seed
    if net.card.model.name != "bert" or not net.card.model.num_classes:
        raise UserError(f"{source}: must be a classifier of texts")
    if data is None:
        raise UserError(f"{source}: an export has no evaluation shards of its own; name some with --data")
    found = SentenceDataConfig(kind="sentences", train=data, eval=data, tokenizer=str(source))
    return found, 256, None


def _splits(folder: Path, net: Network, source: Path) -> list[Split]:
    """A folder of a task's shards, and the evaluation and test splits that lie beside it; of MNLI, its diagnostic set.
    A folder that is none of these splits, such as the training set, stands alone.

    Raises UserError for a task that is not the network's, where its training shards still tell.
    """
    name = ShardIndex.load(folder).info.get("task")
    if name not in TASKS:
        raise UserError(f"{folder}: its index names no task of GLUE; tools/make_glue_shards.py makes such shards")
    learnt = _task_of(net.card.data)
    if learnt not in (None, name) and (learnt, name) != ("mnli", "ax"):
        raise UserError(f"--data {folder}: holds {name}; {source} was trained on {learnt}")
    if folder.resolve().name not in TASKS[name].splits or folder.resolve().name == "train":
        return [Split(f"{name}_{folder.resolve().name}", ShardIndex.load(folder), TASKS[name], None)]
    found = []
    for place in (name, *(["ax"] if name == "mnli" else [])):
        task = TASKS[place]
        for split in task.splits:
            path = folder.parent / split if place == name else folder.parents[1] / place / split
            if split != "train" and (path / "index.json").exists():
                server = task.server.get(split, task.folder) if split.startswith("test") else None
                label = f"{place}_{split}" if server else place + split.removeprefix("eval")
                found.append(Split(label, ShardIndex.load(path), task, server))
    return found


def start_task(run: Path) -> str | None:
    """What the network that a run started from had been fine-tuned on."""
    return _task_of(read_json(run / START)["data"]) if (run / START).exists() else None


def _task_of(data: str | None) -> str | None:
    """What a network was fine-tuned on, by its shards, or by their folder as make_glue_shards names it; None where
    neither tells.
    """
    shards = Path(data or "")  # of an export, its last two parts
    if (shards / INDEX_NAME).exists():
        return ShardIndex.load(shards).info.get("task")
    return shards.parent.name if shards.parent.name in TASKS else None


def _written(predictions: Predictions, task: Task) -> Predictions:
    """With logits (samples, depths, classes) made classes, or rounded numbers: (samples, depths)."""
    labels, logits = predictions.labels, predictions.outputs
    if task.labels:
        return Predictions(predictions.samples, labels, logits.argmax(axis=-1))
    # A batch has labels in fp32; measured are the decimals that stand for them in the file.
    decimals = labels.astype(str).astype(np.float64)
    return Predictions(predictions.samples, decimals, logits[..., 0].astype(np.float64).round(DIGITS))


def _measured(
    predictions: Predictions, split: Split, name: str, digest: str, seed: int | None, start: str | None = None
) -> list[Measurement]:
    """start: the task that the network had learnt before, if any."""
    labels, classes = predictions.labels, len(split.task.labels)
    found = []
    for depth, said in enumerate(predictions.outputs.T):
        note = _no_better_than_one_class(labels, said) if classes else None
        for metric in split.task.metrics:
            value, bounds = measure(metric, labels, said, classes)
            found.append(
                Measurement(
                    task=name,
                    metric=metric,
                    value=value,
                    interval=bounds,
                    samples=len(labels),
                    depth=depth,
                    checkpoint=digest,
                    seed=seed,
                    note="; ".join(filter(None, [start and f"from {start}", note])) or None,
                )
            )
    return found


def _warn(predictions: Predictions, task: Task, name: str) -> None:
    """Where the classes at full depth are no better than one for all samples."""
    said = predictions.outputs[:, -1]
    if task.labels and (note := _no_better_than_one_class(predictions.labels, said)):
        log.warning("%s: %s", name, note if note != SAME else f"{note}, {task.labels[said[0]]}")


def _no_better_than_one_class(labels: np.ndarray, said: np.ndarray) -> str | None:
    """How the classes are no better than one for all samples; None where they are."""
    if len(np.unique(said)) == 1:
        return SAME
    accuracy, share = (said == labels).mean(), np.unique(labels, return_counts=True)[1].max() / len(labels)
    if accuracy > share:
        return None
    return f"accuracy {100 * accuracy:.2f} is not above {100 * share:.2f}, the share of the most frequent label"


def _submission(predictions: Predictions, split: Split, samples: Samples) -> bytes:
    """At full depth, as the GLUE server takes it."""
    names = split.task.labels
    rows: list[list[object]] = [["index", "prediction"]]
    for sample, said in zip(predictions.samples, predictions.outputs[:, -1], strict=True):
        shard, number = samples.place(int(sample))
        index = json.loads(samples.reader.read(shard, number)["json"])["index"]
        rows.append([index, names[said] if names else f"{min(max(said, 0), 5):.{DIGITS}f}"])
    return csv_lines(rows, "\t")
