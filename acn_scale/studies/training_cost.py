"""Whether a way to train an ACN closes the gap in training: by the time that it takes to its twin's accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.config import Config
from acn_scale.data.shards import ShardIndex
from acn_scale.durations import Horizon
from acn_scale.runs import read_json, read_metrics, run_folder
from acn_scale.studies.pictures import label
from acn_scale.studies.study import (
    TOLERANCE,
    Findings,
    Runs,
    Setting,
    Study,
    common_seeds,
    difference,
    paired,
    per_cent,
    spread,
    step_seconds,
)
from acn_scale.studies.training_ways import EVALUATED, OF_BERT, OWN_TWINS, RULES, TASKS, TWIN, WAYS, trials

# Dorovatas et al. 2025, sections 3 and 4: what an ACN took to its twin's accuracy, both at full depth.
PUBLISHED = {
    "vit-acn": "2.33 times the epochs (700, 300)",
    "mixer-acn": "1.4 times the epochs (420, 300)",
    "bert-acn": "2 times the epochs (2, 1), by loss",
}
DEPTH, TIME = 2 / 3, 1.1  # of the twin's: what a way may take to have closed the gap


@dataclass(frozen=True)
class Reading:
    """A run's evaluation, by the optimizer steps and the seconds of training before it, and what it said (0..1) of full
    depth and of two thirds of the depth that the run began with."""

    steps: int
    seconds: float
    full: float
    cut: float


def readings(cfg: Config) -> list[Reading]:
    """Of metrics.jsonl, from when the network is what it is to be (train.anneal). Seconds are of training alone, of one
    process, each step as fast as the run was with as many blocks at its fastest: windows of equal work differ by a
    quarter on a machine with other runs."""
    found, seconds, before = [], 0.0, 0
    steps = read_json(run_folder(cfg) / "environment.json")["steps"]
    samples = ShardIndex.load(cfg.data.train, cfg.data.remote).num_samples
    annealed = Horizon(samples, cfg.train.global_batch_size, steps).count(cfg.train.anneal)
    fastest = step_seconds(cfg)
    for line in read_metrics(run_folder(cfg)):
        if "eval/accuracy" in line:
            step, blocks = line["step"], line["depth/blocks"]
            seconds += (step - before) * fastest[blocks]
            before = step
            if step >= annealed:
                depth = min(math.floor(DEPTH * cfg.model.depth), blocks)
                found.append(Reading(step, seconds, line["eval/accuracy"], line[f"eval/depth_{depth:02d}/accuracy"]))
    return found


def reached(run: Sequence[Reading], accuracy: float) -> Reading | None:
    """The first evaluation at which two thirds of the depth were within the tolerance of this accuracy, whether they
    stayed so or not: time to accuracy, as is usual.
    """
    return next((each for each in run if each.cut >= accuracy - TOLERANCE / 100 - 1e-9), None)


def gap(run: Sequence[Reading], twin: Reading) -> float:
    """Points from the twin's accuracy to the best at two thirds of the depth in the time that a way may take."""
    within = [each.cut for each in run if each.seconds <= TIME * twin.seconds]
    return 100 * (max(within, default=-math.inf) - twin.full)


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    said = ["accuracy (%)", "at two thirds of the depth (%)", "seeds that reached the twin", "steps", "wall-clock"]
    table, closed, gaps = [["task", "way", *said, "published"]], {}, {}
    twins_of = {name: twins(name, runs) for name in runs}
    alone = [name for name, each in runs.items() if not common_seeds(each, *twins_of[name])]
    runs = {name: each for name, each in runs.items() if name not in alone}
    for name, each in runs.items():
        task, _, way = name.partition("-")
        mine, *others = ([readings(cfg) for cfg in part.configs] for part in paired(each, *twins_of[name]))
        goals = [max((run[-1] for run in seed), key=lambda end: end.full) for seed in zip(*others, strict=True)]
        ends = [run[-1] for run in mine]
        row = [task, way, per_cent([end.full for end in ends]), per_cent([end.cut for end in ends])]
        pairs = [(reached(run, goal.full), goal) for run, goal in zip(mine, goals, strict=True)]
        there = [(mark, goal) for mark, goal in pairs if mark]
        steps, clock = ([getattr(mark, of) / getattr(goal, of) for mark, goal in there] for of in ("steps", "seconds"))
        closed[task, way] = max(clock) if len(there) == len(pairs) else math.inf
        gaps[task, way] = fmean(gap(run, goal) for run, goal in zip(mine, goals, strict=True))
        row += [f"{len(there)} of {len(pairs)}", _mean(steps), _mean(clock)]
        table.append([*row, PUBLISHED.get(name, "")])
    left_out = [f"{name} is left out: none of its seeds is finished of its twin too." for name in alone]
    found = [*sentences(closed, gaps), *cut_blocks(runs), *by_rule(runs), *cutoffs(runs)]
    found += [*left_out, *differences(setting)]
    return Findings(table, picture(runs), found)


