"""Do ACNs forget less? Tasks of a few classes each, learnt one after another, by an ACN and its twin."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.continual import Retention, read_retention
from acn_scale.runs import run_folder
from acn_scale.studies.pictures import label
from acn_scale.studies.study import (
    AUTHORS,
    CONFIGS,
    TWINS,
    Findings,
    Runs,
    Setting,
    Study,
    Trial,
    check_classes,
    difference,
    paired,
    per_cent,
)

DEPTHS = (5, 10, 15)
# The paper's methods at all depths; references at the last one, with the first settings that were tried.
METHODS = {"naive": (), "si": ("continual.strength=1.0", "continual.damping=0.1")}
REFERENCES = {"ewc": ("continual.strength=1000.0",), "replay": ("continual.memory=5",)}
PASSES = 5  # over each task, at laptop scale
IMAGES = 8_000  # at most, at laptop scale
# Dorovatas et al. 2025, table 3: average accuracy (%) and average forgetting (points).
PUBLISHED = {
    "acn-naive": ("32.97 ± 2.4", "46.55 ± 2.2", "32.94 ± 5.3", "45.46 ± 5.8", "31.61 ± 2.2", "46.91 ± 2.4"),
    "residual-naive": ("31.77 ± 1.8", "52.76 ± 2.3", "28.16 ± 1", "54.89 ± 1.6", "26.14 ± 2.3", "54.49 ± 2.2"),
    "acn-si": ("44.5 ± 2.2", "35.7 ± 2.1", "46.1 ± 1.3", "33.8 ± 0.4", "46.2 ± 0.8", "32 ± 1.8"),
    "residual-si": ("43.47 ± 3.1", "42.4 ± 4.1", "36.1 ± 5", "44.6 ± 3.7", "32.1 ± 0.8", "50 ± 2.1"),
}


def trials(setting: Setting) -> list[Trial]:
    """Both twins under each method."""
    paper, shape, selection = setting.scale == "paper", AUTHORS, {}
    if not paper:
        classes = check_classes(setting.data, 4, "for two tasks of two each")
        tasks, size = tasks_of(classes)
        shape = [f"continual.tasks={tasks}", f"train.length={PASSES * tasks}ep"]
        selection = {"per_class": IMAGES // classes}
        if tasks * size < classes:
            selection["first_classes"] = tasks * size
    found = []
    for method, keys in (METHODS | REFERENCES).items():
        for depth in DEPTHS if method in METHODS else DEPTHS[-1:]:
            for twin, prefix in TWINS.items():
                values = [*shape, *keys, f"continual.method={method}", f"model.depth={depth}"]
                name = f"{twin}-{method}-{depth}"
                if paper:
                    found.append(Trial(name, CONFIGS / f"continual/{prefix}_mixer_cifar100.toml", values))
                else:
                    config, values = CONFIGS / "studies/continual.toml", [*values, f"model.connectivity={twin}"]
                    found.append(Trial(name, config, values, "images", selection))
    return found


def tasks_of(classes: int) -> tuple[int, int]:
    """(tasks, classes of each): five a task, as the paper deals CIFAR-100, or five tasks where classes are few; where
    they do not come out even, the last classes are left out.
    """
    tasks = max(classes // 5, min(5, classes // 2))
    return tasks, classes // tasks


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """What is known at the end, what was forgotten, and whether an ACN forgets less than its twin on each seed."""
    kept = {name: _retentions(each) for name, each in runs.items()}
    head = ["network", "method", "L", "average accuracy (%)", "average forgetting (points)", "when learnt (%)"]
    table = [[*head, "published accuracy", "published forgetting"]]
    for name, each in kept.items():
        twin, method, depth = name.split("-")
        published = PUBLISHED.get(f"{twin}-{method}", ())[2 * DEPTHS.index(int(depth)) :][:2] or ("", "")
        ours = [[one.accuracy for one in each], [one.forgetting for one in each], [fmean(one.learnt) for one in each]]
        table.append([twin, method, depth, *map(per_cent, ours), *published])
    sentences = [_compared(name, runs) for name in runs if name.startswith("acn")]
    sentences += [_helped(name, runs) for name in runs if "-naive-" in name]
    sentences.append("Forgetting is the fall of a task's accuracy since it was learnt, averaged over all tasks.")
    sentences.append(
        "SI has strength 1, and damping 0.1, which the paper does not state; EWC has strength 1000 and the Fisher "
        "information of the labels; half of each batch is replayed, from 5 images of each earlier class."
    )
    sentences.append(
        "Nor does the paper state these: the learning rate is constant, images are as they are, each task has its part "
        "of one head, and the optimizer goes on from task to task."
    )
    if setting.scale == "laptop":
        cfg = next(iter(runs.values())).configs[0]
        tasks, size = cfg.continual.tasks, cfg.model.num_classes // cfg.continual.tasks
        sentences.append(
            f"Here {tasks} tasks of {size} classes of small images, {IMAGES:,} at most, {PASSES} passes, a width of "
            "32 and Eq. 1 alone; the published values are of 20 tasks of 5 classes of CIFAR-100, 50,000 images, 10 "
            "passes, and the authors' block, which keeps a skip, at a width of 128."
        )
    return Findings(table, _figure(kept), sentences)


def _retentions(runs: Runs) -> list[Retention]:
    return [read_retention(run_folder(cfg)) for cfg in runs.configs]


def _pairs(one: Runs, other: Runs) -> list[tuple[Retention, Retention]]:
    """By seed."""
    return list(zip(*map(_retentions, paired(one, other)), strict=True))


def _compared(name: str, runs: Mapping[str, Runs]) -> str:
    _, method, depth = name.split("-")
    pairs = _pairs(runs[name], runs[name.replace("acn", "residual")])
    below = sum(acn.forgetting < twin.forgetting for acn, twin in pairs)
    gap = 100 * fmean(acn.forgetting - twin.forgetting for acn, twin in pairs)
    learnt = 100 * fmean(fmean(acn.learnt) - fmean(twin.learnt) for acn, twin in pairs)
    return (
        f"{method} at L = {depth}: the ACN forgets less than its twin on {below} of {len(pairs)} seeds, "
        f"{difference(gap, 'more', 'less')} on average; when learnt, its tasks are {difference(learnt)}."
    )


def _helped(name: str, runs: Mapping[str, Runs]) -> str:
    """What SI changes; with its damping well above the squared way of a weight, that can be little."""
    twin, _, depth = name.split("-")
    pairs = _pairs(runs[name], runs[f"{twin}-si-{depth}"])
    gain = 100 * fmean(naive.forgetting - si.forgetting for naive, si in pairs)
    return f"{twin} at L = {depth}: SI takes {gain:.1f} points off what is forgotten without it."


def _figure(kept: Mapping[str, list[Retention]]) -> Figure:
    """Forgetting and accuracy over depth, the mean and the range over the seeds."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, 2), {
        "average forgetting (points)": lambda one: one.forgetting, "average accuracy (%)": lambda one: one.accuracy
    }.items(), strict=True):  # fmt: skip
        for colour, method in enumerate(METHODS | REFERENCES):
            for twin in TWINS:
                points = {int(name.split("-")[2]): [100 * value(one) for one in each]
                          for name, each in kept.items() if name.startswith(f"{twin}-{method}-")}  # fmt: skip
                means = [fmean(values) for values in points.values()]
                # Of equal values the mean can be an ulp off.
                spans = [[max(0.0, span) for span in (mean - min(values), max(values) - mean)]
                         for mean, values in zip(means, points.values(), strict=True)]  # fmt: skip
                style = "o-" if twin == "acn" else "s--"
                axes.errorbar(
                    [*points],
                    means,
                    [*zip(*spans, strict=True)],
                    fmt=style,
                    color=f"C{colour}",
                    label=f"{twin}, {method}",
                )
        axes.set_xticks(DEPTHS)
        label(axes, "blocks", title)
    return figure


STUDIES = {"continual": Study("what twins forget of tasks that they learn one after another", trials, findings)}
