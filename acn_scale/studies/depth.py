"""Do ACNs compress more? Depth curves of an ACN and its twin, and how the cut-off grows with the task (figures 3 to 5,
table 6).
"""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.depth import cost
from acn_scale.downstream.table import PUBLISHED as TABLE_6
from acn_scale.studies.pictures import band, label
from acn_scale.studies.study import (
    CONFIGS,
    TOLERANCE,
    TWINS,
    Findings,
    Runs,
    Setting,
    Study,
    Trial,
    check_classes,
    compared,
    per_cent,
    spread,
)

CLASSES = (2, 5, 10)
# Dorovatas et al. 2025, sections 3 and 4 and table 6: blocks that are needed, accuracy, and the cost of so many blocks.
AC_BERT, RES_BERT = "3 of 12, {} %, 46M, 5.44 GFLOPs, 174 MB", "12 of 12, {} %, 110M, 21.72 GFLOPs, 418 MB"
PUBLISHED = {
    "depth-vit": {
        "acn": "7 of 12 (6 by the text), 70.76 ± 0.12 %, 51M, 19.7 GFLOPs, 195 MB",
        "residual": "12 of 12, 70.74 ± 0.09 %, 86M, 33.7 GFLOPs, 330 MB",
    },
    "depth-bert": {
        "acn": "12 of 12 (the authors' log)",
        **{f"acn-{task}": AC_BERT.format(cut) for task, (_, cut) in TABLE_6.items()},
        **{f"residual-{task}": RES_BERT.format(whole) for task, (whole, _) in TABLE_6.items()},
    },
    "depth-mixer": {"acn-2": "8 of 16", "acn-5": "10 of 16", "acn-10": "12 of 16"}
    | {f"residual-{classes}": "16 of 16" for classes in CLASSES},
}
# What the published values are of that is not so here, at one scale or both.
OTHERWISE = {
    "depth-vit": "The published values are of ViT-B/16 on ImageNet-1K, after 700 epochs of the ACN and 300 of its "
    "twin. The authors' ACN also has an identity round its MLPs and a LayerNorm after attention; here it is Eq. 1 "
    "alone. Which of their recipes gave the values is not known.",
    "depth-mixer": "The published numbers are of 16 blocks of width 128 on CIFAR-10, after 420 epochs of the ACN and "
    "300 of its twin, with the authors' block, which keeps a skip: so are those of --scale paper, but for gradients "
    "that the authors' code clips before it takes off the loss scale; at laptop scale the ACN is Eq. 1 alone.",
    "depth-bert": "The published values are of BERT-base, after two epochs of the ACN and one of its twin and six of "
    "fine-tuning on SST-2, QNLI and QQP, which is done at --scale paper alone; the sizes are with 30,522 pieces. On "
    "masked tokens the authors' own AC-BERT needs all 12 blocks, by their log.",
}
PAPER = {
    "depth-vit": "vit/{}_vit_b16.toml",
    "depth-bert": "bert/{}_bert_base.toml",
    "depth-mixer": "mixer/authors_{}_mixer_cifar10.toml",
}
EPOCHS = {"acn": 420, "residual": 300}  # of figure 4, after which the twins are equally accurate


def twins(name: str, setting: Setting) -> list[Trial]:
    """An ACN and its residual twin, at laptop scale with the same settings but the connectivity."""
    if setting.scale == "paper":
        return [Trial(each, CONFIGS / PAPER[name].format(prefix)) for each, prefix in TWINS.items()]
    config = CONFIGS / "studies" / f"{name.removeprefix('depth-')}.toml"
    data = "text" if name == "depth-bert" else "images"
    return [Trial(each, config, [f"model.connectivity={each}"], data) for each in TWINS]


def by_tasks(setting: Setting) -> list[Trial]:
    """The twins on masked tokens; at the paper's scale also fine-tuned, where the ACN's cut-off shows."""
    found = twins("depth-bert", setting)
    if setting.scale == "paper":
        for trial in [*found]:
            for task in TABLE_6:
                data = [f"data.{split}=data/glue/{task}/{split}" for split in ("train", "eval")]
                found.append(Trial(f"{trial.name}-{task}", CONFIGS / "glue" / "paper.toml", data, after=trial.name))
    return found