def twins(name: str, runs: Mapping[str, Runs]) -> list[Runs]:
    """The plain twin of a trial, and its own where it has one."""
    task, _, way = name.partition("-")
    names = [f"{task}-{TWIN}", f"{task}-{OWN_TWINS.get(way)}"]
    return [runs[twin] for twin in names if twin in runs]


def _mean(shares: Sequence[float]) -> str:
    return f"{fmean(shares):.2f}" if shares else "-"


ByWay = Mapping[tuple[str, str], float]  # of task and way


def sentences(closed: ByWay, gaps: ByWay) -> list[str]:
    """`closed`: the slowest seed's share of the twin's wall-clock; inf where not all reached its accuracy. `gaps`: see
    gap.
    """
    found, own = [], ""
    for way in dict.fromkeys(way for _, way in closed if way not in OWN_TWINS.values()):
        shares = {task: value for (task, each), value in closed.items() if each == way}
        within = [task for task, value in shares.items() if value <= TIME]
        said = f"{', '.join(within) or 'none'} of {', '.join(shares)}."
        if way == TWIN:
            own = f"The twin itself, cut to two thirds of its depth, is as near to its full depth on: {said}"
        else:
            found.append((len(within), f"{way}: {said}"))
    most = max((number for number, _ in found), default=0)
    verdict = f"On two tasks a way reached its twin's accuracy in at most {TIME} times its wall-clock with two thirds "
    verdict += "of its depth"
    if most >= 2:
        return [f"{verdict}, on all seeds. Tasks on which it did:", *(line for _, line in found), own]
    verdict = verdict.replace("a way", "no way")
    return [f"{verdict}, on all seeds. Tasks on which it did:", *(line for _, line in found), closest(gaps), own]


def closest(gaps: ByWay) -> str:
    """Which way comes closest on how many tasks, and by how much on each of them."""
    best: dict[str, list[str]] = {}
    for task in dict.fromkeys(task for task, _ in gaps):
        residual = TWIN, *OWN_TWINS.values()
        ways = {way: value for (each, way), value in gaps.items() if each == task and way not in residual}
        if ways:
            way = max(ways, key=ways.__getitem__)
            points = difference(ways[way], "above", "below")
            best.setdefault(way, []).append(f"{task} ({points} its twin)")
    of = sum(map(len, best.values()))
    parts = [
        f"{way} on {len(tasks)} of {of} tasks, {', '.join(tasks)}"
        for way, tasks in sorted(best.items(), key=lambda each: -len(each[1]))
    ]
    return f"Closest to it, by the best evaluation within that time: {'; '.join(parts)}."


def cut_blocks(runs: Mapping[str, Runs]) -> list[str]:
    """How many blocks each run of "cut" had lost when it was last evaluated."""
    said = []
    for task in TASKS:
        if each := runs.get(f"{task}-cut"):
            depth = each.configs[0].model.depth
            gone = [depth - int(blocks) for blocks in each.last("depth/blocks")]
            lost = f"lost {', '.join(map(str, gone))} of its {depth} blocks, by seed"
            said.append(f"{task}: cut {lost if any(gone) else 'lost no block and is the same as acn'}.")
    return said


