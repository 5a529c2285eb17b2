"""Pruning on top: accuracy against sparsity of an ACN and its twin, by magnitude and by movement (figure 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.errors import UserError
from acn_scale.movement import movement_curve
from acn_scale.report.subject import open_subjects
from acn_scale.runs import run_folder
from acn_scale.sparsity import magnitude_curve
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
    paired,
    per_cent,
    spread,
)

SHARES, TIMES = (0.2, 0.4), 6  # of what is left, after each epoch: Dorovatas et al. 2025, app. G, variants I and II
SPARSITIES = {share: [1 - (1 - share) ** times for times in range(TIMES + 1)] for share in SHARES}
# Steps between two prunings: an epoch of SST-2's 67,349 sentences in batches of 64, and less at laptop scale.
EVERY = {"laptop": 50, "paper": 1052}
CUT, WHOLE = f"magnitude, cut within {TOLERANCE} points", "magnitude, all blocks"
MOVEMENT = {share: f"movement, {share:.0%} of what is left at a time, all blocks" for share in SHARES}
ZEROS = dict.fromkeys((CUT, WHOLE), SPARSITIES[SHARES[-1]]) | {MOVEMENT[share]: SPARSITIES[share] for share in SHARES}
PUBLISHED = "the ACN above, more so at high sparsity (no numbers)"  # of whole networks


def trials(setting: Setting) -> list[Trial]:
    """The twins, and runs that go on from them and prune by movement. The paper's are BERTs fine-tuned on SST-2."""
    found = []
    for name, prefix in TWINS.items():
        every = EVERY[setting.scale]
        # In steps: seven epochs may be a step more than seven times what one is rounded to.
        prune = [f"train.length={(TIMES + 1) * every}step"]
        prune += [f"{key}={every}step" for key in ("prune.every", "eval.every")]
        if setting.scale == "paper":
            found.append(Trial(f"{name}-pretrained", CONFIGS / f"bert/{prefix}_bert_base.toml"))
            sst2 = [f"data.{split}=data/glue/sst2/{split}" for split in ("train", "eval")]
            config = CONFIGS / "glue" / "paper.toml"
            found.append(Trial(name, config, sst2, after=f"{name}-pretrained"))
            values, data = [*sst2, "train.zero_stage=0", "train.precision=fp32", *prune], None
        else:
            config, connectivity = CONFIGS / "studies" / "mixer.toml", f"model.connectivity={name}"
            found.append(Trial(name, config, [connectivity], "images"))
            values, data = [connectivity, "optim.lr=5e-4", *prune], "images"
        for share in SHARES:
            found.append(Trial(moved(name, share), config, [*values, f"prune.share={share}"], data, after=name))
    return found


def moved(name: str, share: float) -> str:
    """What the run of a twin is called that loses that share of its weights at a time."""
    return f"{name}-movement-{100 * share:.0f}"


Curves = Sequence[Sequence[float]]  # accuracy (0..1) at each sparsity of ZEROS, for each run


def by_magnitude(runs: Runs, *, cut: bool) -> Curves:
    """Of each run's last network, or of what its cut-off leaves of it."""
    found = []
    for cfg in runs.configs:
        (subject,) = open_subjects([run_folder(cfg)], None)
        if cut:
            subject = replace(subject, network=subject.network.cut_within(TOLERANCE))
        points, _ = magnitude_curve(subject, ZEROS[CUT])
        found.append([point["accuracy"] for point in points])
    return found


def by_movement(runs: Runs) -> Curves:
    """As the runs measured it: after training with that many zeros. Raises UserError for one with other sparsities."""
    found = []
    for folder in map(run_folder, runs.configs):
        curve = [point["accuracy"] for point in movement_curve(folder)]
        if len(curve) != TIMES + 1:
            raise UserError(f"{folder}/metrics.jsonl: evaluated at {len(curve)} sparsities, must be {TIMES + 1}")
        found.append(curve)
    return found


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """Accuracy at each sparsity, and where the ACN is above its twin."""
    twins = dict(zip(TWINS, paired(*(runs[name] for name in TWINS)), strict=True))
    found = {
        CUT: {name: by_magnitude(each, cut=True) for name, each in twins.items()},
        WHOLE: {name: by_magnitude(each, cut=False) for name, each in twins.items()},
    }
    for share, way in MOVEMENT.items():
        pruned = paired(*(runs[moved(name, share)] for name in TWINS))
        found[way] = {name: by_movement(each) for name, each in zip(TWINS, pruned, strict=True)}
    table = [["pruned by", "zeros", *(f"{name} (%)" for name in TWINS), "published"]]
    for way, curves in found.items():
        for index, zeros in enumerate(ZEROS[way]):
            cells = [per_cent([curve[index] for curve in each]) for each in curves.values()]
            table.append([way, f"{zeros:.0%}", *cells, PUBLISHED if zeros and way != CUT else ""])
    sentences = [_compared(way, *curves.values()) for way, curves in found.items()]
    left = " and ".join(f"the {name}'s {spread([max(1, k) for k in each.cutoffs])}" for name, each in twins.items())
    sentences.append(
        f"The cut networks' blocks: {left}; the paper cuts none before it prunes. Zeros are counted among the linear "
        "weights that are there."
    )
    if setting.scale == "laptop":
        sentences.append("The published figure is of BERTs fine-tuned on SST-2.")
    return Findings(table, picture(found), sentences)


def _compared(way: str, acn: Curves, twin: Curves) -> str:
    """At the sparsities above 0: on how many the mean is higher, and at the highest of them, by how much."""
    gaps = [
        100 * (fmean(one) - fmean(other))
        for one, other in zip(zip(*acn, strict=True), zip(*twin, strict=True), strict=True)
    ]
    above = sum(gap > 0 for gap in gaps[1:])
    wins = sum(one[-1] > other[-1] for one, other in zip(acn, twin, strict=True))
    return (
        f"{way}: the ACN's mean accuracy is above its twin's at {above} of {TIMES} sparsities; at "
        f"{ZEROS[way][-1]:.0%} zeros by {gaps[-1]:+.1f} points, above it on {wins} of {len(acn)} seeds."
    )


def picture(found: Mapping[str, Mapping[str, Curves]]) -> Figure:
    """A panel for each way of pruning."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, (way, curves) in zip(figure.subplots(2, 2, sharey=True).flat, found.items(), strict=True):
        for name, each in curves.items():
            percent = [[100 * value for value in curve] for curve in each]
            band(axes, name, [100 * zeros for zeros in ZEROS[way]], percent)
        label(axes, "zeros among the blocks' linear weights (%)", "accuracy (%)", way)
    return figure


STUDIES = {"pruning": Study("accuracy against sparsity", trials, findings)}
