"""Accuracy against sparsity: networks pruned by magnitude, or by movement, side by side."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from acn_scale.convert import read_model
from acn_scale.convert.export import write_export
from acn_scale.convert.network import Network
from acn_scale.data.stream import Evaluation
from acn_scale.distributed import local_device
from acn_scale.errors import UserError
from acn_scale.files import check_new, check_writable, new_folder, write_file, write_together
from acn_scale.movement import Movement, movement_curve, movement_runs
from acn_scale.progress import bar
from acn_scale.pruning import prune_by_magnitude, sparsity
from acn_scale.report.numbers import finite
from acn_scale.report.subject import Subject, open_subjects
from acn_scale.tables import aligned

Result = tuple[list[dict[str, float]], Network]  # the points of a curve, and the network at the last of them


def prune_networks(
    folders: Sequence[Path],
    plan: Sequence[float] | Movement,
    *,
    depth: int | None = None,
    tolerance: float | None = None,
    data: str | None = None,
    out: Path | None = None,
    export: Path | None = None,
    numbers: Path | None = None,
) -> str:
    """Prune runs, checkpoints and exports by magnitude to some sparsities, or by movement; return the tables.

    Each is cut before, at `depth` or at its own cut-off within `tolerance` points. <method>_pruning.json and .png go to
    `out`, by default report/ in the first one's folder, and the runs of movement to `out`/movement. `export`: a new
    folder for the networks at the highest sparsity. `numbers`: a file for a copy of the numbers. `data` replaces the
    evaluation shards.

    Raises UserError, and RunFailed; what `out` held before is then still there.
    """
    if numbers is not None and not numbers.parent.is_dir():
        raise UserError(f"--json {numbers}: {numbers.parent} is not a folder")
    if export is not None:
        check_new(export, "--export")
    whole = open_subjects(folders, data)
    sizes = [_size(subject.network) for subject in whole]
    subjects = [replace(subject, network=_cut(subject.network, depth, tolerance)) for subject in whole]
    out = out or subjects[0].folder / "report"
    check_writable(out)
    if isinstance(plan, Movement):
        method = "movement"
        results = [(movement_curve(run), read_model(run)) for run in movement_runs(subjects, plan, out / "movement")]
    else:
        method = "magnitude"
        results = [magnitude_curve(subject, plan) for subject in subjects]
    found = [_numbers(*each) for each in zip(subjects, sizes, (points for points, _ in results), strict=True)]
    content = (json.dumps(finite({"method": method, "networks": found}), indent=1) + "\n").encode()
    files = {f"{method}_pruning.json": content, f"{method}_pruning.png": _picture(method, found)}
    with new_folder(export, "--export") if export else contextlib.nullcontext() as folder:
        if folder:
            for subject, (_, net) in zip(subjects, results, strict=True):
                _export(net, subject, folder / subject.slug)
        if numbers is not None:
            _copy(content, numbers)
        write_together(out, files)
    places = [f"Picture:  {out / f'{method}_pruning.png'}", f"Numbers:  {out / f'{method}_pruning.json'}"]
    places += [f"Networks: {export}"] if export else []
    return _table(found) + "\n\n" + "\n".join(places)


def _size(net: Network) -> int:
    return sum(weight.numel() for weight in net.model.parameters())


def _cut(net: Network, depth: int | None, tolerance: float | None) -> Network:
    if depth is not None:
        return net.cut(depth)
    return net if tolerance is None else net.cut_within(tolerance)


def magnitude_curve(subject: Subject, sparsities: Sequence[float]) -> Result:
    """Accuracy, loss and zeros at each of the sparsities (0..1), in rising order, since what is zero stays zero.

    It uses up the subject's network.
    """
    net, device = subject.network, local_device()
    model = net.model.to(device)
    points = []
    for share in sorted(set(sparsities)):
        prune_by_magnitude(model, share)
        points.append(sparsity(model) | _scores(model, subject.evaluation, device, f"{subject.name}: {share:.0%} zero"))
    card = net.card.model_copy(update={"accuracy": None, "evaluated_at": None})  # which were of the whole network
    return points, Network(model.cpu(), card, net.tokenizer)


@torch.no_grad()
def _scores(model: torch.nn.Module, evaluation: Evaluation, device: torch.device, name: str) -> dict[str, float]:
    """Means over the samples, at full depth."""
    sums, total = {"accuracy": 0.0, "loss": 0.0}, 0
    for batch, counts in bar(evaluation, name, total=len(evaluation.counts), unit="batch"):
        batch = {key: values.to(device) for key, values in batch.items()}
        logits = model(**{key: values for key, values in batch.items() if key != "labels"})["logits"]
        scores = model.score(logits, **batch)
        total += int(counts.sum())
        sums = {key: value + scores[key][counts.to(device)].double().sum().item() for key, value in sums.items()}
    return {key: value / total for key, value in sums.items()}


def _export(net: Network, subject: Subject, folder: Path) -> None:
    card = net.card.model_copy(update={"full_depth": subject.network.card.full_depth})
    folder.mkdir()
    write_export(replace(net, card=card.portable()), folder, "fp32")


def _numbers(subject: Subject, full_size: int, points: list[dict[str, float]]) -> dict[str, Any]:
    """What the tables, the picture and the file say of a network."""
    card, size = subject.network.card, _size(subject.network)
    return {
        "name": subject.name,
        "folder": str(subject.folder),
        "model": card.model.name,
        "connectivity": card.model.connectivity,
        "depth": card.model.depth,
        "full_depth": card.full_depth,
        "step": card.step,
        "data": subject.data.eval,
        "samples": subject.evaluation.samples.num_samples,
        "metric": subject.metric,
        "parameters": size,
        "full_parameters": full_size,
        "points": [point | {"left": round(size * (1 - point["sparsity_all"]))} for point in points],
    }


def _copy(content: bytes, path: Path) -> None:
    try:
        write_file(path, content)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror or error}") from None


def _percent(point: dict[str, float]) -> float:
    return round(100 * point["sparsity"], 1)


def _label(net: dict[str, Any]) -> str:
    return f"{net['name']}, {net['depth']} of {net['full_depth']} blocks"


def _table(networks: Sequence[dict[str, Any]]) -> str:
    """A column for each sparsity that any of them has."""
    columns = sorted({_percent(point) for net in networks for point in net["points"]})
    rows = [["zeros (%) among the blocks' linear weights", *(f"{column:g}" for column in columns)]]

    def part(title: str, cell: Callable[[dict[str, float]], str]) -> None:
        rows.append([title])
        for net in networks:
            cells = {_percent(point): cell(point) for point in net["points"]}
            rows.append([f"  {_label(net)}", *(cells.get(column, "") for column in columns)])

    metrics = dict.fromkeys(net["metric"] for net in networks)
    part(f"{', '.join(metrics)} (%)", lambda point: f"{100 * point['accuracy']:.1f}")
    part("zeros (%) among all parameters", lambda point: f"{100 * point['sparsity_all']:.1f}")
    part("parameters that are not zero", lambda point: f"{point['left']:,}")
    return aligned(rows)


def _picture(method: str, networks: Sequence[dict[str, Any]]) -> bytes:
    """Accuracy over the share of zeros, and over what is left: cut elsewhere, networks differ in size."""
    buffer = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a name with two dollar signs is a name
        figure = Figure(figsize=(10, 4), layout="constrained")
        shares, sizes = figure.subplots(1, 2, sharey=True)
        for net in networks:
            accuracy = [100 * point["accuracy"] for point in net["points"]]
            shares.plot([100 * point["sparsity"] for point in net["points"]], accuracy, marker="o", label=_label(net))
            sizes.plot([point["left"] for point in net["points"]], accuracy, marker="o")
        shares.set_ylabel("accuracy (%)")
        shares.set_xlabel("zeros among the blocks' linear weights (%)")
        sizes.set_xlabel("parameters that are not zero")
        sizes.set_xscale("log")
        sizes.invert_xaxis()
        sizes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        sizes.xaxis.set_major_formatter(EngFormatter(sep=""))
        sizes.xaxis.set_minor_locator(NullLocator())
        for axes in (shares, sizes):
            axes.grid(alpha=0.3)
        shares.legend()
        figure.suptitle(f"Pruned by {method}")
        figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()
