"""Are ACNs more robust? Accuracy under the paper's noise of an ACN and its residual twin."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from acn_scale import distributed
from acn_scale.config import Config
from acn_scale.data.image_noise import PAPER, image_noises
from acn_scale.downstream.image_evaluation import evaluate_images
from acn_scale.downstream.image_sets import ImageSet, open_subject
from acn_scale.downstream.noise_table import HEAD, ON, PUBLISHED, accuracy_under_noise
from acn_scale.runs import run_folder
from acn_scale.studies.depth import OTHERWISE, twins
from acn_scale.studies.study import TOLERANCE, TWINS, Findings, Runs, Setting, Study, paired, per_cent

KINDS = ("gaussian", "salt_pepper")


def measure(cfg: Config) -> None:
    """What tools/evaluate_images.py RUN --noise paper does."""
    with distributed.together():
        subject = open_subject(str(run_folder(cfg)))
    evaluate_images(subject, distributed.local_device(), noises=image_noises(["paper"]), tolerance=TOLERANCE)


def evaluated(cfg: Config) -> dict[int, list[float]]:
    """Accuracies (0..1) clean and under each noise, at the cut-off by this clean accuracy and at full depth."""
    return accuracy_under_noise(run_folder(cfg), ImageSet(cfg.data.eval, None).name, TOLERANCE)


def by_depth(cfg: Config) -> list[list[float]]:
    """The same, full depth first."""
    found = evaluated(cfg)
    return [found[max(found)], found[min(found)]]


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    table = [["top-1 (%)", "blocks", *HEAD]]
    measured, alike = _by_depth(runs), dict(zip(runs, paired(*runs.values()), strict=True))
    for name, each in runs.items():
        depths = [evaluated(cfg).keys() for cfg in each.configs]
        blocks, cut = max(depths[0]), fmean(map(min, depths))
        for place, depth in enumerate((str(blocks), f"cut-off, {cut:.1f} of {blocks}")):
            columns = zip(*(seed[place] for seed in measured[name]), strict=True)
            table.append([name, depth, *map(per_cent, columns)])
    table += [[name, "", *(f"{value:.2f}" for value in values)] for name, values in PUBLISHED.items()]
    return Findings(table, picture(measured), [*sentences(_by_depth(alike)), *differences()])


def _by_depth(runs: Mapping[str, Runs]) -> dict[str, list[list[list[float]]]]:
    return {name: [by_depth(cfg) for cfg in each.configs] for name, each in runs.items()}


def losses(curve: Sequence[float]) -> list[float]:
    """Points lost to each noise, of accuracies (0..1) clean and under each."""
    return [100 * (curve[0] - value) for value in curve[1:]]


def sentences(measured: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> list[str]:
    """At full depth: what noise takes, the mean of the six. `measured`: of the same seeds of both networks."""
    acn, twin = ([fmean(losses(full)) for full, _ in measured[name]] for name in TWINS)
    less = sum(one < other for one, other in zip(acn, twin, strict=True))
    said = [
        f"The mean loss under the six noises is {fmean(acn):.1f} points in the ACN and {fmean(twin):.1f} in its "
        f"residual twin, at full depth; the ACN's is smaller on {less} of {len(acn)} seeds."
    ]
    paper = [
        fmean(losses([value / 100 for value in PUBLISHED[f"{name}, published"]])) for name in ("AC-ViT", "Res-ViT")
    ]
    return [*said, f"Published: {paper[0]:.1f} points and {paper[1]:.1f}."]


def differences() -> list[str]:
    said = f"{ON['']} The paper does not say where its noise was put, nor at which depth its AC-ViT was read out."
    return [said, OTHERWISE["depth-vit"]]


def picture(measured: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> Figure:
    """Accuracy over the strength of the noise: means over seeds, and what is published, dashed."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lines = {}
    for name, seeds in measured.items():
        for place, depth in enumerate(("full depth", "cut-off")):
            columns = zip(*(seed[place] for seed in seeds), strict=True)
            lines[f"{name}, {depth}"] = [100 * fmean(column) for column in columns]
    for axes, kind in zip(panels, KINDS, strict=True):
        places = [place for place, noise in enumerate(PAPER, start=1) if noise.startswith(kind)]
        strengths = [0.0, *(float(PAPER[place - 1].rpartition("_")[2]) for place in places)]
        for name, values in {**lines, **PUBLISHED}.items():
            style = "--" if name in PUBLISHED else "-"
            axes.plot(strengths, [values[place] for place in (0, *places)], style, marker=".", label=name)
        axes.set(xlabel={"gaussian": "sigma of Gaussian noise", "salt_pepper": "p of salt and pepper"}[kind])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 (%)")
    panels[0].legend(fontsize="x-small")
    return figure


STUDIES = {
    "noise": Study(
        "accuracy of AC-ViT and its residual twin under the paper's noise",
        lambda setting: twins("depth-vit", setting),
        findings,
        measure,
        f"eval/*+{PAPER[-1]}.json",
    )
}
