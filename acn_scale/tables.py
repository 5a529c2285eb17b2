"""Rows of cells as text: in columns, or as Markdown."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, *, numbers: bool = True) -> str:
    """The first column to the left, the others to the right where they are numbers. Rows may be short."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    justify = str.rjust if numbers else str.ljust
    lines = []
    for name, *cells in rows:
        padded = map(justify, cells, widths[1:])
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def markdown(rows: Rows) -> str:
    """The first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)
