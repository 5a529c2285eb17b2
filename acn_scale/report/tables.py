"""The short form of a report: tables in plain text."""

from collections.abc import Sequence
from typing import Any

from acn_scale.tables import aligned


def summary(numbers: dict[str, Any]) -> str:
    """Accuracy at every depth, the cut-offs, and what is saved there."""
    networks = numbers["networks"]
    parts = [_depth_table(networks), _savings_table(networks, numbers["tolerance"])]
    return "\n\n".join([*parts, *filter(None, map(_unigram_line, networks))])


def _depth_table(networks: Sequence[dict[str, Any]]) -> str:
    deepest = max(len(net["accuracy"]) for net in networks)
    rows = [["accuracy (%) at depth", *map(str, range(deepest))]]
    rows += [[net["name"], *(f"{100 * value:.1f}" for value in net["accuracy"])] for net in networks]
    return aligned(rows)


def _savings_table(networks: Sequence[dict[str, Any]], tolerance: float) -> str:
    rows = [[f"cut-off within {tolerance} points", "blocks", "accuracy (%)", "parameters", "saved", "FLOPs", "saved"]]
    for net in networks:
        depth = cut_within(net, tolerance)["depth"]
        cut = cost_at(net, depth)
        rows.append(
            [
                net["name"],
                f"{depth} of {net['depth']}",
                f"{100 * net['accuracy'][depth]:.1f} of {100 * net['accuracy'][-1]:.1f}",
                f"{cut['parameters']:,}",
                f"{cut['saved']['parameters']:.0%}",
                f"{cut['flops'] / 1e6:,.1f} M",
                f"{cut['saved']['flops']:.0%}",
            ]
        )
    return aligned(rows)


def cut_within(net: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """A network's cut-off at one of the report's tolerances."""
    return next(cut for cut in net["cutoffs"] if cut["tolerance"] == tolerance)


def cost_at(net: dict[str, Any], depth: int) -> dict[str, Any]:
    """What a network costs at one of its cut-offs, or at full depth."""
    return next(cost for cost in net["costs"] if cost["depth"] == depth)


def busy(net: dict[str, Any]) -> bool:
    """Whether times of the same pass differ too much to be compared."""
    quartiles = [times["quartiles"] for cost in net["costs"] for times in cost["times"]]
    return any(high > 1.5 * low for low, high in quartiles)


def _unigram_line(net: dict[str, Any]) -> str | None:
    return unigram_sentence(net) and f"{net['name']}: {unigram_sentence(net)}"


def unigram_sentence(net: dict[str, Any]) -> str | None:
    """For masked language models: the loss beside the one of guessing pieces by their frequency."""
    loss, guess = net["loss"][-1], net["unigram_loss"]
    if loss is None or guess is None:
        return None
    return f"masked-token loss {loss:.2f} nats, held out; by unigram frequency {guess:.2f}"
