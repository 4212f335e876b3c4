"""Draw the learning curve of one run, or of consecutive runs, from metrics.jsonl.

`python -m analysis.learning_curve RUN_DIR [RUN_DIR ...] --out PNG [--chance 0.1]`: loss above,
held-out accuracy with its interval below, over epochs; the stages are shaded. Consecutive runs
(CoT, then Coconut with `resume`) share one axis: each starts where the previous one ended, whatever
its own first epoch. Reads what engine/tracking.py writes (docs/specification.md, sections 8 and 10)
and computes no figures of its own.
"""

import argparse
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.results import read_metrics
from utils import UserError

TRAIN, HELD_OUT, INK, NOTE = "#e69f00", "#0072b2", "#222222", "#5b616b"
BANDS = ("#f1f2f4", "#ffffff")


@dataclass(frozen=True)
class Curve:
    """What a run logged.

    steps: (epochs done, including the fraction of the current one; training loss) per optimizer
        step.
    evaluations: the lines of metrics.jsonl that hold an evaluation, in order.
    """

    steps: list[tuple[float, float]]
    evaluations: list[dict]


def read_curve(run_dir: Path) -> Curve:
    """The curve of the run in `run_dir`.

    Raises: UserError if metrics.jsonl is missing, unreadable or without an evaluation.
    """
    path = Path(run_dir) / "metrics.jsonl"
    entries = read_metrics(Path(run_dir))
    evaluations = [entry for entry in entries if "eval/epoch" in entry]
    if not evaluations:
        raise UserError(f"{path}: no evaluation yet; let the run finish an epoch")
    logged = [entry for entry in entries if entry.get("train/loss") is not None]
    if not logged or "train/epochs_done" not in logged[0]:
        raise UserError(
            f"{path}: no training losses with train/epochs_done; name the folder of a training run"
            " of this version"
        )
    return Curve([(line["train/epochs_done"], line["train/loss"]) for line in logged], evaluations)


def concatenate(curves: list[Curve]) -> list[Curve]:
    """The curves, with each but the first moved to the epoch where the previous one ends."""
    moved, end = [], curves[0].evaluations[0]["eval/epoch"]
    for curve in curves:
        shift = end - curve.evaluations[0]["eval/epoch"]
        steps = [(epoch + shift, loss) for epoch, loss in curve.steps]
        lines = [line | {"eval/epoch": line["eval/epoch"] + shift} for line in curve.evaluations]
        moved.append(Curve(steps, lines))
        end = lines[-1]["eval/epoch"] + 1
    return moved


def stage_spans(evaluations: list[dict]) -> list[tuple[int, float, float]]:
    """(stage, first epoch, epoch after the last) for each group of consecutive equal stages."""
    spans = []
    for stage, lines in groupby(evaluations, key=lambda line: line["eval/stage"]):
        epochs = [line["eval/epoch"] for line in lines]
        spans.append((stage, epochs[0], epochs[-1] + 1))
    return spans


def draw_learning_curve(
    curves: list[Curve],
    chance: float | None = None,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """The figure of consecutive runs.

    chance: accuracy of guessing, 0 to 1, drawn as a horizontal line.
    reference: label and accuracy (0 to 1) of another run, drawn as a horizontal line.
    """
    curves = concatenate(curves)
    steps = [point for curve in curves for point in curve.steps]
    evaluations = [line for curve in curves for line in curve.evaluations]
    # An evaluation follows its epoch, so it is drawn at the end of the epoch.
    ends = [line["eval/epoch"] + 1 for line in evaluations]
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.6), dpi=150, height_ratios=(2, 3), layout="constrained"
    )
    top.plot(*zip(*steps, strict=True), color=TRAIN, linewidth=0.8, label="training")
    losses = [line["eval/loss"] for line in evaluations]
    top.plot(ends, losses, color=HELD_OUT, marker="o", markersize=4, label="held out")
    top.set(yscale="log", ylabel="loss per token")
    top.legend(loc="upper right", ncols=2, fontsize=9)
    low, high, accuracy = (
        [100 * line[name] for line in evaluations]
        for name in ("eval/acc_low", "eval/acc_high", "eval/acc")
    )
    bottom.fill_between(ends, low, high, color=HELD_OUT, alpha=0.2, linewidth=0)
    bottom.plot(ends, accuracy, color=HELD_OUT, marker="o", markersize=4)
    bottom.set(ylabel="held-out accuracy (%)", ylim=(-3, 103), xlabel="epochs")
    begin = min(line["eval/epoch"] for line in evaluations)
    # The last epoch may be unfinished.
    end = max(ends + [epochs_done for epochs_done, _ in steps])
    bottom.set(xlim=(begin, end), xticks=range(int(begin), int(end) + 1))
    levels = [("chance", chance)] if chance is not None else []
    levels = sorted(levels + ([reference] if reference else []), key=lambda each: -each[1])
    for number, (label, level) in enumerate(levels):
        # The upper label goes above its line, the lower one below: the lines may be close.
        _draw_level(bottom, label, level, below=number > 0)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        for number, (stage, first, last) in enumerate(stage_spans(evaluations)):
            axes.axvspan(first, last, color=BANDS[number % 2], zorder=0, linewidth=0)
            if axes is top:
                middle = (first + last) / 2
                place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
                axes.annotate(f"stage {stage}", (middle, 1.02), color=INK, fontsize=10, **place)
    return figure


def _draw_level(axes: Axes, label: str, level: float, below: bool) -> None:
    axes.axhline(100 * level, color=NOTE, linewidth=1.2, linestyle="--", zorder=1)
    axes.annotate(
        f"{label} {100 * level:.0f} %",
        (0.99, 100 * level + (-1.5 if below else 1.5)),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top" if below else "bottom",
        color=NOTE,
        fontsize=9,
    )


def save_learning_curve(
    run_dirs: list[Path],
    out: Path,
    chance: float | None = None,
    reference: tuple[str, float] | None = None,
) -> None:
    """Draw consecutive runs into the PNG `out`."""
    figure = draw_learning_curve([read_curve(run) for run in run_dirs], chance, reference)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--chance", type=float, help="accuracy of guessing, 0 to 1")
    options = parser.parse_args(argv)
    try:
        save_learning_curve(options.run_dirs, options.out, options.chance)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
