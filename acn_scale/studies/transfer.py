"""Transfer: an ACN, and residual networks made to compress by their losses, fine-tuned on other classes (table 4)."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale.studies import depth
from acn_scale.studies.study import (
    AUTHORS,
    CONFIGS,
    TOLERANCE,
    TWINS,
    Findings,
    Runs,
    Setting,
    Study,
    Trial,
    check_classes,
    paired,
    per_cent,
    spread,
)

SOURCE = "-source"
# How each network is pretrained. LayerSkip as in section 7: p_max = 0.1, e_scale = 0.2; R = 15 is the default.
NETWORKS = {
    "acn": ["model.connectivity=acn"],
    "residual": ["model.connectivity=residual"],
    "aligned": ["model.connectivity=residual", "early_exit.losses=all"],
    "layerskip": [
        "model.connectivity=residual",
        "early_exit.losses=rotational",
        "early_exit.scale=0.2",
        "early_exit.layer_dropout=0.1",
    ],
}
PUBLISHED = {"acn": "85.38 ± 0.7", "aligned": "82.9 ± 0.9", "layerskip": "79 ± 1.2"}
PRETRAINED, TUNED = "1000step", "200step"  # at laptop scale


def trials(setting: Setting) -> list[Trial]:
    """Each network, and what is fine-tuned from it on the loss of the last depth alone, all alike.

    From CIFAR-100 to CIFAR-10; at laptop scale from the first half of the classes of one data set to the second.
    """
    found = []
    if setting.scale == "paper":
        for name, values in NETWORKS.items():
            prefix = TWINS.get(name, TWINS["residual"])
            config = CONFIGS / f"mixer/{prefix}_mixer_cifar100.toml"
            found.append(Trial(name + SOURCE, config, [*values, *AUTHORS]))
            found.append(Trial(name, CONFIGS / "transfer" / "cifar10.toml", after=name + SOURCE))
        return found
    config = CONFIGS / "studies" / "mixer.toml"
    half = check_classes(setting.data, 4, "for two halves of two each") // 2
    for name, values in NETWORKS.items():
        source = [*values, f"train.length={PRETRAINED}"]
        target = [values[0], f"train.length={TUNED}", "optim.lr=5e-4"]
        found.append(Trial(name + SOURCE, config, source, "images", {"first_classes": half}))
        found.append(Trial(name, config, target, "images", {"skip_classes": half}, after=name + SOURCE))
    return found


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    """Accuracies before and after, and the cut-offs; how the ACN does beside each of the others."""
    head = ["network", "accuracy on the source (%)", "on the target (%)", f"cut-off within {TOLERANCE} points", "of"]
    table = [[*head, "published (%)"]]
    for name in NETWORKS:
        source, target = runs[name + SOURCE], runs[name]
        cells = [per_cent([curve[-1] for curve in each.accuracy]) for each in (source, target)]
        blocks = str(len(target.accuracy[0]) - 1)
        table.append([name, *cells, spread(target.cutoffs), blocks, PUBLISHED.get(name, "")])
    sentences = [_compared(other, *paired(runs["acn"], runs[other])) for other in NETWORKS if other != "acn"]
    sentences.append(
        "All are trained for the same length; the paper's are trained to comparable accuracy on the source, for a "
        "length it does not give, nor that of fine-tuning. In the authors' code LayerSkip drops no layers."
    )
    if setting.scale == "laptop":
        sentences.append(
            "Here the source is the first half of the classes of one data set and the target the second half, and the "
            "ACN is Eq. 1 alone; the paper goes from CIFAR-100 to CIFAR-10, with 16 of the authors' blocks of width "
            "128, which keep a skip."
        )
    targets = {name: runs[name] for name in NETWORKS}
    return Findings(table, picture(targets), sentences)


def _compared(name: str, acn: Runs, other: Runs) -> str:
    gaps = [one[-1] - two[-1] for one, two in zip(acn.accuracy, other.accuracy, strict=True)]
    gap = 100 * fmean(gaps)
    return (
        f"On the target the ACN is more accurate than {name} on {sum(each > 0 for each in gaps)} of {len(gaps)} seeds, "
        f"by {gap:+.1f} points on average."
    )


def picture(runs: Mapping[str, Runs]) -> Figure:
    figure = depth.curves(runs)
    figure.axes[0].set_title("On the target, readout at every depth: mean and range over seeds")
    return figure


STUDIES = {"transfer": Study("fine-tuning on other classes", trials, findings)}
