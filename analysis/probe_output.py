"""Tables and pictures of what probes.py measured, from the content of probes.json only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.graph_values import GROUPS
from analysis.learning_curve import INK, NOTE
from analysis.output import save_figure, write_csv
from analysis.plots import COLOURS
from analysis.tables import markdown_table

HEADINGS = {
    "thoughts": "Thoughts read as words",
    "geometry": "Where thoughts are among embeddings and states",
    "linear": "What a linear map reads from a thought (accuracy in %, own step in brackets)",
    "confidence": "Confidence in the answers",
    "graph": "Values of nodes after k thoughts (probability of a name, in %)",
    "attention": "Attention from thought k to an edge (in %)",
}
MEANS = ("gold_step_word", "gold_step_top1", "entropy", "norm_ratio", "max_cosine")
MEANS += ("cosine_last_state", "cosine_previous", "cosine_other_records")
GROUP_COLOURS = dict(zip(GROUPS, ("#8a919c", "#56b4e9", "#0072b2", "#009e73"), strict=True))
RIGHT_COLOUR, WRONG_COLOUR = "#0072b2", "#d55e00"


def tables(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables by name, each a list of rows; empty ones are left out."""
    thoughts = [_flat_thought(entry) for entry in found["thoughts"]]
    layers = [
        {"k": k, "layer": layer} | {name: table[k - 1][layer] for name, table in by_layer.items()}
        for by_layer in [found["layers"]]
        for k in range(1, len(found["thoughts"]) + 1)
        for layer in range(len(by_layer["entropy"][0]))
    ]
    confidence = [{"answers": name} | found["confidence"][name] for name in ("right", "wrong")]
    made = {
        "thoughts": thoughts,
        "layers": layers,
        "linear": found["linear"],
        "confidence": confidence,
        "reliability": found["confidence"]["reliability"],
    }
    if graph := found["graph"]:
        made["graph_groups"] = _by_group(graph["groups"])
        made["graph_attention"] = _by_group(graph["attention"])
        made["graph_auc"] = graph["auc"]
        made["graph_top"] = [
            {"k": k} | {f"top{n}": share for n, share in enumerate(shares, start=1)}
            for k, shares in enumerate(graph["top"])
        ]
        made["graph_height"] = graph["height"]
    return {name: rows for name, rows in made.items() if rows}


def _flat_thought(entry: dict[str, Any]) -> dict[str, Any]:
    row = {name: entry[name] for name in ("k", "step", "n", "gold_step_rank_median")}
    for name in MEANS:
        row |= {name: entry[name]["mean"]}
        row |= {f"{name}_{end}": entry[name][end] for end in ("low", "high")}
    return row | {f"window_{j}": x for j, x in enumerate(entry["window"] or [], start=1)}


def _by_group(groups: dict[str, list[dict]]) -> list[dict[str, Any]]:
    return [{"group": group} | entry for group, by_k in groups.items() for entry in by_k]


def write_tables(found: dict[str, Any], folder: Path) -> None:
    """Write the tables as CSV files."""
    for name, rows in tables(found).items():
        write_csv(folder / f"probes_{name}.csv", [list(rows[0]), *(r.values() for r in rows)])


