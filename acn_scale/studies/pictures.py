"""What the pictures of the studies have in common."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes


def label(axes: Axes, x: str, y: str, title: str = "", *, legend: bool = True) -> None:
    """What stands round a panel, and its grid. Call it last: the legend knows what is drawn by then."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize="small")


def band(axes: Axes, name: str, places: Sequence[float], runs: Sequence[Sequence[float]]) -> str:
    """A line of the mean over the runs, broken for a residual twin, with their range; return its colour."""
    columns = list(zip(*runs, strict=True))
    style = "--" if name.startswith("residual") else "-"
    (line,) = axes.plot(places, [fmean(column) for column in columns], style, marker=".", label=name)
    low, high = ([edge(column) for column in columns] for edge in (min, max))
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return line.get_color()
