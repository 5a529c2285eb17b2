"""What could close the gap in training: ways to train an ACN, by the time that they take to their twin's accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.cli import load_config
from acn_scale.config import Config
from acn_scale.data.shards import ShardIndex
from acn_scale.durations import Horizon, lengthened
from acn_scale.runs import read_json, read_metrics, run_folder
from acn_scale.studies.pictures import label
from acn_scale.studies.study import (
    CONFIGS,
    TOLERANCE,
    Findings,
    Runs,
    Setting,
    Study,
    Trial,
    common_seeds,
    difference,
    paired,
    per_cent,
    step_seconds,
)

TWIN = "residual"
CLIPPED_TWIN = "residual_clip_before_unscale"
ACN = "model.connectivity=acn"
CLIP = f"train.clip_norm={2**-16}"
# What is changed in the run of the twin; nothing else is.
WAYS: dict[str, tuple[str, ...]] = {
    TWIN: (),
    "acn": (ACN,),
    "acn_longer": (ACN,),
    "identity": (ACN, "model.init=identity"),  # blocks begin near the identity
    "acn_scaled": ("model.connectivity=acn_scaled",),  # the sum weighs higher blocks less
    "h_acn": ("model.connectivity=h_acn",),  # short connections with learned gates
    "anneal": (ACN, "train.anneal=0.5run"),  # begins as its twin
    "short_warmup": (ACN,),
    "layer_decay": (ACN, "optim.layer_decay=0.9"),  # lower rates for lower blocks
    "cut": (ACN, "depth.cut_while_training=true"),  # dead blocks
    "muon": (ACN, "optim.name=muon", "train.zero_stage=1"),
    # The authors' Mixers, ACN and twin alike, clip gradients to 1 while these still have fp16's loss scale, 2^16 at
    # first: Adam's eps then matters.
    "clip_before_unscale": (ACN, CLIP),
    CLIPPED_TWIN: (CLIP,),
}
LONGER = {"acn_longer": 1.5}  # times
WARMUP = {"short_warmup": 0.5}  # times the config's own
TASKS = {
    "vit": ("studies/vit.toml", "vit/residual_vit_b16.toml"),
    "mixer": ("studies/mixer.toml", "mixer/residual_mixer_cifar10.toml"),
    "bert": ("studies/bert.toml", "bert/residual_bert_base.toml"),
}
# At laptop scale: steps, and what makes 31 runs a seed short enough.
STEPS = {"vit": 200, "mixer": 250, "bert": 360}
SMALLER = {"vit": "model.depth=9", "mixer": "model.depth=9", "bert": "model.depth=3"}
# A BERT's steps are long, and its LayerNorms follow the joins, which not all patterns take.
OF_BERT = (TWIN, "acn", "acn_longer", "acn_scaled", "anneal")
DEPTH, TIME = 2 / 3, 1.1  # of the twin's: what a way may take to have closed the gap
READINGS = 10  # evaluations in a run


def trials(setting: Setting) -> list[Trial]:
    """Each way on each task; on a BERT, those of OF_BERT."""
    found = []
    laptop = setting.scale == "laptop"
    for task, (small, large) in TASKS.items():
        config, data = CONFIGS / (small if laptop else large), "text" if task == "bert" else "images"
        cfg = load_config(config, [])
        usual = f"{STEPS[task]}step" if laptop else cfg.train.length
        values = [f"{key}={1 / READINGS}run" for key in ("eval.every", "train.log_every")]
        values += ["model.connectivity=residual", *[SMALLER[task]] * laptop]
        for way in OF_BERT if task == "bert" else WAYS:
            length = lengthened(usual, LONGER[way]) if way in LONGER else usual
            keys = [*values, f"train.length={length}", *WAYS[way]]
            if way in WARMUP:
                keys.append(f"optim.warmup={lengthened(cfg.optim.warmup, WARMUP[way])}")
            found.append(Trial(f"{task}-{way}", config, keys, data if laptop else None, needed=way == TWIN))
    return found


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
    table, closed, gaps = [["task", "way", *said]], {}, {}
    twin_of = {name: runs[f"{name.partition('-')[0]}-{TWIN}"] for name in runs}
    alone = [name for name, each in runs.items() if not common_seeds(each, twin_of[name])]
    runs = {name: each for name, each in runs.items() if name not in alone}
    for name, each in runs.items():
        task, _, way = name.partition("-")
        mine, twins = ([readings(cfg) for cfg in part.configs] for part in paired(each, twin_of[name]))
        ends = [run[-1] for run in mine]
        row = [task, way, per_cent([end.full for end in ends]), per_cent([end.cut for end in ends])]
        pairs = [(reached(run, twin[-1].full), twin[-1]) for run, twin in zip(mine, twins, strict=True)]
        there = [(mark, twin) for mark, twin in pairs if mark]
        steps, clock = ([getattr(mark, of) / getattr(twin, of) for mark, twin in there] for of in ("steps", "seconds"))
        closed[task, way] = max(clock) if len(there) == len(pairs) else math.inf
        gaps[task, way] = fmean(gap(run, twin[-1]) for run, twin in zip(mine, twins, strict=True))
        table.append([*row, f"{len(there)} of {len(pairs)}", _mean(steps), _mean(clock)])
    left_out = [f"{name} is left out: none of its seeds is finished of its twin too." for name in alone]
    found = [*sentences(closed, gaps), *clipped(runs), *left_out, *differences(setting)]
    return Findings(table, picture(runs), found)


def _mean(shares: Sequence[float]) -> str:
    return f"{fmean(shares):.2f}" if shares else "-"


ByWay = Mapping[tuple[str, str], float]  # of task and way


def sentences(closed: ByWay, gaps: ByWay) -> list[str]:
    """`closed`: the slowest seed's share of the twin's wall-clock; inf where not all reached its accuracy. `gaps`: see
    gap.
    """
    found, own = [], ""
    for way in dict.fromkeys(way for _, way in closed if way != CLIPPED_TWIN):
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
        ways = {way: value for (each, way), value in gaps.items() if each == task and way not in (TWIN, CLIPPED_TWIN)}
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


def clipped(runs: Mapping[str, Runs]) -> list[str]:
    """The ACN beside its twin where the gradients of both are clipped as the authors'."""
    said = []
    for task in TASKS:
        names = f"{task}-clip_before_unscale", f"{task}-{CLIPPED_TWIN}"
        if all(name in runs for name in names) and common_seeds(*(runs[name] for name in names)):
            acn, twin = (
                [readings(cfg)[-1] for cfg in each.configs] for each in paired(*(runs[name] for name in names))
            )
            full, cut = (
                100 * fmean(getattr(one, of) - getattr(other, of) for one, other in zip(acn, twin, strict=True))
                for of in ("full", "cut")
            )
            said.append(
                f"{task}, both with gradients clipped before the loss scale is taken off: the ACN is "
                f"{difference(full)} than its twin, at two thirds of the depth {difference(cut)}."
            )
    return said


def differences(setting: Setting) -> list[str]:
    said = [
        f"To reach is to be within {TOLERANCE} points of the twin's last accuracy for the first time, lasting or not "
        "(time to accuracy). Steps and wall-clock are shares of "
        "the twin's whole run, means of the seeds that reached it; wall-clock is of training alone, each step as "
        "fast as its run's fastest stretch with as many blocks: other runs beside it slow the rest.",
        "All have the twin's hyper-parameters; a BERT tries five of the ways. The paper's ACNs took 1.4 to 2.3 times "
        "the epochs of their twins.",
    ]
    if setting.scale == "laptop":
        said.append("Here the runs are a few hundred steps of small networks.")
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