def page(found: dict[str, Any]) -> list[str]:
    """The lines of the Markdown tables that are printed."""
    lines = [
        f"{found['checkpoint']} on {found['num_records']} records of {found['data']}, stage"
        f" {found['stage']}"
    ]
    made = {
        "thoughts": _word_rows(found["thoughts"]),
        "geometry": _geometry_rows(found["thoughts"]),
        "linear": _linear_rows(found),
        "confidence": _confidence_rows(found["confidence"]),
    }
    if graph := found["graph"]:
        made["graph"] = _graph_rows(graph)
        made["attention"] = _attention_rows(graph["attention"])
    for name, rows in made.items():
        if len(rows) > 1:
            lines += ["", HEADINGS[name], "", *markdown_table(rows)]
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _word_rows(thoughts: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = [("thought", "as a word of answers in its step %", "95 % interval",
             "in another record's %", "top token in its step %", "median rank",
             "options exp(H)")]  # fmt: skip
    for entry in thoughts:
        word, rank = entry["gold_step_word"], entry["gold_step_rank_median"]
        interval = f"{_percent(word['low'])} to {_percent(word['high'])}" if word["n"] else ""
        rows.append((
            str(entry["k"]), _percent(word["mean"]), interval,
            _percent(entry["other_step_word"]["mean"]),
            _percent(entry["gold_step_top1"]["mean"]), "" if rank is None else f"{rank:g}",
            f"{np.exp(entry['entropy']['mean']):.1f}",
        ))  # fmt: skip
    return rows


def _geometry_rows(thoughts: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    window = thoughts[0]["window"] or []
    rows = [("thought", "norm / embeddings'", "largest cosine to one", "cosine: state before",
             "thought before", "other records",
             *(f"share of state {j}" for j in range(1, len(window) + 1)))]  # fmt: skip
    names = ("norm_ratio", "max_cosine", "cosine_last_state", "cosine_previous")
    for entry in thoughts:
        means = [_number(entry[name]["mean"]) for name in (*names, "cosine_other_records")]
        rows.append((str(entry["k"]), *means, *map(_number, entry["window"] or [])))
    return rows


def _linear_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    entries = {(entry["k"], entry["step"]): entry for entry in found["linear"]}
    steps = sorted({step for _, step in entries})
    rows = [("thought", *(f"step {step}" for step in steps), "own less best other", "p")]
    for thought in found["thoughts"]:
        cells, last = [], ("", "")
        for step in steps:
            entry = entries.get((thought["k"], step))
            cell = _percent(entry and entry["accuracy"])
            if entry and step == thought["step"]:
                cell = f"[{cell}]"
                last = _advantage(entry), f"{entry['p']:.3f}"
            cells.append(cell)
        rows.append((str(thought["k"]), *cells, *last))
    majorities = {step: e["majority"] for (_, step), e in entries.items()}
    if steps:
        rows.append(("largest class", *(_percent(majorities[step]) for step in steps), "", ""))
    return rows


def _advantage(entry: dict[str, Any]) -> str:
    other = entry["best_other_step"]
    return "" if other is None else f"{100 * (entry['accuracy'] - other):+.1f}"


def _confidence_rows(confidence: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("answers", "n", "mean log p", "95 % interval")]
    for name in ("right", "wrong"):
        entry = confidence[name]
        interval = f"{entry['low']:.3g} to {entry['high']:.3g}" if entry["n"] > 1 else ""
        mean = "" if entry["mean"] is None else f"{entry['mean']:.3g}"
        rows.append((name, str(entry["n"]), mean, interval))
    return rows


def _graph_rows(graph: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("k", *GROUPS, "frontier AUC", "top 1", "top 2", "top 3")]
    for k, (auc, top) in enumerate(zip(graph["auc"], graph["top"], strict=True)):
        means = [_percent(graph["groups"][group][k]["mean"]) for group in GROUPS]
        rows.append((str(k), *means, _number(auc["mean"]), *map(_percent, top)))
    return rows


def _attention_rows(attention: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    rows = [("k", *GROUPS)]
    for entries in zip(*(attention[group] for group in GROUPS), strict=True):
        rows.append((str(entries[0]["k"]), *(_percent(entry["mean"]) for entry in entries)))
    return rows


# Pictures


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw what was measured into PNG and SVG files."""
    figures = {"thoughts": _draw_thoughts, "layers": _draw_layers, "confidence": _draw_confidence}
    if found["linear"]:
        figures["linear"] = _draw_linear
    if found["graph"]:
        figures["graph"] = _draw_graph
    for name, make in figures.items():
        figure = make(found)
        save_figure(figure, folder / f"probes_{name}")
        plt.close(figure)


def _finish(axes: Axes, title: str, xlabel: str = "thought", ylabel: str = "") -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(axes: Axes) -> None:
    """Below the axes, where no curve can run through it."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        axes.legend(handles, labels, **place, ncols=2, fontsize=8, frameon=False)


def _plot_means(
    axes: Axes, entries: Sequence[dict[str, Any]], label: str, colour: str, scale: float = 1.0
) -> None:
    """Means with intervals over k; entries without a mean are left out."""
    known = [entry for entry in entries if entry["mean"] is not None]
    ks = [entry["k"] for entry in known]
    means = np.array([entry["mean"] for entry in known]) * scale
    axes.plot(ks, means, color=colour, marker="o", markersize=4, label=label)
    lows, highs = (
        np.array([m if entry[end] is None else scale * entry[end]
                  for entry, m in zip(known, means, strict=True)])
        for end in ("low", "high")
    )  # fmt: skip
    axes.fill_between(ks, lows, highs, color=colour, alpha=0.2, linewidth=0)


def _draw_thoughts(found: dict[str, Any]) -> Figure:
    thoughts = found["thoughts"]
    ks = [entry["k"] for entry in thoughts]
    figure, panels = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    words, ranks, options, cosines, norms, windows = panels.flat

    def plot(axes: Axes, name: str, label: str, colour: str, scale: float = 1.0) -> None:
        _plot_means(axes, [{"k": e["k"]} | e[name] for e in thoughts], label, colour, scale)

    plot(words, "gold_step_word", "as a word of answers", COLOURS[0], 100)
    plot(words, "gold_step_top1", "as the top token", COLOURS[5], 100)
    words.set_ylim(-3, 103)
    _finish(words, "thought k reads as its step (%)")
    medians = [entry["gold_step_rank_median"] for entry in thoughts]
    ranks.plot(ks, [np.nan if m is None else m for m in medians], marker="o", markersize=4)
    ranks.yaxis.get_major_locator().set_params(integer=True)
    _finish(ranks, "rank of its step among all tokens, median")
    entropies = [entry["entropy"] for entry in thoughts]
    _plot_means(options, [{"k": k, "n": e["n"]} | {key: None if e[key] is None else np.exp(e[key])
                                     for key in ("mean", "low", "high")}
                for k, e in zip(ks, entropies, strict=True)], "", COLOURS[0])  # fmt: skip
    _finish(options, "number of options, exp(entropy)")
    for name, label, colour in (
        ("cosine_last_state", "the state before it", COLOURS[0]),
        ("cosine_previous", "the thought before it", COLOURS[2]),
        ("cosine_other_records", "other records' thought", COLOURS[5]),
        ("max_cosine", "the nearest embedding", COLOURS[3]),
    ):
        plot(cosines, name, label, colour)
    _finish(cosines, "cosine with")
    plot(norms, "norm_ratio", "", COLOURS[0])
    norms.axhline(1, color=NOTE, linewidth=1, linestyle="--")
    _finish(norms, "norm / mean norm of embeddings")
    _draw_windows(windows, thoughts)
    for axes in (ranks, options, norms):
        axes.set_ylim(bottom=0)
    for axes in panels.flat:
        axes.set_xticks(ks)
        _legend_below(axes)
    return figure


def _draw_windows(axes: Axes, thoughts: Sequence[dict[str, Any]]) -> None:
    """Bars of shares, which may be negative."""
    size = len(thoughts[0]["window"] or [])
    for j in range(size):
        places = [entry["k"] + 0.8 * ((j + 0.5) / size - 0.5) for entry in thoughts]
        shares = [entry["window"][j] for entry in thoughts]
        label = "nearest" if j == 0 else f"{j + 1} columns back"
        axes.bar(places, shares, 0.8 / size, color=COLOURS[j % len(COLOURS)], label=label)
    axes.axhline(0, color=NOTE, linewidth=0.8)
    _finish(axes, "share of each state of the window" if size else "no window: pause thoughts")


def _heat_map(axes: Axes, values: np.ndarray, title: str, top: float | None, form: str) -> None:
    """Numbers (rows, columns) as colours, with the numbers written in."""
    top = top or float(np.nanmax(values, initial=1e-9))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > 0.6 * top else INK
            axes.text(column, row, format(value, form), ha="center", va="center",
                      color=colour, fontsize=8)  # fmt: skip
    axes.set_title(title, loc="left", color=INK, fontsize=10)


def _draw_layers(found: dict[str, Any]) -> Figure:
    tables_ = [np.array(found["layers"][name], dtype=float).T  # (L + 1, K)
               for name in ("gold_step_top1", "entropy")]  # fmt: skip
    num_layers, num_thoughts = tables_[0].shape
    size = (max(7, 2 + 1.1 * num_thoughts), max(3, 1.4 + 0.32 * num_layers))
    figure, panels = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    titles = ("top token is in its step (%)", "entropy (nats)")
    for axes, values, title, top in zip(panels, tables_, titles, (100, None), strict=True):
        scale = 100 if top else 1
        _heat_map(axes, scale * values, title, top, ".0f" if top else ".1f")
        axes.set_xticks(range(num_thoughts), range(1, num_thoughts + 1))
        axes.set_xlabel("thought")
    panels[0].set_yticks(range(num_layers), ["input", *range(1, num_layers)])
    panels[0].set_ylabel("layer, one column before")
    return figure


def _draw_linear(found: dict[str, Any]) -> Figure:
    steps = sorted({entry["step"] for entry in found["linear"]})
    ks = [entry["k"] for entry in found["thoughts"]]
    values = np.full((len(steps), len(ks)), np.nan)
    majority = np.full((len(steps), 1), np.nan)
    for entry in found["linear"]:
        row = steps.index(entry["step"])
        values[row, ks.index(entry["k"])] = 100 * entry["accuracy"]
        majority[row] = 100 * entry["majority"]
    figure, axes = plt.subplots(
        figsize=(max(4.5, 1.8 + 0.7 * len(ks)), max(3, 1.4 + 0.5 * len(steps))),
        layout="constrained",
    )  # fmt: skip
    _heat_map(axes, np.hstack([values, majority]), "accuracy of linear probes (%)", 100, ".0f")
    axes.axvline(len(ks) - 0.5, color="white", linewidth=4, zorder=1)
    axes.set_xticks(range(len(ks) + 1), [*ks, "largest\nclass"])
    axes.set_yticks(range(len(steps)), steps)
    axes.set(xlabel="thought", ylabel="step")
    for column, thought in enumerate(found["thoughts"]):
        if thought["step"] in steps:
            row = steps.index(thought["step"])
            outline = {"fill": False, "edgecolor": WRONG_COLOUR, "linewidth": 1.6, "zorder": 2}
            axes.add_patch(plt.Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, **outline))
    return figure


def _draw_confidence(found: dict[str, Any]) -> Figure:
    points = found["confidence"]["reliability"]
    figure, (curve, counts) = plt.subplots(
        2, 1, figsize=(5, 5), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    curve.plot([0, 100], [0, 100], color=NOTE, linewidth=1, linestyle="--", label="calibrated")
    x, acc, low, high = (
        100 * np.array([point[name] for point in points])
        for name in ("confidence", "acc", "low", "high")
    )
    curve.errorbar(x, acc, [acc - low, high - acc], fmt="o", color=RIGHT_COLOUR, markersize=4,
                   linewidth=1, capsize=2, label="answers by confidence")  # fmt: skip
    curve.set(xlim=(-3, 103), ylim=(-3, 103))
    _finish(curve, "reliability", "", "right (%)")
    curve.legend(fontsize=8, frameon=False, loc="upper left")
    middles = [50 * (point["from"] + point["to"]) for point in points]
    num_right = np.array([round(point["acc"] * point["n"]) for point in points])
    num_all = np.array([point["n"] for point in points])
    counts.bar(middles, num_right, 9, color=RIGHT_COLOUR, label="right")
    counts.bar(middles, num_all - num_right, 9, bottom=num_right, color=WRONG_COLOUR,
               label="wrong")  # fmt: skip
    counts.legend(fontsize=8, frameon=False, loc="upper left")
    _finish(counts, "", "confidence: probability of the whole answer (%)", "answers")
    return figure


def _draw_graph(found: dict[str, Any]) -> Figure:
    graph = found["graph"]
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 7.6), layout="constrained")
    values, curve, attention, heights = panels.flat
    for group, colour in GROUP_COLOURS.items():
        _plot_means(values, graph["groups"][group], group, colour, 100)
        _plot_means(attention, graph["attention"][group], group, colour, 100)
    values.set_ylim(bottom=0)
    attention.set_ylim(bottom=0)
    _finish(values, "value of a node, mean of its group (%)", "thoughts")
    _finish(attention, "attention to an edge, by the group it starts from (%)")
    _plot_means(curve, graph["auc"], "frontier above the rest (AUC)", COLOURS[2])
    ks = range(len(graph["top"]))
    for n in range(len(graph["top"][0])):
        curve.plot(ks, [shares[n] for shares in graph["top"]], color=COLOURS[(5, 1, 3)[n]],
                   marker="o", markersize=4, label=f"share of the top {n + 1}")  # fmt: skip
    curve.axhline(0.5, color=NOTE, linewidth=1, linestyle="--")
    curve.set_ylim(0, 1.05)
    _finish(curve, "how clear, how parallel", "thoughts")
    _draw_heights(heights, graph["height"])
    for axes, first in ((values, 0), (curve, 0), (attention, 1)):
        axes.set_xticks(ks[first:])
    for axes in panels.flat:
        _legend_below(axes)
    return figure


def _draw_heights(axes: Axes, entries: Sequence[dict[str, Any]]) -> None:
    """Values of frontier nodes by height, over all numbers of thoughts that have some."""
    for kind, colour in (("optimal", GROUP_COLOURS["optimal"]), ("other", WRONG_COLOUR)):
        points = {}
        for entry in entries:
            if entry["nodes"] == kind:
                total, n = points.get(entry["height"], (0.0, 0))
                points[entry["height"]] = (total + entry["mean"] * entry["n"], n + entry["n"])
        x = sorted(points)
        axes.plot(x, [100 * points[h][0] / points[h][1] for h in x], color=colour, marker="o",
                  markersize=4, label=f"{kind} nodes of the frontier")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, "value by height (%)", "edges to the nearest leaf")
