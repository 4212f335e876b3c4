"""Tables and pictures of what ablations.py measured, from the content of ablations.json alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.learning_curve import INK, NOTE
from analysis.output import save_figure, write_csv
from analysis.path_classes import CLASSES
from analysis.plots import COLOURS
from analysis.tables import markdown_table

IN_WORDS = {
    "zeros": "zeros",
    "mean": "their mean over questions",
    "noise_added": "themselves plus noise",
    "noise": "noise of their norm",
    "other_record": "another question's thoughts",
    "permuted": "themselves in another order",
    "placeholder": "the latent token's embedding",
}
HEADINGS = {
    "sweep": "Answers after k thoughts",
    "replacements": "Other vectors in the place of thoughts",
    "transplant": "Whose answer is given with another record's thoughts",
    "shortcuts": "Where rules that never look at the root are right, tied and wrong",
}
CLASS_COLOURS = dict(
    zip(CLASSES, ("#009e73", "#56b4e9", "#d55e00", "#e69f00", "#0072b2", "#b0b5bd"), strict=True)
)
OWN_COLOUR, OTHER_COLOUR = "#0072b2", "#b0b5bd"
# More numbers than this would run into each other.
MAX_TICKS = 16
SHARES = {"acc", "share", *CLASSES}


def tables(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables by name, each a list of rows; shares lie in 0..1. Empty ones are left out."""
    stops = found["early_stop"]
    sweep = []
    for entry in found["sweep"]:
        row = {name: value for name, value in entry.items() if name != "classes"}
        if None not in stops:
            row["num_stop_early"] = stops.count(entry["k"])
        for name, share in (entry["classes"] or {}).items():
            row |= {
                name: share["share"],
                f"{name}_low": share["low"],
                f"{name}_high": share["high"],
            }
        sweep.append(row)
    transplant = [
        {"answers": pairs, "n": found["transplant"][pairs]["n"], "now": name} | shares
        for pairs in ("unequal", "equal")
        for name, shares in ((found["transplant"] or {}).get(pairs) or {}).items()
        # With equal answers to follow is to keep.
        if name not in ("n", "follows_donor" if pairs == "equal" else None)
    ]
    shortcuts = [
        {"rule": rule, "verdict": verdict} | figures
        for rule, verdicts in (found["shortcuts"] or {}).items()
        for verdict, figures in verdicts.items()
    ]
    made = {
        "sweep": sweep,
        "replacements": found["replacements"],
        "transplant": transplant,
        "shortcuts": shortcuts,
    }
    return {name: rows for name, rows in made.items() if rows}


def write_tables(found: dict[str, Any], folder: Path) -> None:
    """Write the tables as CSV files."""
    for name, rows in tables(found).items():
        write_csv(folder / f"ablations_{name}.csv", [list(rows[0]), *(r.values() for r in rows)])


def page(found: dict[str, Any]) -> list[str]:
    """All tables as lines of Markdown, shares in per cent, differences in points."""
    own = found["own"]
    lines = [
        f"{found['checkpoint']} on {found['num_records']} records of {found['data']}, stage"
        f" {found['stage']}; thoughts of a record: {found['num_thoughts']}",
        f"accuracy with its own thoughts {100 * own['acc']:.1f} %, 95 % interval"
        f" {_interval(own['low'], own['high'])}",
    ]
    for name, rows in tables(found).items():
        cells = [_cells(row) for row in rows]
        table = [tuple(cells[0]), *(tuple(row.values()) for row in cells)]
        lines += ["", f"## {HEADINGS[name]}", "", *markdown_table(table)]
    return lines


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as texts, each figure beside its interval."""
    cells = {}
    for name, value in row.items():
        kind, _, end = name.rpartition("_")
        if name.endswith("low") or (end == "high" and kind in CLASSES):
            continue
        if name.endswith("high"):
            low = row[name.removesuffix("high") + "low"]
            cells[f"{kind} interval".strip()] = "" if value is None else _interval(low, value)
        elif value is None:
            cells[name] = ""
        elif name in SHARES:
            cells[name] = f"{100 * value:.1f} %"
        elif name == "difference":
            cells[name] = f"{100 * value:+.1f}"
        elif isinstance(value, float):
            cells[name] = f"{value:.3g}"
        else:
            cells[name] = IN_WORDS.get(str(value), str(value))
    return cells


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw k_sweep, thoughts_used and, where asked, thoughts_by_position, as PNG and SVG."""
    figures = {"k_sweep": draw_sweep(found)}
    if found["replacements"]:
        figures["thoughts_used"] = draw_bars(found)
    if any(entry["positions"] != "all" for entry in found["replacements"]):
        figures["thoughts_by_position"] = draw_positions(found)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
        plt.close(figure)


