"""Where the gradient goes: its norm by block over training, its direct part, and the 1-D linear network."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from acn_scale import distributed
from acn_scale.checkpoint import complete, read_state
from acn_scale.config import Config
from acn_scale.convert.sources import read_model
from acn_scale.data import build_evaluation
from acn_scale.durations import Horizon
from acn_scale.gradients import Line, backward_paths, line_gradients, split_gradients
from acn_scale.runs import read_json, read_metrics, run_folder, write_json
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

PARTS = 4  # of a run; after each the direct part is measured
PART = f"{1 / PARTS}run"
PATTERNS = ("feedforward", "residual", "acn", "acn_detached")
SPLITS = "gradient_parts.json"  # in a run's folder
# What the ACN authors published beside arXiv 2506.09714 of an AC-ViT on ImageNet: of each of 12 blocks the mean of the
# gradient norms of its MLP's two matrices, over the first and the last epoch; the paper's figure 2 has no numbers.
PUBLISHED = {
    "first": (0.220, 0.209, 0.180, 0.162, 0.158, 0.152, 0.150, 0.142, 0.139, 0.130, 0.111, 0.086),
    "last": (0.096, 0.062, 0.058, 0.052, 0.041, 0.0007, 0.0000005, 0.0024, 0.0014, 0.0020, 0.0025, 0.0003),
}


def trials(setting: Setting) -> list[Trial]:
    """A checkpoint after each part of each run is kept for good, for the direct part of the gradient."""
    config, data, keys = "mixer/residual_mixer_cifar10.toml", None, ["train.length=100ep"]
    if setting.scale == "laptop":
        config, data, keys = "studies/vit.toml", "images", [f"checkpoint.every={PART}"]
    keys.append(f"checkpoint.keep_every={PART}")
    return [
        Trial(name, CONFIGS / config, [f"model.connectivity={name}", *keys], data, needed=name in TWINS)
        for name in PATTERNS
    ]


def measure(cfg: Config) -> None:
    """After each of the PARTS of the run, by its first checkpoint from there on and the last one of all: the parts of
    the gradient of its first evaluation batch's loss, by block.
    """
    device, folder = distributed.local_device(), run_folder(cfg)
    batch, _ = next(iter(build_evaluation(cfg)))
    batch = {name: values.to(device) for name, values in batch.items()}
    steps = read_json(folder / "environment.json")["steps"]
    part = max(1, Horizon(0, 1, steps).count(PART))
    first: dict[int, tuple[int, Path]] = {}
    for path in complete(folder):
        step = read_state(path)["step"]
        # What is left over of a run that does not come out even is of its last part.
        first.setdefault(PARTS if step == steps else min(step // part, PARTS - 1), (step, path))
    found = []
    for number, (step, path) in first.items():
        if number:
            model = read_model(path).model.requires_grad_(True).to(device)
            parts = {name: asdict(split) for name, split in split_gradients(model, batch).items()}
            found.append({"share": number / PARTS, "step": step, "parts": parts})
    write_json(folder / SPLITS, found)


def _of_all(seeds: Sequence[Mapping[float, Sequence[float]]]) -> dict[float, np.ndarray]:
    """(seeds, blocks) at the times that no seed lacks: a bad step has no gradient norms, and a failed save leaves no
    checkpoint.
    """
    times = sorted(set.intersection(*map(set, seeds)))
    return {time: np.array([seed[time] for seed in seeds]) for time in times}


def norms(runs: Runs) -> np.ndarray:
    """(blocks, logged steps): gradient norms, means over the seeds."""
    names = [f"grad_norm/block_{block:02d}" for block in range(1, runs.configs[0].model.depth + 1)]
    lines = [[line for line in read_metrics(run_folder(cfg)) if line.keys() >= {*names}] for cfg in runs.configs]
    found = _of_all([{line["step"]: [line[name] for name in names] for line in each} for each in lines])
    return np.stack([values.mean(axis=0) for values in found.values()], axis=1)


def direct_shares(runs: Runs) -> dict[float, np.ndarray]:
    """Norm of the direct part of the gradient by that of all of it: (seeds, blocks) after each share of the run."""
    splits = [read_json(run_folder(cfg) / SPLITS) for cfg in runs.configs]
    return _of_all([{each["share"]: _shares(each["parts"]) for each in seed} for seed in splits])


def _shares(parts: Mapping[str, Mapping[str, float]]) -> list[float]:
    """0 where there is no gradient at all."""
    blocks = [part for name, part in sorted(parts.items()) if name.startswith("block_")]
    return [part["direct"] / part["full"] if part["full"] else 0.0 for part in blocks]


def findings(runs: Mapping[str, Runs], setting: Setting) -> Findings:
    depth = runs["acn"].configs[0].model.depth
    table = [["network", "", *(f"block {block}" for block in range(1, depth + 1))]]
    for name, each in runs.items():
        found, shares = norms(each), direct_shares(each)
        tenth = max(1, found.shape[1] // 10)
        table.append([name, "gradient norm, first tenth", *_cells(found[:, :tenth].mean(axis=1))])
        table.append([name, "gradient norm, last tenth", *_cells(found[:, -tenth:].mean(axis=1))])
        for share in (min(shares), max(shares)):
            said = f"direct / all, after {share:.0%} of the run"
            table.append([name, said, *_cells(shares[share].mean(axis=0))])
        table.append([name, "paths back to the block", *map(str, backward_paths(name, depth))])
    if depth == len(PUBLISHED["last"]):
        for epoch, values in PUBLISHED.items():
            table.append(["AC-ViT, published", f"gradient norm, {epoch} epoch", *_cells(values)])
    return Findings(table, picture(runs), [*sentences(runs), line_sentence(depth), *differences(setting)])


def _cells(values: np.ndarray) -> list[str]:
    return [f"{value:.2g}" for value in values]


def sentences(runs: Mapping[str, Runs]) -> list[str]:
    """Of the first half of the blocks, by the claims of the paper's figure 2."""
    said = [
        f"{name}: accuracy {per_cent([curve[-1] for curve in each.accuracy])} %, cut-off within {TOLERANCE} points "
        f"{spread(each.cutoffs)} of {len(each.accuracy[0]) - 1}; the first half of the blocks has "
        f"{100 * first_half(norms(each)):.0f} % of the sum of the gradient norms."
        for name, each in runs.items()
    ]
    half = runs["acn"].configs[0].model.depth // 2
    twins = paired(runs["acn"], runs["residual"])
    ours, other = (np.stack([*direct_shares(each).values()])[:, :, :half].mean(axis=(0, 2)) for each in twins)
    above = sum(one > two for one, two in zip(ours, other, strict=True))
    said.append(
        f"In the first half of the blocks, direct / all is {ours.mean():.2f} in the ACN and {other.mean():.2f} in its "
        f"residual twin; the ACN's is higher on {above} of {len(ours)} seeds."
    )
    return said


