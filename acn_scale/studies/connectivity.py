"""Thirteen ways to join the same blocks: what each reaches, how many blocks it needs for it, and what a step costs."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib import colormaps
from matplotlib.figure import Figure

from acn_scale.config import OF_SUBLAYERS, Config
from acn_scale.memory import memory
from acn_scale.studies.pictures import label
from acn_scale.studies.study import (
    CONFIGS,
    TOLERANCE,
    TWINS,
    Findings,
    Runs,
    Setting,
    Study,
    Trial,
    compared,
    per_cent,
    spread,
    step_seconds,
)

# The formula of each, with its source, is in models/connectivity.py; of stochastic depth in models/layers.py.
VARIANTS: dict[str, tuple[str, ...]] = {
    name: (f"model.connectivity={name}",)
    for name in ("feedforward", "residual", "highway", "dense", "denseformer", "h_acn", "hyper", "layer_scale",
                 "rezero", "layernorm_scaling", "value_residual", "acn")
}  # fmt: skip
VARIANTS["stochastic_depth"] = ("model.connectivity=residual", "model.drop_path=0.1")
# Dorovatas et al. 2025, table 5: MLP-Mixers on CIFAR-10 after 700 epochs, accuracy and blocks that are needed.
PUBLISHED = {
    "residual": "90.3 %, 16 of 16",
    "dense": "90.3 %, 10 of 10",
    "denseformer": "90.4 %, 16 of 16",
    "acn": "92.0 %, 12 of 16",
}
BUDGET = ("train.length=330step", "eval.every=1run")  # at laptop scale
# Beside the pattern, in a Mixer of table 5: those that go on through a block cannot do so in the authors' wrapper.
MIXER = dict.fromkeys(OF_SUBLAYERS, ("model.wrapper=false",)) | {"dense": ("model.inner=residual", "model.depth=10")}


def trials(setting: Setting) -> list[Trial]:
    """The same run for each but for the pattern. At the paper's scale those that take no attention, as in table 5."""
    if setting.scale == "laptop":
        config, data, variants = "studies/vit.toml", "images", {name: (*BUDGET, *VARIANTS[name]) for name in VARIANTS}
    else:
        config, data = "mixer/authors_residual_mixer_cifar10.toml", None
        variants = {name: (*VARIANTS[name], *MIXER.get(name, ())) for name in VARIANTS if name != "value_residual"}
    return [Trial(name, CONFIGS / config, keys, data, needed=name in TWINS) for name, keys in variants.items()]


def step_milliseconds(runs: Runs) -> float:
    """Of the fastest seed."""
    return 1000 * min(step_seconds(cfg)[cfg.model.depth] for cfg in runs.configs)


def step_mebibytes(cfg: Config) -> float:
    """Of one process at the fullest moment of a step, counted: what a process has held is that of all its runs."""
    size = cfg.train.micro_batch_size or cfg.train.global_batch_size
    keys = {"stage": cfg.train.zero_stage, "gpus": 1, "recompute": cfg.model.recompute}
    return memory(cfg, micro_batch_size=size, **keys).total / 2**20


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    head = [
        "connectivity",
        "accuracy (%)",
        f"cut-off within {TOLERANCE} points",
        "of",
        "fastest step (ms)",
        "memory (MiB)",
    ]
    table = [[*head, "published"]]
    for name, each in runs.items():
        full = per_cent([curve[-1] for curve in each.accuracy])
        blocks, memory_used = len(each.accuracy[0]) - 1, f"{step_mebibytes(each.configs[0]):,.1f}"
        row = [name, full, spread(each.cutoffs), str(blocks), f"{step_milliseconds(each):.1f}", memory_used]
        table.append([*row, PUBLISHED.get(name, "")])
    return Findings(table, picture(runs), [*sentences(runs), *differences(setting)])


def sentences(runs: Mapping[str, Runs]) -> list[str]:
    most = max(runs, key=lambda name: runs[name].mean_accuracy[-1])
    near = [name for name in runs if runs[name].mean_accuracy[-1] >= runs[most].mean_accuracy[-1] - 0.03]
    lowest = min(near, key=lambda name: fmean(runs[name].cutoffs))
    return [
        compared(runs["acn"], runs["residual"]),
        f"{most} is the most accurate; of the {len(near)} within 3 points of it, {lowest} has the lowest cut-off.",
        *(
            f"{name} is not half as far above chance as {most}: its cut-off says little."
            for name in sorted(runs.keys() - learned(runs))
        ),
    ]


def learned(runs: Mapping[str, Runs]) -> set[str]:
    """Those at least half as far above chance, classes being equally frequent, as the best."""
    full = {name: each.mean_accuracy[-1] for name, each in runs.items()}
    chance = 1 / next(iter(runs.values())).configs[0].model.num_classes
    return {name for name, value in full.items() if value - chance >= (max(full.values()) - chance) / 2}


def differences(setting: Setting) -> list[str]:
    if setting.scale == "laptop":
        blocks = (
            "The published values are of MLP-Mixers on CIFAR-10 after 700 epochs with the authors' block, dense round "
            "blocks that keep their inner skips, where here it has none inside; these are small ViTs after 330 steps."
        )
    else:
        through = ", ".join(name for name in VARIANTS if name in OF_SUBLAYERS and name != "value_residual")
        blocks = (
            f"All but {through}, which go on through a block's sublayers, have the authors' block, as the published "
            "networks have; value_residual takes attention, which a Mixer has not, and is left out."
        )
    return [
        blocks,
        "In the authors' code dense and denseformer mix what enters a block and not the output, denseformer's weights "
        "all start at 1, and gradients are clipped before the loss scale is taken off.",
        "All have the same hyper-parameters.",
        "Memory is that of one process in a step, counted from the config as tools/plan.py does; steps were timed "
        "beside other runs, and differ by that too.",
    ]


def picture(runs: Mapping[str, Runs]) -> Figure:
    """Accuracy against the blocks that it takes, of those that learned, and the readouts of all at every depth."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, each) in enumerate(runs.items()):
        style = {"color": colormaps["tab20"](number), "marker": "os"[number % 2], "label": name}
        cut, full = fmean(each.cutoffs), 100 * each.mean_accuracy[-1]
        if name in learned(runs):
            left.plot(cut, full, linestyle="none", **style)
            left.annotate(
                name, (cut, full), xytext=(4, (4, -9)[number % 2]), textcoords="offset points", fontsize="x-small"
            )
        right.plot([100 * value for value in each.mean_accuracy], markersize=3, linewidth=1, **style)
    cut, y = f"cut-off within {TOLERANCE} points (blocks)", "accuracy (%)"
    label(left, cut, y, "Accuracy at full depth against cut-off: means over seeds", legend=False)
    label(right, "depth (blocks)", y, "Readout at every depth: means over seeds", legend=False)
    right.legend(fontsize="x-small", ncols=2)
    return figure


STUDIES = {"connectivity": Study("connectivities on one task and budget: accuracy, cut-off, cost", trials, findings)}
