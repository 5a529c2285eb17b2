"""How much of its depth a network uses and what a cut there saves: as text, as one page, as numbers."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from acn_scale.depth import depth_figure
from acn_scale.distributed import local_device
from acn_scale.errors import UserError
from acn_scale.files import check_writable, write_together
from acn_scale.report.numbers import report_numbers
from acn_scale.report.page import page
from acn_scale.report.subject import open_subjects
from acn_scale.report.tables import summary


def depth_report(
    folders: Sequence[Path], out: Path | None = None, *, tolerance: float = 0.5, data: str | None = None
) -> str:
    """Evaluate runs, checkpoints and exports at every depth; write report.html, depth.json and depth_curve.png to
    `out`, by default report/ in the first one's folder; return the tables, with paths to look at below them.

    `data` replaces the evaluation shards. Raises UserError; what `out` held before is then still there.
    """
    if not 0 <= tolerance <= 100:
        raise UserError(f"--tolerance {tolerance}: must be 0 to 100 points of accuracy")
    subjects = open_subjects(folders, data)
    out = out or subjects[0].folder / "report"
    check_writable(out)
    numbers = report_numbers(subjects, tolerance, local_device())
    picture = io.BytesIO()
    curves = {net["name"]: net["accuracy"] for net in numbers["networks"]}
    with rc_context({"text.parse_math": False}):  # a name with two dollar signs is a name
        depth_figure(curves, tolerance).savefig(picture, dpi=150, format="png")
    files = {
        "depth.json": (json.dumps(numbers, indent=1) + "\n").encode(),
        "depth_curve.png": picture.getvalue(),
        "report.html": page(numbers).encode(),
    }
    write_together(out, files)
    lines = [f"Depth curve:  {out / 'depth_curve.png'}"]
    lines += [f"TensorBoard:  {each.folder / 'tensorboard'}" for each in subjects if each.is_run]
    lines += [f"Report:       {out / 'report.html'}"]
    return summary(numbers) + "\n\n" + "\n".join(lines)