def first_half(found: np.ndarray) -> float:
    """found: (blocks, steps) -> the share of the first half of the blocks in all that there is over training."""
    return float(found[: len(found) // 2].sum() / found.sum())


def line_sentence(depth: int) -> str:
    """The closed forms of the 1-D linear network against autograd, on weights drawn once for all."""
    weights = 2 * torch.rand(depth, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    one, worst = {"x": torch.ones(1, 1, 1, dtype=torch.float64)}, 0.0
    for pattern in PATTERNS:
        line = Line(pattern, weights)
        found = torch.autograd.grad(line(**one)["loss"], list(line.parameters()))
        worst = max(worst, (torch.stack(found) - line_gradients(pattern, weights)).abs().max().item())
    return (
        f"The 1-D linear network of {depth} blocks: the paper's closed forms equal autograd's gradients to {worst:.0e} "
        "in all four; with all weights 1 a gradient is the number of paths above, one of them direct in the ACN and in "
        "the residual network, times that of the paths that enter the block."
    )


def differences(setting: Setting) -> list[str]:
    """The authors' block is not taken at any scale: in a residual network no path leads past it."""
    if setting.scale == "paper":
        return [
            "The paper's figure 2 has no numbers. It is of Mixers on CIFAR-10 after 100 epochs too, with the authors' "
            "block, which keeps a skip and puts a LayerNorm and a ReLU on it: in a residual network nothing then comes "
            "straight from the output. Here the ACN is Eq. 1 alone, and its twin has clean skips."
        ]
    return [
        "The published norms are of an AC-ViT-B/16 on ImageNet over 900 epochs, of its MLPs' matrices alone, and after "
        "clipping; these are of whole blocks of a small ViT, and before clipping. The paper's figure 2, of Mixers on "
        "CIFAR-10 after 100 epochs, has no numbers."
    ]


def picture(runs: Mapping[str, Runs]) -> Figure:
    """Gradient norms as heat maps on one scale; below, what part of them is direct."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False)
    found = {name: norms(each) for name, each in runs.items()}
    highest = max(values.max() for values in found.values())
    for column, (name, values) in enumerate(found.items()):
        mesh = _heat_map(grid[0, column], name, values, LogNorm(1e-4 * highest, highest, clip=True))
        shares = {share: part.mean(axis=0) for share, part in direct_shares(runs[name]).items()}
        for share, part in shares.items():
            grid[1, column].plot(range(1, len(part) + 1), part, marker=".", label=f"{share:.0%} of the run")
        highest_share = max(part.max() for part in shares.values())
        grid[1, column].set(xlabel="block", ylabel="|direct| / |all|", ylim=(0, max(1.5, 1.05 * highest_share)))
        grid[1, column].grid(alpha=0.3)
    figure.colorbar(mesh, ax=grid[0, :].tolist(), label="gradient norm")
    grid[1, 0].legend(fontsize="small")
    return figure


def _heat_map(axes: Axes, name: str, values: np.ndarray, scale: LogNorm) -> AxesImage:
    """values: (blocks, logged steps)."""
    mesh = axes.imshow(values, norm=scale, origin="lower", aspect="auto", extent=(0, 100, 0.5, len(values) + 0.5))
    axes.set(title=name, xlabel="% of the run", ylabel="block")
    return mesh


STUDIES = {
    "gradients": Study(
        "gradient norms by block over training, their direct part, and the 1-D linear network",
        trials,
        findings,
        measure,
        SPLITS,
    )
}
