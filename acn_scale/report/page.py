"""One self-contained page, made from the numbers of a report and nothing else."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from acn_scale.report.charts import depth_chart, gradient_chart, influence_chart
from acn_scale.report.elements import (
    DASH,
    NBSP,
    document,
    figure,
    listed,
    loss,
    note,
    percent,
    points,
    saved,
    section,
    table,
)
from acn_scale.report.tables import busy, cost_at, cut_within, unigram_sentence

BUSY = "Times varied by more than half from round to round: the machine had other work, and speed-ups may be off."


def page(numbers: dict[str, Any]) -> str:
    """`numbers` of report_numbers(), also as read from depth.json -> HTML. What stands in it is escaped here."""
    networks = numbers["networks"]
    title = "Depth report: " + ", ".join(net["name"] for net in networks)
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(_lead(net, numbers["tolerance"]) for net in networks),
        _depth(numbers),
        _cutoffs(numbers),
        _savings(numbers),
        _influence(networks),
        *_gradients(networks),
        *_measurements(networks),
        _origins(networks),
        *(_folded(net) for net in networks),
    ]
    return document(title, parts)


def _lead(net: dict[str, Any], tolerance: float) -> str:
    """What there is to know, in two sentences."""
    cut = cut_within(net, tolerance)
    there, (low, high) = cost_at(net, cut["depth"]), cut["interval"]
    name, metric, full = escape(net["name"]), net["metric"], f"{percent(net['accuracy'][-1])}{NBSP}%"
    if cut["depth"] == net["depth"]:
        text = (
            f"<strong>{name}</strong> needs <strong>all its {net['depth']} blocks</strong> (interval {low}{DASH}{high})"
            f" to stay within {tolerance:g} points of its {metric} of {full}."
        )
    else:
        text = (
            f"<strong>{name}</strong> is within {tolerance:g} points of full depth after <strong>{cut['depth']} of "
            f"{net['depth']} blocks</strong> (interval {low}{DASH}{high}), with an {metric} of "
            f"{percent(cut['accuracy'])}{NBSP}% there and {full} at the end. A cut saves {saved(there, 'parameters')} "
            f"of the parameters and {saved(there, 'flops')} of the operations."
        )
        if not busy(net):
            text += f" It is {there['times'][0]['speed_up']:.2f} times as fast at batch 1."
    return f'<p class="lead">{text}</p>'


def _depth(numbers: dict[str, Any]) -> str:
    networks = numbers["networks"]
    deepest = max(net["depth"] for net in networks)
    rows = []
    for depth in range(deepest + 1):
        cells = [str(depth)]
        for net in networks:
            reached = depth <= net["depth"]
            cells += [_with_interval(net, depth), loss(net["loss"][depth])] if reached else ["", ""]
        rows.append(cells)
    head = ["depth"]
    for net in networks:
        head += [f"{escape(net['name'])}, %", "loss"]
    sentences = [f"{escape(net['name'])}: {unigram_sentence(net)}." for net in networks if unigram_sentence(net)]
    if len({net["fingerprint"] for net in networks}) > 1:
        sentences.append("These networks were evaluated on different data: their accuracies do not compare.")
    return section(
        "Accuracy at every depth",
        f"The same head on the readout after each block. Bands and brackets: {_level(numbers)} of "
        f"{numbers['resamples']:,} resamples of the evaluation set.",
        figure(depth_chart(networks, numbers["tolerance"]), "Rings: the cut-off."),
        *(f"<p>{sentence}</p>" for sentence in sentences),
        f"<details><summary>As a table</summary>{table(head, rows)}</details>",
    )


def _cutoffs(numbers: dict[str, Any]) -> str:
    head = ["network", "tolerance", "cut-off", "accuracy, %", "to full depth, points", "known to", "samples to tell"]
    rows, notes = [], []
    for net in numbers["networks"]:
        for cut in net["cutoffs"]:
            low, high = cut["interval"]
            below, above = cut["difference_interval"]
            whole = cut["depth"] == net["depth"]
            rows.append(
                [
                    escape(net["name"]),
                    f"{cut['tolerance']:g}",
                    f"{cut['depth']} of {net['depth']} [{low}{DASH}{high}]",
                    percent(cut["accuracy"]),
                    DASH if whole else f"{points(cut['difference'])} [{points(below)}, {points(above)}]",
                    f"\N{PLUS-MINUS SIGN}{cut['half_width']:.2f}",
                    f"{cut['samples_needed']:,}" if cut["samples_needed"] else DASH,
                ]
            )
        unsure = [f"{cut['tolerance']:g}" for cut in net["cutoffs"] if cut["too_small"]]
        if unsure:
            notes.append(
                f"{escape(net['name'])}: {net['samples']:,} samples are too few to tell at {listed(unsure)} points; "
                "the last two columns say how well they tell, and about how many would do."
            )
    return section(
        "Cut-offs",
        "The smallest depth whose accuracy is within the tolerance, in points, of full depth. Brackets: "
        f"{_level(numbers)} of the resamples, each drawn alike for all depths.",
        table(head, rows),
        note(notes),
    )


def _savings(numbers: dict[str, Any]) -> str:
    sizes, times = [], []
    for net in numbers["networks"]:
        for cost in net["costs"]:
            tolerances = [f"{cut['tolerance']:g}" for cut in net["cutoffs"] if cut["depth"] == cost["depth"]]
            place = [escape(net["name"]), str(cost["depth"]), ", ".join(tolerances) or "full depth"]
            shown = {
                "parameters": f"{cost['parameters']:,}",
                "flops": f"{cost['flops'] / 1e6:,.1f} M",
                "bytes": f"{cost['bytes']:,}",
            }
            sizes.append(place + [cell for key, text in shown.items() for cell in (text, saved(cost, key))])
            cells = []
            for each in cost["times"]:
                cells += [f"{1000 * each['seconds']:.2f}", f"{each['samples_per_second']:,.0f}"]
                cells += [f"{each['speed_up']:.2f}\N{MULTIPLICATION SIGN}"]
            times.append(place + cells)
    where = ["network", "blocks", "cut-off within"]
    head = [*where, "parameters", "saved", "FLOPs a sample", "saved", "bytes, fp32", "saved"]
    batches = [each["batch"] for each in numbers["networks"][0]["costs"][0]["times"]]
    speed = where + [cell for size in batches for cell in (f"ms, batch {size}", "samples/s", "speed-up")]
    on = numbers["measured_on"]
    return section(
        "What a cut saves",
        "Bytes are those of the cut network as safetensors. A multiply-add counts as two operations.",
        table(head, sizes, texts=3),
        f"<p>Time of a forward pass, measured on {escape(on['device'])} with {on['threads']} "
        f"thread{'s' * (on['threads'] > 1)} in {on['precision']}: medians over rounds in which all depths take turns, "
        "after a warm-up.</p>",
        table(speed, times, texts=3),
        note([BUSY] if any(map(busy, numbers["networks"])) else []),
    )


def _influence(networks: Sequence[dict[str, Any]]) -> str:
    deepest = max(net["depth"] for net in networks)
    rows = []
    for block in range(deepest):
        values = [net["block_influence"][block] if block < net["depth"] else None for net in networks]
        rows.append([str(block + 1), *(DASH if value is None else f"{value:.4f}" for value in values)])
    return section(
        "Block influence",
        "How far a block turns the readout: 1 minus the cosine between the readouts below and above it, averaged over "
        "tokens and samples of the evaluation set.",
        figure(influence_chart(networks), "Near 0, a block hardly changes the readout."),
        "<details><summary>As a table</summary>"
        + table(["block", *(escape(net["name"]) for net in networks)], rows)
        + "</details>",
    )


def _gradients(networks: Sequence[dict[str, Any]]) -> Iterator[str]:
    charts = []
    for net in networks:
        chart = net.get("gradient_norms") and gradient_chart(net["name"], net["gradient_norms"])
        if chart:
            charts.append(figure(chart, escape(net["name"])))
    if charts:
        text = "Norm of each block's gradient before clipping, at lines of metrics.jsonl."
        yield section("Gradients over training", text, f'<div class="pair">{"".join(charts)}</div>')


def _measurements(networks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tasks under noise, whose names say so behind a plus, by themselves; all others as downstream results. At full
    depth and the cut-offs; the other depths can be unfolded.
    """
    head = ["network", "task", "metric", "checkpoint", "depth", "value", "interval", "samples", "seed", "note"]
    for title, noisy in (("Under noise", True), ("Downstream", False)):
        rows: dict[bool, list[list[str]]] = {True: [], False: []}  # by whether they are shown at once
        for net in networks:
            shown = {None, net["depth"], *(cut["depth"] for cut in net["cutoffs"])}
            for line in net.get("measurements", []):
                if ("+" in line["task"] or "noise" in line["task"].lower()) == noisy:
                    cells = [net["name"], *_measurement_cells(line)]
                    rows[line["depth"] in shown].append([escape(cell) for cell in cells])
        if rows[True] or rows[False]:
            others = f"<details><summary>At other depths</summary>{table(head, rows[False], texts=4)}</details>"
            text = "From eval/ in the network's folder, at full depth and the cut-offs."
            overview = list(_under_noise(networks)) if noisy else []
            listed = table(head, rows[True], texts=4)
            if overview:
                listed = f"<details><summary>All metrics, with intervals</summary>{listed}</details>"
            parts = [listed] * bool(rows[True]) + [others] * bool(rows[False])
            yield section(title, text, *overview, *parts)


