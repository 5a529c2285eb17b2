"""Accuracy under noise in the layout of the ACN paper's table 2, with the published rows beside it."""

from collections.abc import Sequence, Set
from pathlib import Path

from acn_scale.data.image_noise import PAPER
from acn_scale.depth import cutoff
from acn_scale.errors import UserError
from acn_scale.results import Measurement, read_measurements
from acn_scale.tables import aligned

# Dorovatas et al. 2025, table 2: top-1 (%) on ImageNet, clean and in the order of PAPER.
PUBLISHED = {
    "Res-ViT, published": (70.74, 67.68, 62.80, 45.46, 56.80, 27.48, 10.34),
    "AC-ViT, published": (70.76, 69.50, 64.54, 51.89, 59.80, 36.35, 19.98),
}
ON = {
    "": "Noise on pixels in 0..1, before normalisation, and clipped.",
    "_normalised": "Noise on the model's input, after normalisation.",
}


def paper_tasks(data: str) -> set[str]:
    """What results under the paper's noise on these data are called."""
    return {f"{data}+{noise}{suffix}" for noise in PAPER for suffix in ON}


HEAD = ["clean", *(noise.replace("salt_pepper_", "s&p ").replace("gaussian_", "gauss ") for noise in PAPER)]


def noise_table(folders: Sequence[Path], *, tolerance: float = 0.5, tasks: Set[str] | None = None) -> str:
    """Of runs and exports, at full depth and at the cut-off by clean accuracy, a table for each data set that they have
    been evaluated on with the paper's noise, or those for which there is one of the `tasks`.

    Raises UserError where there is none.
    """
    found = {folder: _by_task(folder) for folder in folders}
    tables = []
    for data in dict.fromkeys(task for mine in found.values() for task in mine if "+" not in task):
        for suffix, where in ON.items():
            names = [data, *(f"{data}+{noise}{suffix}" for noise in PAPER)]
            wanted = {*names[1:]} if tasks is None else {*names[1:]} & tasks
            rows = [row for folder, mine in found.items() if mine.keys() & wanted
                    for row in _rows(folder, [mine.get(name) for name in names], tolerance)]  # fmt: skip
            if rows:
                tables.append(f"{data}: top-1 (%). {where}\n{_table(rows)}")
    if not tables:
        hint = "python tools/evaluate_images.py SOURCE --noise paper"
        raise UserError(f"{folders[0]}/eval: holds no results under the paper's noise; {hint} makes them")
    last = (
        f"Cut-off: the smallest depth within {tolerance} points of full depth on clean images. The published rows are "
        "of ImageNet-1K; the paper does not say where its noise was put, nor at which depth the AC-ViT was read out."
    )
    return "\n\n".join([*tables, last])


def _by_task(folder: Path) -> dict[str, list[Measurement]]:
    """The accuracies of each task, by depth."""
    tasks: dict[str, list[Measurement]] = {}
    for each in read_measurements(folder):
        if each.metric == "accuracy" and each.depth is not None:
            tasks.setdefault(each.task, []).append(each)
    return {task: sorted(lines, key=lambda line: line.depth) for task, lines in tasks.items()}


def accuracy_under_noise(folder: Path, data: str, tolerance: float) -> dict[int, list[float]]:
    """Of one run: accuracies (0..1) by column of HEAD, with noise on pixels, at full depth and at the cut-off by clean
    accuracy, by depth. Of a cut-off that is full depth there is one. Raises UserError where some are lacking.
    """
    mine = _by_task(folder)
    names = [data, *(f"{data}+{noise}" for noise in PAPER)]
    found = _at_depths([mine.get(name) for name in names], tolerance)
    if not found or None in found[max(found)]:
        raise UserError(f"{folder}/eval: lacks results of {data} under the paper's noise, of the same weights")
    return found


def _at_depths(columns: Sequence[list[Measurement] | None], tolerance: float) -> dict[int, list[float | None]]:
    """At full depth and at the cut-off. What was measured on other weights than the clean column is None."""
    clean = columns[0]
    if clean is None:
        return {}
    cut = cutoff([line.value for line in clean], tolerance)
    return {
        depth: [
            lines[depth].value
            if lines and len(lines) == len(clean) and lines[0].checkpoint == clean[0].checkpoint
            else None
            for lines in columns
        ]
        for depth in (len(clean) - 1, cut)
    }


def _rows(folder: Path, columns: Sequence[list[Measurement] | None], tolerance: float) -> list[list[str]]:
    found = _at_depths(columns, tolerance)
    rows = []
    for depth, values in found.items():
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        rows.append([f"{folder.resolve().name}, {depth} of {max(found)} blocks", *cells])
    return rows


def _table(rows: list[list[str]]) -> str:
    published = [[name, *(f"{value:.2f}" for value in values)] for name, values in PUBLISHED.items()]
    return aligned([["", *HEAD], *rows, *published])
