"""Do ACNs compress more? Depth curves of an ACN and its twin, and how the cut-off grows with the task."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

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
# Dorovatas et al. 2025, sections 3 and 4: blocks that are needed.
PUBLISHED = {
    "depth-vit": {"acn": "6 of 12 (text; 7 by table 6), 70.76 %", "residual": "12 of 12, 70.74 %"},
    "depth-bert": {"acn": "3 of 12 after fine-tuning", "residual": "12 of 12"},
    "depth-mixer": {"acn-2": "8 of 16", "acn-5": "10 of 16", "acn-10": "12 of 16, 92.0 %"}
    | {f"residual-{classes}": "16 of 16" + (", 90.3 %" if classes == 10 else "") for classes in CLASSES},
}
# What the published values are of that is not so here, at any scale.
OTHERWISE = {
    "depth-vit": "The published values are of ViT-B/16 on ImageNet-1K, after 700 epochs of the ACN and 300 of its "
    "twin. The authors' ACN also has an identity round its MLPs and a LayerNorm after attention; here it is Eq. 1 "
    "alone. Which of their recipes gave the values is not known.",
    "depth-mixer": "The published numbers of blocks are of 16 blocks of width 128 on CIFAR-10, after 420 epochs of the "
    "ACN and 300 of its twin, the accuracies after 700 of both, all with the authors' block, which keeps a skip; here "
    "the ACN is Eq. 1 alone.",
    "depth-bert": "The published values are of BERT-base, after two epochs of the ACN and one of its twin and "
    "fine-tuning on GLUE; here masked tokens are read out, for which the authors' own AC-BERT needs all 12 blocks, by "
    "their log.",
}
PAPER = {
    "depth-vit": "vit/{}_vit_b16.toml",
    "depth-bert": "bert/{}_bert_base.toml",
    "depth-mixer": "mixer/{}_mixer_cifar10.toml",
}


def twins(name: str, setting: Setting) -> list[Trial]:
    """An ACN and its residual twin, at laptop scale with the same settings but the connectivity."""
    if setting.scale == "paper":
        return [Trial(each, CONFIGS / PAPER[name].format(prefix)) for each, prefix in TWINS.items()]
    config = CONFIGS / "studies" / f"{name.removeprefix('depth-')}.toml"
    data = "text" if name == "depth-bert" else "images"
    return [Trial(each, config, [f"model.connectivity={each}"], data) for each in TWINS]


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
                found.append(Trial(f"{trial.name}-{classes}", trial.config, values))
            else:
                name, selection = f"{trial.name}-{classes}", {"first_classes": classes}
                found.append(Trial(name, trial.config, trial.overrides, "images", selection))
    return found


def findings_of(name: str, runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """Depth curves, their cut-offs, and whether each ACN's is below its twin's on each seed."""
    table = [["network", "accuracy (%)", f"cut-off within {TOLERANCE} points", "of", "published"]]
    for trial, each in runs.items():
        blocks = len(each.accuracy[0]) - 1
        full = per_cent([curve[-1] for curve in each.accuracy])
        table.append([trial, full, spread(each.cutoffs), str(blocks), PUBLISHED[name].get(trial, "")])
    sentences = []
    for trial, each in runs.items():
        if trial.startswith("acn"):
            the = f"{trial.partition('-')[2]} classes: the" if "-" in trial else "The"
            sentences.append(compared(each, runs[trial.replace("acn", "residual")], the))
    grown = [fmean(runs[f"acn-{classes}"].cutoffs) for classes in CLASSES] if f"acn-{CLASSES[0]}" in runs else []
    if grown:
        grows = "grows" if grown == sorted(set(grown)) else "does not grow"
        means = ", ".join(f"{value:.1f}" for value in grown)
        sentences.append(f"The ACN's cut-off {grows} with the number of classes: {means} blocks for 2, 5 and 10.")
    return Findings(table, curves(runs), [*sentences, OTHERWISE[name], trained(runs)])


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
    trials = by_classes if name == "depth-mixer" else lambda setting: twins(name, setting)
    return Study(what, trials, lambda runs, setting: findings_of(name, runs, setting))


STUDIES = {
    "depth-vit": depth_study("depth-vit", "depth curves of AC-ViT and its residual twin"),
    "depth-mixer": depth_study(
        "depth-mixer", "depth curves on the first 2, 5 and 10 classes: the cut-off and the task"
    ),
    "depth-bert": depth_study("depth-bert", "depth curves of AC-BERT and its residual twin on masked tokens"),
}
