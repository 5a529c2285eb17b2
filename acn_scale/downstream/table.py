"""The results of many runs as one table: over seeds, at full depth and at the cut-off, networks against one another."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scipy import stats

from acn_scale.depth import cutoff
from acn_scale.downstream.server_files import server_files
from acn_scale.downstream.tasks import start_task
from acn_scale.errors import UserError
from acn_scale.files import check_writable, csv_lines, read_lines, write_file, write_together
from acn_scale.results import LOWER_IS_BETTER, NOT_SHARES, Measurement, read_measurements, write_measurements
from acn_scale.runs import read_config, read_json, settings
from acn_scale.tables import markdown
from acn_scale.watchdog import read_failure

# Keys of a config that runs of the same settings may differ in: seeds of a network start from networks of their own.
OF_EACH_RUN = ("run.", "train.init_from", "data.tokenizer", "model.depth")
# Dorovatas et al. 2025, table 6: accuracy (%) of BERT-base, and of an AC-BERT whose sizes are those of 3 of 12 blocks.
PUBLISHED = {
    "sst2": ("86.63 ± 0.09", "86.68 ± 0.06"),
    "qnli": ("83.14 ± 0.07", "83.07 ± 0.10"),
    "qqp": ("87.20 ± 0.09", "87.30 ± 0.07"),
}
BESIDE = {"mnli_mismatched": "mnli", "ax": "mnli"}  # what the networks of a task are evaluated on beside it


@dataclass(frozen=True)
class Scores:
    """Of one run on one task: its metrics by depth, the first of which counts."""

    run: Path
    seed: int | None
    settings: dict[str, Any]  # what a grid may have tried
    note: str
    metrics: dict[str, list[float]]  # at depth 0, 1, ...


@dataclass(frozen=True)
class Line:
    """Of one network on one task, by the settings with the highest median there, or, for noise and what is evaluated
    beside a task, with the highest median on the task itself. Shares as per cent.
    """

    task: str
    network: str
    metric: str
    seeds: int
    mean: float
    deviation: float | None  # of a sample; None of one seed
    median: float
    best: float
    cutoff: int | None  # by the mean over seeds; None where the networks are of several depths
    blocks: int | None  # likewise
    mean_there: float | None  # at the cut-off
    p: float | None  # paired t-test over seeds against the first network; None with fewer than two pairs
    settings: str
    note: str


def results_table(
    folders: Sequence[Path],
    *,
    tolerance: float = 0.5,
    table: Path | None = None,
    into: Path | None = None,
    submission: Path | None = None,
) -> str:
    """Each folder is one network: all evaluated runs below it. The first is what the others are tested against.

    Writes all lines as CSV to `table`, the means to <into>/eval/, where the depth report of a run shows them, and the
    first network's files for the GLUE server to `submission`: of each task those of the best run by the best settings.
    Returns the table as Markdown, with the published rows beside. Raises UserError for a folder without results.
    """
    if submission:
        check_writable(submission, "--submission")
    found = {folder: list(_runs(folder)) for folder in folders}
    names = _names(folders)
    lines, best = [], {}
    failures = [each for folder, runs in found.items() for each in _failures(folder, runs)]
    for task in dict.fromkeys(task for runs in found.values() for task, _ in runs):
        first: Sequence[Scores] = ()
        for folder, runs in found.items():
            chosen, by = _chosen(task, runs)
            first = first if folder != folders[0] else chosen
            if chosen and folder == folders[0]:
                best[task] = max(chosen, key=_at_full_depth).run
            if chosen:
                lines += _lines(task, names[folder], chosen, by, first if folder != folders[0] else (), tolerance)
    if not lines and not failures:
        raise UserError(f"{folders[0]}: holds no results; evaluations write eval/*.json")
    if table:
        try:
            write_file(table, csv_lines([[field.name for field in fields(Line)], *map(astuple, lines)]))
        except OSError as error:
            raise UserError(f"--csv {table}: {error.strerror}") from None
    if into:
        for task in dict.fromkeys(line.task for line in lines):
            write_measurements(into, f"mean_{task}", [_as_measurement(each) for each in lines if each.task == task])
    said = [f"Cut-off: the smallest depth within {tolerance} points of full depth."]
    if submission:
        files, lacking = server_files(best)
        write_together(submission, files)
        wanted = f", which wants all: lacking {', '.join(lacking)}" if lacking else ""
        said.append(f"{submission}: {len(files)} files for the GLUE server{wanted}.")
    return "\n".join([_markdown(lines), "", *said, *(f"failed: {line}" for line in failures)])


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The last part of each, or as it is given where two would be the same."""
    short = [folder.resolve().name for folder in folders]
    return {
        folder: name if short.count(name) == 1 else str(folder) for folder, name in zip(folders, short, strict=True)
    }