def by_classes(setting: Setting) -> list[Trial]:
    """The twins on the first 2, 5 and 10 classes."""
    if setting.scale == "laptop":
        check_classes(setting.data, max(CLASSES), f"for the first {', '.join(map(str, CLASSES))}")
    found = []
    for trial in twins("depth-mixer", setting):
        for classes in CLASSES:
            if setting.scale == "paper":
                data = [f"data.{split}=data/cifar10_first{classes}/{split}" for split in ("train", "eval")]
                values = [] if classes == 10 else [f"model.num_classes={classes}", *data]
                values.append(f"train.length={EPOCHS[trial.name]}ep")
                found.append(Trial(f"{trial.name}-{classes}", trial.config, values))
            else:
                name, selection = f"{trial.name}-{classes}", {"first_classes": classes}
                found.append(Trial(name, trial.config, trial.overrides, "images", selection))
    return found


def findings_of(name: str, runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """Depth curves, their cut-offs, and whether each ACN's is below its twin's on each seed."""
    head = ["network", "accuracy (%)", f"cut-off within {TOLERANCE} points", "of", "there: parameters (M)", "GFLOPs"]
    table = [[*head, "MiB", "published"]]
    for trial, each in runs.items():
        blocks = len(each.accuracy[0]) - 1
        full = per_cent([curve[-1] for curve in each.accuracy])
        cells = [trial, full, spread(each.cutoffs), str(blocks), *cost_at_cutoff(each)]
        table.append([*cells, PUBLISHED[name].get(trial, "")])
    sentences = []
    for trial, each in runs.items():
        kind, _, task = trial.partition("-")
        if kind == "acn":
            of = f"{task} classes" if task.isdigit() else task
            sentences.append(compared(each, runs[trial.replace("acn", "residual")], f"{of}: the" if of else "The"))
    grown = [fmean(runs[f"acn-{classes}"].cutoffs) for classes in CLASSES] if f"acn-{CLASSES[0]}" in runs else []
    if grown:
        grows = "grows" if grown == sorted(set(grown)) else "does not grow"
        means = ", ".join(f"{value:.1f}" for value in grown)
        sentences.append(f"The ACN's cut-off {grows} with the number of classes: {means} blocks for 2, 5 and 10.")
    counted = (
        "Parameters, GFLOPs and MiB in fp32 are of the network cut at its cut-off, means over the seeds. The published "
        "GFLOPs leave out attention's products of tokens, and compute all tokens in the last block."
    )
    return Findings(table, curves(runs), [*sentences, counted, OTHERWISE[name], trained(runs)])


def cost_at_cutoff(runs: Runs) -> list[str]:
    """Of the networks cut there, to one block or more, means: parameters (M), GFLOPs of a sample, MiB in fp32."""
    cuts = [cost(cfg.model, max(1, depth)) for cfg, depth in zip(runs.configs, runs.cutoffs, strict=True)]
    parameters, flops = fmean(cut.parameters for cut in cuts), fmean(cut.flops for cut in cuts)
    return [f"{value:.3g}" for value in (parameters / 1e6, flops / 1e9, 4 * parameters / 2**20)]


def trained(runs: Mapping[str, Runs]) -> str:
    """How large the networks are, and how long their training: all ACNs alike, and all twins."""
    acn, twin = (next(each.configs[0] for name, each in runs.items() if name.startswith(kind)) for kind in TWINS)
    return (
        f"Here: {acn.model.depth} blocks of width {acn.model.dim}, train.length = {acn.train.length} of the ACN and "
        f"{twin.train.length} of its twin."
    )


def curves(runs: Mapping[str, Runs]) -> Figure:
    """Mean accuracy over depth, with the range over the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, each in runs.items():
        band(axes, name, range(len(each.accuracy[0])), [[100 * value for value in curve] for curve in each.accuracy])
    label(axes, "depth (blocks)", "accuracy (%)", "Readout at every depth: mean and range over seeds")
    return figure


def depth_study(name: str, what: str) -> Study:
    several = {"depth-mixer": by_classes, "depth-bert": by_tasks}
    trials = several.get(name, lambda setting: twins(name, setting))
    return Study(what, trials, lambda runs, setting: findings_of(name, runs, setting))


STUDIES = {
    "depth-vit": depth_study("depth-vit", "depth curves of AC-ViT and its residual twin"),
    "depth-mixer": depth_study(
        "depth-mixer", "depth curves on the first 2, 5 and 10 classes: the cut-off and the task"
    ),
    "depth-bert": depth_study("depth-bert", "depth curves of AC-BERT and its residual twin"),
}
