"""Few images: how fast ACN and twin learn from a hundred of each class, and what is left of it on others (figure 6)."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.durations import lengthened
from acn_scale.studies.pictures import band, label
from acn_scale.studies.study import (
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
    spread,
)

PER_CLASS, EPOCHS = 100, 150  # Dorovatas et al. 2025, figure 6
CLASSES = 10  # of the paper's data; with more, at laptop scale, an epoch is longer and the run is not
TRAIN, TEST, ACCURACY = "train/loss", "eval/loss", "eval/accuracy"
PUBLISHED = {"acn": "lower losses in fewer epochs (figure 6, no numbers)"}


def trials(setting: Setting) -> list[Trial]:
    """The twins, evaluated on all images for it."""
    length, found = f"{EPOCHS}ep", []
    if setting.scale == "laptop" and (classes := check_classes(setting.data, 2, "to tell apart")) > CLASSES:
        length = lengthened(length, CLASSES / classes)
    values = [f"train.length={length}", "eval.every=0.05run"]
    for name, prefix in TWINS.items():
        if setting.scale == "paper":
            data = f"data.train=data/cifar10_per_class{PER_CLASS}/train"
            found.append(Trial(name, CONFIGS / f"mixer/{prefix}_mixer_cifar10.toml", [*values, data]))
        else:
            keys, selection = [f"model.connectivity={name}", *values], {"per_class": PER_CLASS}
            found.append(Trial(name, CONFIGS / "studies" / "mixer.toml", keys, "images", selection))
    return found


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """The lowest losses, and the means over the epochs: a network that learns in fewer epochs has a lower one.

    When a loss first comes to a level says less: train losses end near 0, where noise decides.
    """
    acn, twin = paired(runs["acn"], runs["residual"])
    both = {"acn": acn, "residual": twin}
    losses = {
        metric: {name: [[value for _, value in curve] for curve in each.curves(metric)] for name, each in both.items()}
        for metric in (TRAIN, TEST)
    }
    lowest = {metric: {name: [*map(min, each)] for name, each in named.items()} for metric, named in losses.items()}
    means = {metric: {name: [*map(fmean, each)] for name, each in named.items()} for metric, named in losses.items()}
    head = ["network", "accuracy at the end (%)"]
    for said in ("train", "test"):
        head += [f"lowest {said} loss", f"mean {said} loss over the epochs"]
    table = [[*head, "published"]]
    for name, each in both.items():
        row = [name, per_cent(each.last(ACCURACY))]
        for metric in (TRAIN, TEST):
            row += [spread(lowest[metric][name], 4), spread(means[metric][name], 4)]
        table.append([*row, PUBLISHED.get(name, "")])
    sentences = [
        f"The ACN's lowest {said} loss is below its twin's on {_wins(lowest[metric])} seeds, its mean over the epochs "
        f"on {_wins(means[metric])}."
        for metric, said in ((TRAIN, "train"), (TEST, "test"))
    ]
    gap = 100 * (fmean(acn.last(ACCURACY)) - fmean(twin.last(ACCURACY)))
    sentences.append(f"At the end it is {difference(gap, 'more', 'less')} accurate.")
    sentences.append(
        "The paper's networks have the authors' block, which keeps a skip; here the ACN is Eq. 1 alone. The authors' "
        f"code takes the first {PER_CLASS} images of each class, of the test set too; here {PER_CLASS} are drawn, and "
        "all of the test set is evaluated."
    )
    if setting.scale == "laptop":
        sentences.append(
            f"The paper's networks have 16 blocks of width 128, on CIFAR-10, and learn for {EPOCHS} epochs; here "
            f"train.length = {acn.configs[0].train.length}."
        )
        if setting.data == "digits":
            sentences.append(
                f"{PER_CLASS} of each class are 1,000 of the 1,400 digits: few, but most of what there is."
            )
    return Findings(table, picture(both), sentences)


def _wins(values: Mapping[str, Sequence[float]]) -> str:
    pairs = list(zip(values["acn"], values["residual"], strict=True))
    return f"{sum(acn < twin for acn, twin in pairs)} of {len(pairs)}"


def picture(runs: Mapping[str, Runs]) -> Figure:
    """Losses and accuracy over the epochs."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    titles = {TRAIN: "train loss", TEST: "test loss", ACCURACY: "test accuracy (%)"}
    for axes, (metric, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for name, each in runs.items():
            curves = each.curves(metric)
            scale = 100 if metric == ACCURACY else 1
            band(
                axes,
                name,
                [epoch for epoch, _ in curves[0]],
                [[scale * value for _, value in curve] for curve in curves],
            )
        label(axes, "epochs", title)
    figure.suptitle(f"{PER_CLASS} images of each class: mean and range over seeds")
    return figure


STUDIES = {"low-data": Study(f"learning from {PER_CLASS} images of each class", trials, findings)}
