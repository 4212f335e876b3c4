"""Pictures over the runs of a study. One colour for each arm, on white, readable in print."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from analysis.learning_curve import BANDS, INK, NOTE, stage_spans
from analysis.results import RunResult
from analysis.statistics import summarize

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999933")

# More in one row would be too small to read.
MAX_ARMS_PER_ROW = 8


def arm_colours(arms: Mapping[str, object]) -> dict[str, str]:
    """A colour for each arm, the same in every picture with the same arms."""
    return {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms)}


def draw_study_curves(
    runs: Mapping[str, Mapping[str, Mapping[int, RunResult]]], path: Path
) -> None:
    """Accuracy by epoch into a PNG: a panel for each condition, a thin line for each seed.

    runs: condition -> arm -> seed -> run.
    """
    colours = arm_colours({arm: None for arms in runs.values() for arm in arms})
    figure, panels = plt.subplots(
        len(runs), 1, figsize=(9, 3.4 * len(runs)), dpi=130, squeeze=False, layout="constrained"
    )
    for axes, (condition, arms) in zip(panels[:, 0], runs.items(), strict=True):
        _draw_condition(axes, condition, arms, colours)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def draw_last_stage(runs: Mapping[str, Mapping[str, Mapping[int, RunResult]]], path: Path) -> None:
    """Accuracy after the last stage into a PNG: a dot for each run, a seed's joined by a line.

    Each arm's mean is drawn beside its dots, with its 95 % interval.

    runs: condition -> arm -> seed -> run.
    """
    colours = arm_colours({arm: None for arms in runs.values() for arm in arms})
    rows = _fill_rows(runs, MAX_ARMS_PER_ROW)
    num_columns = max(sum(len(runs[condition]) for condition in row) for row in rows)
    figure = plt.figure(
        figsize=(1.8 + 1.1 * num_columns, 3.8 * len(rows)), dpi=130, layout="constrained"
    )
    grid = figure.add_gridspec(len(rows), num_columns)
    for number, row in enumerate(rows):
        column = 0
        for condition in row:
            arms = runs[condition]
            axes = figure.add_subplot(grid[number, column : column + len(arms)])
            _draw_last_accuracies(axes, arms, colours)
            if condition != "all":
                axes.set_title(condition, loc="left", color=INK, fontsize=11)
            if column == 0:
                axes.set_ylabel("accuracy after the last stage (%)")
            column += len(arms)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _fill_rows(runs: Mapping[str, Mapping], limit: int) -> list[list[str]]:
    """The conditions in order, split into rows of at most `limit` arms.

    A wider condition gets its own row.
    """
    rows, num_arms = [], 0
    for condition, arms in runs.items():
        if not rows or num_arms + len(arms) > limit:
            rows.append([])
            num_arms = 0
        rows[-1].append(condition)
        num_arms += len(arms)
    return rows


def _draw_last_accuracies(
    axes: Axes, arms: Mapping[str, Mapping[int, RunResult]], colours: dict
) -> None:
    for seed in sorted({seed for by_seed in arms.values() for seed in by_seed}):
        points = [
            (column, 100 * by_seed[seed].last.acc)
            for column, by_seed in enumerate(arms.values())
            if seed in by_seed
        ]
        axes.plot(*zip(*points, strict=True), color=NOTE, linewidth=0.5, alpha=0.5, zorder=1)
    for column, (arm, by_seed) in enumerate(arms.items()):
        accuracies = [100 * run.last.acc for run in by_seed.values()]
        axes.scatter([column] * len(accuracies), accuracies, color=colours[arm], s=16, alpha=0.7)
        summary = summarize(accuracies)
        low, high = (summary.mean if x is None else x for x in (summary.low, summary.high))
        low, high = max(low, 0), min(high, 100)
        axes.errorbar(
            [column + 0.25], [summary.mean], [[summary.mean - low], [high - summary.mean]],
            fmt="D", color=colours[arm], markersize=5, capsize=3, linewidth=1.8,
        )  # fmt: skip
    labels = [f"{arm}\nn = {len(by_seed)}" for arm, by_seed in arms.items()]
    axes.set_xticks(range(len(arms)), labels, fontsize=9)
    axes.set(ylim=(-3, 103), xlim=(-0.5, len(arms) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_condition(
    axes: Axes, condition: str, arms: Mapping[str, Mapping[int, RunResult]], colours: dict
) -> None:
    for arm, by_seed in arms.items():
        curves = [([e.epoch + 1 for e in r.epochs], [100 * e.acc for e in r.epochs])
                  for r in by_seed.values()]  # fmt: skip
        for epochs, accuracies in curves:
            axes.plot(epochs, accuracies, color=colours[arm], linewidth=0.6, alpha=0.35)
        mean = np.mean([accuracies for _, accuracies in curves], axis=0)
        seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}"
        axes.plot(curves[0][0], mean, color=colours[arm], linewidth=2.2, label=f"{arm} ({seeds})")
    longest = max(
        (run for by_seed in arms.values() for run in by_seed.values()),
        key=lambda run: len({epoch.stage for epoch in run.epochs}),
    )
    lines = [{"eval/stage": e.stage, "eval/epoch": e.epoch} for e in longest.epochs]
    for number, (stage, first, last) in enumerate(stage_spans(lines)):
        axes.axvspan(first, last, color=BANDS[number % 2], zorder=0, linewidth=0)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        text = f"stage {stage}" if number == 0 else str(stage)
        axes.annotate(text, ((first + last) / 2, 1.01), color=NOTE, fontsize=9, **place)
    axes.set(ylim=(-3, 103), ylabel="held-out accuracy (%)", xlabel="epochs")
    if condition != "all":
        axes.set_title(condition, loc="left", color=INK, fontsize=11, pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
