"""What runs have measured, side by side: tables in text, curves as pictures."""

from collections.abc import Sequence
from pathlib import Path

from acn_scale.config import TextDataConfig
from acn_scale.data.shards import ShardIndex
from acn_scale.depth import cost, cutoff, depth_figure
from acn_scale.runs import Result, read_result


def depth_report(folders: Sequence[Path], out: Path, tolerance: float) -> str:
    """Compare runs: write out/depth_curve.png and return the tables, with paths to look at below them."""
    results = [read_result(folder) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "depth_curve.png"
    curves = {result.name: result.accuracy for result in results}
    depth_figure(curves, tolerance).savefig(picture, dpi=150)
    parts = [_depth_table(results), _savings_table(results, tolerance), *filter(None, map(_unigram_line, results))]
    parts.append(
        "\n".join([f"Depth curve:  {picture}", *(f"TensorBoard:  {folder / 'tensorboard'}" for folder in folders)])
    )
    return "\n\n".join(parts)


def _depth_table(results: Sequence[Result]) -> str:
    deepest = max(len(result.accuracy) for result in results)
    rows = [["accuracy (%) at depth", *map(str, range(deepest))]]
    rows += [[result.name, *(f"{100 * value:.1f}" for value in result.accuracy)] for result in results]
    return aligned(rows)


def _savings_table(results: Sequence[Result], tolerance: float) -> str:
    rows = [[f"cut-off within {tolerance} points", "blocks", "accuracy (%)", "parameters", "saved", "FLOPs", "saved"]]
    for result in results:
        depth = cutoff(result.accuracy, tolerance)
        full, cut = cost(result.cfg.model, result.cfg.model.depth), cost(result.cfg.model, depth)
        rows.append(
            [
                result.name,
                f"{depth} of {result.cfg.model.depth}",
                f"{100 * result.accuracy[depth]:.1f} of {100 * result.accuracy[-1]:.1f}",
                f"{cut.parameters:,}",
                f"{1 - cut.parameters / full.parameters:.0%}",
                f"{cut.flops / 1e6:,.1f} M",
                f"{1 - cut.flops / full.flops:.0%}",
            ]
        )
    return aligned(rows)


def _unigram_line(result: Result) -> str | None:
    """For masked language models: the loss beside the one of guessing pieces by their frequency."""
    if not isinstance(result.cfg.data, TextDataConfig):
        return None
    guess = ShardIndex.load(result.cfg.data.eval).info["unigram_loss"]
    return f"{result.name}: masked-token loss {result.loss:.2f} nats, held out; by unigram frequency {guess:.2f}"


def aligned(rows: list[list[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = []
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False))
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)