def _runs(folder: Path) -> Iterator[tuple[str, Scores]]:
    """(task, scores) of all below a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for run in sorted({path.parent.parent for path in folder.rglob("eval/*.json")}):
        measurements = read_measurements(run)
        tried = _settings(run)
        for task in dict.fromkeys(each.task for each in measurements):
            mine = [each for each in measurements if each.task == task]
            metrics = {metric: [each.value for each in mine if each.metric == metric]
                       for metric in dict.fromkeys(each.metric for each in mine) if _is_told(metric)}  # fmt: skip
            if metrics:  # or it is not done yet
                yield task, Scores(run, mine[0].seed, tried, mine[-1].note or "", metrics)


def _is_told(metric: str) -> bool:
    """Shares, and not the parts of another metric."""
    return metric not in NOT_SHARES and "/" not in metric


def _settings(run: Path) -> dict[str, Any]:
    """What a grid may have tried: keys of the config, and the task that the network it started from had learnt."""
    if not (run / "metrics.jsonl").exists():
        return {}
    found = settings(read_config(run).model_dump(mode="json"))
    return {key: value for key, value in found.items() if not key.startswith(OF_EACH_RUN)} | {"from": start_task(run)}


def _chosen(task: str, runs: Sequence[tuple[str, Scores]]) -> tuple[list[Scores], str]:
    """The scores on a task by the settings that have the highest median where they are judged, and these settings."""
    mine = [scores for name, scores in runs if name == task]
    where = task.partition("+")[0]
    where = BESIDE.get(where, where)
    judged = [scores for name, scores in runs if name == where] or mine
    keys = dict.fromkeys(key for each in judged for key in each.settings)
    varied = [key for key in keys if len({str(each.settings.get(key)) for each in judged}) > 1]
    groups: dict[str, list[Scores]] = {}
    for each in judged:
        name = ", ".join(f"{key.rpartition('.')[2]}={each.settings.get(key)}" for key in varied)
        groups.setdefault(name, []).append(each)
    if not groups:
        return [], ""
    name, best = max(groups.items(), key=lambda group: median(_at_full_depth(each) for each in group[1]))
    folders = {each.run for each in best}
    return [each for each in mine if each.run in folders], f"{name} (best of {len(groups)})" if len(groups) > 1 else ""


def _at_full_depth(scores: Scores) -> float:
    return next(iter(scores.metrics.values()))[-1]


def _lines(
    task: str, network: str, chosen: Sequence[Scores], by: str, first: Sequence[Scores], tolerance: float
) -> Iterator[Line]:
    for metric in chosen[0].metrics:
        curves = [each.metrics[metric] for each in chosen]
        values = [curve[-1] for curve in curves]
        sign = -1 if metric in LOWER_IS_BETTER else 1
        depths = sorted({len(curve) - 1 for curve in curves})
        cut = blocks = mean_there = None
        notes = [each.note for each in chosen]
        if len(depths) == 1:
            mean_curve = [fmean(column) for column in zip(*curves, strict=True)]
            cut, blocks = cutoff([sign * value for value in mean_curve], tolerance), depths[0]
            mean_there = 100 * mean_curve[cut]
        else:
            notes = [f"networks of {' and '.join(map(str, depths))} blocks", *notes]
        ours, theirs = _by_seed(chosen, metric), _by_seed(first, metric)
        yield Line(
            task=task,
            network=network,
            metric=metric,
            seeds=len(values),
            mean=100 * fmean(values),
            deviation=100 * stdev(values) if len(values) > 1 else None,
            median=100 * median(values),
            best=100 * sign * max(sign * value for value in values),
            cutoff=cut,
            blocks=blocks,
            mean_there=mean_there,
            p=paired([(value, theirs[seed]) for seed, value in ours.items() if seed in theirs]),
            settings=by,
            note="; ".join(dict.fromkeys(filter(None, notes))),
        )


def _by_seed(scores: Sequence[Scores], metric: str) -> dict[int, float]:
    """At full depth, of each seed that is that of one run; exports have none."""
    times = Counter(each.seed for each in scores)
    return {each.seed: each.metrics[metric][-1] for each in scores
            if each.seed is not None and times[each.seed] == 1 and metric in each.metrics}  # fmt: skip


def paired(pairs: Sequence[tuple[float, float]]) -> float | None:
    """p of Student's paired t-test, two-sided; 1 where none differ. None where there are too few pairs, or all differ
    by the same, which leaves no deviation to test by.
    """
    if len(pairs) < 2:
        return None
    if len({round(one - other, 12) for one, other in pairs}) == 1:
        return 1.0 if math.isclose(*pairs[0]) else None
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)


def _failures(folder: Path, runs: Sequence[tuple[str, Scores]]) -> Iterator[str]:
    """Runs that were started or submitted and are not among those with results, with the reason where it is known."""
    evaluated = {scores.run for _, scores in runs}
    marks = ("environment.json", "jobs/job.json")  # of the run itself, and of a launcher
    started = {path.parents[mark.count("/")] for mark in marks for path in folder.rglob(mark)}
    for run in sorted(started - evaluated):
        if "snapshot_" not in str(run):
            failure, ends = read_failure(run), read_lines(run / "jobs" / "ends.jsonl")
            failed = [end["reason"] for end in ends[-1:] if end["code"]]
            known = failed or ([failure["reason"]] if failure else [])
            yield f"{run}: {known[0] if known else _why_not_begun(run) or 'not finished, or not evaluated'}"


def _why_not_begun(run: Path) -> str | None:
    """Of one that was submitted to wait for the run that it starts from, which failed."""
    for path in sorted(run.glob("jobs/snapshot_*/config.json")):
        start = Path(read_json(path)["train"]["init_from"] or "")
        if failure := read_failure(start):
            return f"not begun: it waits for {start}, which failed: {failure['reason']}"
    return None


def _published(task: str) -> Iterator[list[str]]:
    if task in PUBLISHED:
        whole, cut = PUBLISHED[task]
        yield [task, "Res-BERT, published", "accuracy", "", whole, *[""] * 6]
        yield [task, "AC-BERT, published", "accuracy", *[""] * 4, "3 of 12", cut, "", ""]


def _markdown(lines: Sequence[Line]) -> str:
    head = [
        "task",
        "network",
        "metric",
        "seeds",
        "mean ± sd",
        "median",
        "best",
        "cut-off",
        "mean there",
        "p",
        "settings",
    ]
    rows = [head]
    for line, following in zip_longest(lines, lines[1:]):
        deviation = "" if line.deviation is None else f" ± {line.deviation:.2f}"
        settings = "; ".join(filter(None, [line.settings, line.note]))
        cut = ["", ""] if line.cutoff is None else [f"{line.cutoff} of {line.blocks}", f"{line.mean_there:.2f}"]
        rows.append([line.task, line.network, line.metric, str(line.seeds), f"{line.mean:.2f}{deviation}",
                     f"{line.median:.2f}", f"{line.best:.2f}", *cut,
                     "" if line.p is None else f"{line.p:.3f}", settings])  # fmt: skip
        if not following or following.task != line.task:
            rows += _published(line.task)
    return markdown(rows)


def _as_measurement(line: Line) -> Measurement:
    low_high = None
    if line.deviation is not None:
        half = line.deviation / math.sqrt(line.seeds) * float(stats.t.ppf(0.975, line.seeds - 1))
        low_high = [(line.mean - half) / 100, (line.mean + half) / 100]
    there = "" if line.cutoff is None else f"{line.mean_there:.2f} at its cut-off, {line.cutoff} of {line.blocks}"
    against = "" if line.p is None else f"p = {line.p:.3f} against the first"
    note = "; ".join(filter(None, [f"mean of {line.seeds} seeds", there, against, line.settings, line.note]))
    return Measurement(task=line.task, metric=line.metric, value=line.mean / 100, interval=low_high,
                       depth=line.blocks, mean_of=line.seeds, note=f"{line.network}: {note}")  # fmt: skip