def draw_sweep(found: dict[str, Any]) -> plt.Figure:
    """By the number of thoughts: accuracy, tokens written, and classes where there are graphs."""
    sweep = found["sweep"]
    heights = {"accuracy": 3.2, "tokens": 1.3}
    if sweep[0]["classes"] is not None:
        heights["classes"] = 3.0
    figure, panels = plt.subplot_mosaic(
        [[name] for name in heights], height_ratios=list(heights.values()), sharex=True,
        figsize=(8, 0.6 + sum(heights.values())), layout="constrained",
    )  # fmt: skip
    counts = [entry["k"] for entry in sweep]
    axes = panels["accuracy"]
    low, acc, high = ([100 * entry[name] for entry in sweep] for name in ("low", "acc", "high"))
    axes.fill_between(counts, low, high, color=OWN_COLOUR, alpha=0.18, linewidth=0)
    axes.plot(counts, acc, color=OWN_COLOUR, linewidth=2.2, marker="o", markersize=5)
    axes.axvline(found["num_thoughts"], color=NOTE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        "as trained", (found["num_thoughts"], 1.02), xycoords=("data", "axes fraction"),
        ha="center", color=NOTE, fontsize=9,
    )  # fmt: skip
    axes.set(ylim=(-3, 103), ylabel="accuracy (%)")
    tokens = [entry["mean_tokens"] for entry in sweep]
    bars = panels["tokens"].bar(counts, tokens, width=0.5, color=OTHER_COLOUR)
    if len(counts) <= MAX_TICKS:
        panels["tokens"].bar_label(bars, fmt="%.1f", fontsize=8, color=INK, padding=2)
    panels["tokens"].set(ylim=(0, 1.35 * max(*tokens, 1)), ylabel="tokens\nwritten")
    if "classes" in panels:
        _draw_classes(panels["classes"], counts, [entry["classes"] for entry in sweep])
    last = list(panels.values())[-1]
    last.set_xlabel("thoughts before the answer")
    last.xaxis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, integer=True))
    _tidy(list(panels.values()))
    return figure


def _draw_classes(axes: Axes, counts: Sequence[int], classes: Sequence[dict]) -> None:
    bottom = [0.0] * len(counts)
    for name in CLASSES:
        heights = [100 * entry[name]["share"] for entry in classes]
        if any(heights):
            axes.bar(
                counts, heights, bottom=bottom, width=0.72, color=CLASS_COLOURS[name],
                label=name.replace("_", " "),
            )  # fmt: skip
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(ylim=(0, 103), ylabel="answers (%)")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9,
        frameon=False,
    )  # fmt: skip


def draw_bars(found: dict[str, Any]) -> plt.Figure:
    """Accuracy when all latent positions read something else, a bar each, with intervals."""
    bars = [("its own thoughts", found["own"])]
    bars += [
        (IN_WORDS[entry["name"]], entry)
        for entry in found["replacements"]
        if entry["positions"] == "all"
    ]
    bars += [
        (f"nothing (k = 0), {entry['mean_tokens']:.1f} tokens written", entry)
        for entry in found["sweep"]
        if entry["k"] == 0
    ]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(bars)), layout="constrained")
    for place, (_, entry) in enumerate(bars):
        acc, low, high = (100 * entry[part] for part in ("acc", "low", "high"))
        colour = OTHER_COLOUR if place else OWN_COLOUR
        axes.barh(place, acc, height=0.66, color=colour)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
        axes.annotate(
            f"{acc:.1f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center",
            color=INK, fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set(xlim=(0, 109), xticks=range(0, 101, 20), xlabel="accuracy (%), 95 % interval")
    axes.set_title("When the latent positions read", loc="left", color=INK, fontsize=11)
    axes.invert_yaxis()
    _tidy([axes])
    axes.tick_params(axis="y", length=0)
    return figure


def draw_positions(found: dict[str, Any]) -> plt.Figure:
    """Accuracy when some thoughts read something else: each alone, the first j, the last j."""
    labels = {"only": "thought j alone", "first": "the first j", "last": "the last j"}
    parts: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in found["replacements"]:
        kind, _, number = entry["positions"].partition(" ")
        if kind != "all":
            lines = parts.setdefault(kind, {})
            lines.setdefault(entry["name"], []).append((int(number), 100 * entry["acc"]))
    figure, panels = plt.subplots(
        1, len(parts), figsize=(2.6 + 3.2 * len(parts), 3.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    colours = dict(zip(IN_WORDS, COLOURS, strict=False))
    for axes, (kind, lines) in zip(panels[0], parts.items(), strict=True):
        axes.axhline(100 * found["own"]["acc"], color=NOTE, linewidth=1, linestyle=(0, (4, 3)))
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), color=colours[name], marker="o", markersize=4,
                      linewidth=1.8, label=IN_WORDS[name])  # fmt: skip
        numbers = sorted({number for points in lines.values() for number, _ in points})
        axes.set(ylim=(-3, 103), xticks=numbers, xlabel="j")
        axes.set_title(f"replaced: {labels[kind]}", loc="left", color=INK, fontsize=10)
    panels[0, 0].set_ylabel("accuracy (%), dashed: its own thoughts")
    handles = {
        label: h
        for axes in panels[0]
        for h, label in [*zip(*axes.get_legend_handles_labels(), strict=True)]
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", fontsize=9, frameon=False
    )
    _tidy(panels[0])
    return figure


def _tidy(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=NOTE, labelcolor=INK)