def by_rule(runs: Mapping[str, Runs]) -> list[str]:
    """The ACN beside its twin where the updates of both are made alike, and not as those of the plain two."""
    said = []
    for task, (way, twin) in product(TASKS, OWN_TWINS.items()):
        names = f"{task}-{way}", f"{task}-{twin}"
        if all(name in runs for name in names) and common_seeds(*(runs[name] for name in names)):
            acn, twin = (
                [readings(cfg)[-1] for cfg in each.configs] for each in paired(*(runs[name] for name in names))
            )
            full, cut = (
                100 * fmean(getattr(one, of) - getattr(other, of) for one, other in zip(acn, twin, strict=True))
                for of in ("full", "cut")
            )
            said.append(
                f"{task}, both {RULES[way]}: the ACN is {difference(full)} than its twin, at two thirds of the depth "
                f"{difference(cut)}."
            )
    return said


def cutoffs(runs: Mapping[str, Runs]) -> list[str]:
    """Of ACN and twin, plain and by each other rule: whether it is the rule that makes them compress."""
    said = []
    for task in TASKS:
        named = {way: runs.get(f"{task}-{way}") for way in ("acn", TWIN, *chain(*OWN_TWINS.items()))}
        means = [f"{way} {spread(each.cutoffs)}" for way, each in named.items() if each]
        if means:
            said.append(f"{task}: cut-offs within {TOLERANCE} points of full depth (blocks): {', '.join(means)}.")
    return said


def differences(setting: Setting) -> list[str]:
    left_out = [way for way in WAYS if way not in (*OF_BERT[setting.scale], *OWN_TWINS.values())]
    said = [
        f"To reach is to be within {TOLERANCE} points of the twin's last accuracy for the first time, lasting or not "
        "(time to accuracy). Steps and wall-clock are shares of "
        "the twin's whole run, means of the seeds that reached it; wall-clock is of training alone, each step as "
        "fast as its run's fastest stretch with as many blocks: other runs beside it slow the rest.",
        f"The twin of {' and '.join(RULES)} is, seed by seed, the more accurate one of the plain twin and one whose "
        "updates are made as the way's are. The authors' Mixers are clipped before the loss scale is taken off, which "
        "may be part of why they compress.",
        f"All have the twin's hyper-parameters; a BERT does not try {', '.join(left_out)}. layer_decay was tried "
        "downward alone: the lower a block, the lower its rate. Muon has AdamW's learning rate, at which its updates "
        "are as large, and no clipping. The published values are of ACN and twin at full depth.",
    ]
    if setting.scale == "laptop":
        said.append(
            f"Here the runs are a few hundred steps of small networks, evaluated on {EVALUATED:,} images at most, as "
            "many of each class."
        )
    return said


def picture(runs: Mapping[str, Runs]) -> Figure:
    """Accuracy at two thirds of the depth over the time trained, means over seeds; the twin's at full depth dashed."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for number, way in enumerate(WAYS):
            if each := runs.get(f"{task}-{way}"):
                columns = list(zip(*(readings(cfg) for cfg in each.configs), strict=True))
                value = "full" if way == TWIN else "cut"
                heights = [100 * fmean(getattr(reading, value) for reading in column) for column in columns]
                times = [fmean(reading.seconds for reading in column) for column in columns]
                style = {"linestyle": "--", "color": "black"} if way == TWIN else {"color": f"C{number % 10}"}
                axes.plot(times, heights, label=way, linewidth=1, marker="." if number > 10 else None, **style)
        first = axes is figure.axes[0]
        label(axes, "training (s)", "accuracy at two thirds of the depth (%)", task, legend=first)
    return figure


STUDIES = {"training-cost": Study("ways to train an ACN, by the time to the twin's accuracy", trials, findings)}
