"""Early exit with one shared head: what ACNs and residual twins save, and the accuracy that is left (table 7)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.convert import read_model
from acn_scale.data import build_evaluation
from acn_scale.depth import cost, cutoff, exit_flops
from acn_scale.distributed import local_device
from acn_scale.early_exit import Point, Readings, cheapest, point, take_readings, tradeoff
from acn_scale.runs import run_folder
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
    difference,
    per_cent,
    spread,
)

CRITERION = "entropy"
THRESHOLD = 0.7 / math.log(10)  # table 7: 0.7 nats of 10 classes, as a share of the largest entropy
THRESHOLDS = [10 ** (power / 10) for power in range(-40, 1)]  # of the picture
# How a network is read out.
FULL, CUT, EXIT, CHEAPEST = (
    "full depth",
    f"cut-off within {TOLERANCE} points",
    "exit at 0.7 nats of ln 10",
    f"cheapest exit within {TOLERANCE} points",
)
# Dorovatas et al. 2025, table 7: speed-up in FLOPs over the residual Mixer at full depth.
PUBLISHED = {
    ("residual", FULL): "1.0x",
    ("acn", CUT): "1.5x (12 of 16 blocks)",
    ("residual-shared", EXIT): "2.4x",
    ("acn-shared", EXIT): "3.3x",
}
BRANCHES = {"residual": "2.2x", "acn": "2.6x"}  # the same, with heads of their own at 4, 8 and 12 blocks


def trials(setting: Setting) -> list[Trial]:
    """The twins trained plainly, and on the losses of all depths through the shared head."""
    found = []
    for name, prefix in TWINS.items():
        if setting.scale == "paper":
            found.append(Trial(name, CONFIGS / f"mixer/authors_{prefix}_mixer_cifar10.toml"))
            found.append(Trial(f"{name}-shared", CONFIGS / f"mixer/shared_exit_{prefix}_mixer_cifar10.toml"))
        else:
            config, connectivity = CONFIGS / "studies" / "mixer.toml", f"model.connectivity={name}"
            found.append(Trial(name, config, [connectivity], "images"))
            found.append(Trial(f"{name}-shared", config, [connectivity, "early_exit.losses=all"], "images"))
    return found


@dataclass(frozen=True)
class Reading:
    """One run's network on its evaluation set. Operations of one sample, by the depth it leaves at."""

    readings: Readings
    cuts: list[int]  # where all leave there
    exits: list[int]  # where the head is evaluated at each depth on the way

    def at(self, way: str) -> Point:
        accuracy = self.readings.correct.double().mean(dim=0).tolist()
        if way == EXIT:
            return point(self.readings, self.exits, THRESHOLD)
        if way == CHEAPEST:
            return cheapest(tradeoff(self.readings, self.exits), accuracy[-1], TOLERANCE)
        depth = cutoff(accuracy, TOLERANCE) if way == CUT else len(accuracy) - 1
        return Point(math.nan, accuracy[depth], depth, self.cuts[depth])


def read(runs: Runs) -> list[Reading]:
    """Each run's last network."""
    shape, device, found = runs.configs[0].model, local_device(), []
    cuts, exits = [cost(shape, depth).flops for depth in range(shape.depth + 1)], exit_flops(shape)
    for cfg in runs.configs:
        model = read_model(run_folder(cfg)).model.to(device)
        found.append(Reading(take_readings(model, build_evaluation(cfg), CRITERION, device), cuts, exits))
    return found


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """Accuracy, mean depth and speed-up, at full depth, cut, and with early exit."""
    found = {name: read(each) for name, each in runs.items()}
    full = found["residual"][0].cuts[-1]
    head = ["network", "read out", "accuracy (%)", "mean depth", "speed-up", "published speed-up"]
    table = [head]
    for name, each in found.items():
        for way in (FULL, CUT, EXIT, CHEAPEST):
            points = [reading.at(way) for reading in each]
            cells = [per_cent([at.accuracy for at in points]), spread([at.depth for at in points])]
            speed = f"{spread([full / at.flops for at in points], 2)}x"
            table.append([name, way, *cells, speed, PUBLISHED.get((name, way), "")])
    table += [[f"{name}-branches", EXIT, "not trained", "", "", speed] for name, speed in BRANCHES.items()]
    by_seed = {name: dict(zip(runs[name].seeds, each, strict=True)) for name, each in found.items()}
    sentences = []
    for kind, said in (("-shared", "Trained on all depths"), ("", "Trained plainly")):
        acns, twins = by_seed[f"acn{kind}"], by_seed[f"residual{kind}"]
        for way in (EXIT, CHEAPEST):
            pairs = [(acns[seed].at(way), twins[seed].at(way)) for seed in acns if seed in twins]
            sentences.append(f"{said}, {way}: {_compared(pairs)}")
    sentences += [
        "FLOPs of an exit count the head at each depth on the way; the cheapest exit's threshold is chosen on the "
        "samples it is judged by.",
        "The paper gives no accuracies; its networks with branches, heads of their own at some depths, are not trained "
        "here.",
    ]
    if setting.scale == "laptop":
        sentences.append("The published values are of 16 blocks of width 128, with the authors' block, on CIFAR-10.")
    return Findings(table, picture(found, full), sentences)


def _compared(pairs: list[tuple[Point, Point]]) -> str:
    """Of (ACN, twin), a pair for each seed that is finished of both."""
    if not pairs:
        return "no seed is finished of the ACN and its twin."
    less = sum(acn.flops < twin.flops for acn, twin in pairs)
    gap = 100 * fmean(acn.accuracy - twin.accuracy for acn, twin in pairs)
    return (
        f"the ACN takes fewer FLOPs than its twin on {less} of {len(pairs)} seeds; its accuracy is {difference(gap)}."
    )


def picture(found: Mapping[str, list[Reading]], full: int) -> Figure:
    """Accuracy over FLOPs at thresholds from none to all leaving; rings: the published threshold."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, each in found.items():
        curves = [[point(reading.readings, reading.exits, level) for level in THRESHOLDS] for reading in each]
        spent = [100 * fmean(at.flops for at in column) / full for column in zip(*curves, strict=True)]
        colour = band(axes, name, spent, [[100 * at.accuracy for at in curve] for curve in curves])
        chosen = [reading.at(EXIT) for reading in each]
        place = [100 * fmean(at.flops for at in chosen) / full], [100 * fmean(at.accuracy for at in chosen)]
        axes.plot(*place, marker="o", markersize=12, fillstyle="none", color=colour)
    flops = "FLOPs (% of the residual network's), with every evaluation of the head"
    label(axes, flops, "accuracy (%)", "Early exit by entropy: mean and range over seeds; rings: 0.7 nats of ln 10")
    return figure


STUDIES = {"early-exit": Study("accuracy and FLOPs of early exit by entropy", trials, findings)}
