"""Few images: how fast ACN and twin learn from a hundred of each class, and what is left of it on others (figure 6)."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.studies.pictures import band
from acn_scale.studies.study import CONFIGS, Findings, Runs, Setting, Study, Trial, paired, per_cent, spread

PER_CLASS, EPOCHS = 100, 150  # Dorovatas et al. 2025, figure 6
TRAIN, TEST, ACCURACY = "train/loss", "eval/loss", "eval/accuracy"
PUBLISHED = {"acn": "lower losses in fewer epochs (figure 6, no numbers)"}

Curve = Sequence[tuple[float, float]]  # (epochs, value)


def trials(setting: Setting) -> list[Trial]:
    """The twins, evaluated on all images for it."""
    length, every = f"train.length={EPOCHS}ep", "eval.every=0.05run"
    found = []
    for name, file in (("acn", "ac_mixer"), ("residual", "residual_mixer")):
        if setting.scale == "paper":
            data = f"data.train=data/cifar10_per_class{PER_CLASS}/train"
            found.append(Trial(name, CONFIGS / "mixer" / f"{file}_cifar10.toml", [length, every, data]))
        else:
            values = [f"model.connectivity={name}", length, every]
            selection = {"per_class": PER_CLASS}
            found.append(Trial(name, CONFIGS / "studies" / "mixer.toml", values, "images", selection))
    return found


def epochs_to(curve: Curve, level: float) -> float:
    """When the value is first at `level` or below it, which it must come to."""
    return next(epoch for epoch, value in curve if value <= level)


def both_reach(one: Sequence[Curve], other: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """The epochs of each run to the lowest loss that it and its twin both come to."""
    found: tuple[list[float], list[float]] = ([], [])
    for pair in zip(one, other, strict=True):
        level = max(min(value for _, value in curve) for curve in pair)
        for epochs, curve in zip(found, pair, strict=True):
            epochs.append(epochs_to(curve, level))
    return found


def findings_of(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """Losses, and how many epochs it takes to what both networks come to."""
    acn, twin = paired(runs["acn"], runs["residual"])
    both = {"acn": acn, "residual": twin}
    curves = {metric: {name: each.curves(metric) for name, each in both.items()} for metric in (TRAIN, TEST)}
    epochs = {metric: dict(zip(both, both_reach(*named.values()), strict=True)) for metric, named in curves.items()}
    lowest = {
        metric: {name: [min(value for _, value in curve) for curve in each] for name, each in named.items()}
        for metric, named in curves.items()
    }
    head = ["network", "accuracy at the end (%)"]
    for said in ("train", "test"):
        head += [f"lowest {said} loss", f"epochs to the {said} loss both reach"]
    table = [[*head, "published"]]
    for name, each in both.items():
        row = [name, per_cent(each.last(ACCURACY))]
        for metric in (TRAIN, TEST):
            row += [spread(lowest[metric][name], 4), spread(epochs[metric][name])]
        table.append([*row, PUBLISHED.get(name, "")])
    sentences = []
    for metric, said in ((TRAIN, "train"), (TEST, "test")):
        lower = _wins(lowest[metric])
        sooner = _wins(epochs[metric])
        sentences.append(
            f"The ACN's lowest {said} loss is below its twin's on {lower} seeds; it takes fewer epochs to the lowest "
            f"{said} loss that both reach on {sooner}."
        )
    gap = 100 * (fmean(acn.last(ACCURACY)) - fmean(twin.last(ACCURACY)))
    sentences.append(f"At the end it is {abs(gap):.1f} points {'more' if gap >= 0 else 'less'} accurate.")
    if setting.scale == "laptop":
        sentences.append("The paper's networks have 16 blocks of width 128, on CIFAR-10.")
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
        axes.set_xlabel("epochs")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.suptitle(f"{PER_CLASS} images of each class: mean and range over seeds")
    return figure


STUDIES = {"low-data": Study(f"learning from {PER_CLASS} images of each class", trials, findings_of)}
