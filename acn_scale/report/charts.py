"""The pictures of a report, as SVG to stand inside a page: text stays text, and it takes the width it is given."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from acn_scale.depth import depth_figure

ACCENT, INK, FAINT = "#0f6e84", "#22282b", "#7a868b"
GREYS = ("#4a5357", "#9aa5a9")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 12,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=[ACCENT, *GREYS]),
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "savefig.transparent": True,
}
SCALE = LinearSegmentedColormap.from_list("accent", ["#f3f7f8", "#7fb4c0", ACCENT, "#06303b"])


def depth_chart(networks: Sequence[dict[str, Any]], tolerance: float) -> str:
    """The depth curves of all networks with their intervals."""
    curves = {net["name"]: net["accuracy"] for net in networks}
    intervals = {net["name"]: net["accuracy_interval"] for net in networks}
    with rc_context(STYLE):
        figure = depth_figure(curves, tolerance, intervals)
        figure.axes[0].set_title("")
        return _svg(figure, "Accuracy at every depth: " + ", ".join(curves))


def influence_chart(networks: Sequence[dict[str, Any]]) -> str:
    """Block influence over blocks."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for net in networks:
            values = [np.nan if value is None else value for value in net["block_influence"]]
            axes.plot(range(1, len(values) + 1), values, marker="o", label=net["name"])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("block")
        axes.set_ylabel("block influence (1 - cosine)")
        axes.grid(alpha=0.3)
        axes.legend()
        return _svg(figure, "Influence of every block")


def gradient_chart(name: str, gradients: dict[str, Any]) -> str | None:
    """The gradient norms of a run's blocks over training; None where no norm is above 0."""
    norms = np.array(gradients["norms"], dtype=float).T  # None becomes nan
    shown = np.ma.masked_where(~(norms > 0), norms)
    if shown.mask.all():
        return None
    steps, blocks = gradients["steps"], gradients["blocks"]
    with rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(6, 3.6), layout="constrained", dpi=150)
        axes = figure.subplots()
        edges = _edges(steps)
        mesh = axes.pcolormesh(edges, _edges(blocks), shown, norm=LogNorm(), cmap=SCALE, rasterized=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel("block")
        figure.colorbar(mesh, label="gradient norm", ticks=LogLocator(subs=(1, 2, 5)), format="%g").minorticks_off()
        return _svg(figure, f"Gradient norm of every block over training: {name}")


def _edges(centres: Sequence[float]) -> np.ndarray:
    """Of cells around points in rising order."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (np.array(centres[1:]) + np.array(centres[:-1])) / 2
    return np.array([2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]])


def _svg(figure: Figure, label: str) -> str:
    """Without what is for files that stand alone, fixed sizes, and ids that would come twice in a page."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": label}):  # the same numbers give the same page
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = re.search(r'viewBox="[^"]*"', svg)[0]
    return f'<svg {head} role="img" aria-label="{escape(label)}"' + svg[svg.index(">") :]