def _under_noise(networks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each data set a table: the first metric of a task, without noise and under each, which is what its name has
    behind a plus."""
    values: dict[tuple[str, str, int, str], str] = {}  # of network, data set, depth and noise
    for net in networks:
        metrics: dict[str, str] = {}
        for line in net.get("measurements", []):
            if line["mean_of"] is not None:
                continue
            if metrics.setdefault(line["task"], line["metric"]) == line["metric"] and line["depth"] is not None:
                data, _, noise = line["task"].partition("+")
                values[net["name"], data, line["depth"], noise] = f"{line['value']:.4g}"
    for data in dict.fromkeys(data for _, data, _, noise in values if noise):
        noises = sorted({noise for _, of, _, noise in values if of == data})
        rows = []
        for net in networks:
            for depth in sorted({net["depth"], *(cut["depth"] for cut in net["cutoffs"])}):
                cells = [values.get((net["name"], data, depth, noise), DASH) for noise in noises]
                if set(cells) != {DASH}:
                    rows.append([escape(cell) for cell in (net["name"], str(depth), *cells)])
        yield table([escape(name) for name in (data, "depth", *(noise or "no noise" for noise in noises))], rows)


def _measurement_cells(line: dict[str, Any]) -> list[str]:
    bounds = line["interval"]
    between = f"{bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else DASH
    depth, samples, seed = (DASH if line[key] is None else str(line[key]) for key in ("depth", "samples", "seed"))
    checkpoint = line["checkpoint"] or DASH
    value, note = f"{line['value']:.4g}", line["note"] or ""
    return [line["task"], line["metric"], checkpoint, depth, value, between, samples, seed, note]


def _origins(networks: Sequence[dict[str, Any]]) -> str:
    rows = []
    for net in networks:
        cut = f", cut from {net['full_depth']}" if net["depth"] < net["full_depth"] else ""
        cells = [
            net["name"],
            f"{net['kind']} {net['folder']}",
            f"{net['model']}, {net['connectivity']}, {net['depth']} blocks{cut}",
            DASH if net["step"] is None else f"{net['step']:,}",
            net["data"],
            f"{net['samples']:,}",
            f"{net['metric']}" + (f" ({net['mask_ratio']:.0%} of all)" if net["mask_ratio"] else ""),
        ]
        rows.append([escape(cell) for cell in cells])
    head = ["network", "from", "model", "step", "evaluated on", "samples", "metric"]
    return section("Networks", "", table(head, rows, texts=3))


def _folded(net: dict[str, Any]) -> str:
    parts = []
    for what in ("config", "environment"):
        if what in net:
            text = escape(json.dumps(net[what], indent=1, ensure_ascii=False))
            parts.append(f"<details><summary>{escape(net['name'])}: {what}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _level(numbers: dict[str, Any]) -> str:
    return f"the middle {numbers['level']:.0%}"


def _with_interval(net: dict[str, Any], depth: int) -> str:
    low, high = net["accuracy_interval"][depth]
    return f"{percent(net['accuracy'][depth])} [{percent(low)}, {percent(high)}]"
