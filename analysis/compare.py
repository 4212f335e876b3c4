"""Compare the arms of a study over seeds, or two given models over records.

    python -m analysis.compare results/STUDY [--baseline m1] [--out FOLDER]
    python -m analysis.compare RUN_A RUN_B [--data FILE]
    python -m analysis.compare predictions_a.jsonl predictions_b.jsonl [--data FILE]

A study: a Markdown page, a CSV table of all runs and learning curves, from its result files alone.
Differences are paired by seed; p-values are adjusted by Holm's method over the arms within one
outcome and one condition. "Last stage" is the stage of the last epoch trained; the best epoch of
any stage is listed separately. Two models: McNemar's test over records, which compares these
weights, not the methods that made them. With `--data`, a file with graphs, accuracy is also split
by the shortcuts of ProsQA (preprocessing/graphs.py).
"""

import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from analysis.plots import draw_last_stage, draw_study_curves
from analysis.results import RunResult, read_predictions, read_results
from analysis.shortcuts import shortcut_table
from analysis.statistics import (
    MIN_PAIRS_FOR_SIGN_TEST,
    Paired,
    Summary,
    compare_pairs,
    holm,
    summarize,
)
from analysis.tables import markdown_table
from engine.metrics import mcnemar, wilson_interval
from utils import ReportedError, UserError, atomic_write_text, configure_logging, log

DEFAULT_BASELINE = "m1"


CURVES, LAST_STAGE = "learning_curves.png", "last_stage.png"


@dataclass(frozen=True)
class Outcome:
    """A figure of each run that a study fixed before its first run.

    name: its heading; unit: of its values; get: a run's value, None where it has none.
    digits: decimals shown.
    """

    name: str
    unit: str
    get: object
    digits: int = 1


def last_stage_accuracy(run: RunResult) -> float:
    """Accuracy after the last epoch trained, in per cent."""
    return 100 * run.outcomes["last_stage_accuracy"]


def epochs_to_threshold(run: RunResult) -> float | None:
    """Epochs until each stage first reached the threshold, added up over the stages.

    A stage that never did counts one more than its epochs: the sum is then a lower bound.
    """
    counts = _stage_lengths(run)
    reached = run.outcomes["epochs_to_threshold"]
    return float(
        sum(counts[stage] + 1 if n is None else n for stage, n in _by_stage(reached).items())
    )


def num_censored(run: RunResult) -> int:
    """How many stages never reached the threshold."""
    return sum(n is None for n in run.outcomes["epochs_to_threshold"].values())


def zeroed_accuracy(run: RunResult) -> float | None:
    """Accuracy with every thought replaced by zeros, in per cent; None without thoughts."""
    value = run.outcomes.get("accuracy_zeroed_thoughts")
    return None if value is None else 100 * value


OUTCOMES = (
    Outcome("accuracy after the last stage", "%", last_stage_accuracy),
    Outcome("epochs to the threshold, stages together", "epochs", epochs_to_threshold),
    Outcome("accuracy with thoughts zeroed", "%", zeroed_accuracy),
)


def _by_stage(values: dict) -> dict[int, object]:
    return {int(stage): value for stage, value in values.items()}


def _stage_lengths(run: RunResult) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for epoch in run.epochs:
        lengths[epoch.stage] = lengths.get(epoch.stage, 0) + 1
    return lengths


class Comparison:
    """The runs of a study, checked and grouped.

    runs: condition -> arm -> seed -> run, in the order of the study's plan.

    Raises: UserError for runs that cannot be compared.
    """

    def __init__(self, runs: Sequence[RunResult], baseline: str, allow_mixed: bool = False):
        self.baseline = baseline
        self.runs: dict[str, dict[str, dict[int, RunResult]]] = {}
        for run in runs:
            self.runs.setdefault(run.condition, {}).setdefault(run.arm, {})[run.seed] = run
        if all(baseline not in arms for arms in self.runs.values()):
            known = sorted({run.arm for run in runs})
            raise UserError(f"--baseline: no run of arm {baseline!r}; known: {', '.join(known)}")
        for condition, arms in self.runs.items():
            if baseline in arms:
                self.runs[condition] = arms = {baseline: arms[baseline]} | arms
            self._check_lengths(condition, arms)
            for arm in arms:
                self._check_pairs(condition, arm, allow_mixed)

    def _check_lengths(self, condition: str, arms: dict[str, dict[int, RunResult]]) -> None:
        for arm, by_seed in arms.items():
            lengths = {(len(run.epochs), run.last.step) for run in by_seed.values()}
            if len(lengths) > 1:
                raise UserError(
                    f"{condition} {arm}: runs of different lengths ({sorted(lengths)} epochs and"
                    " steps) cannot be compared; remove the results of one"
                )

    def _check_pairs(self, condition: str, arm: str, allow_mixed: bool) -> None:
        for seed, run, base in self.pairs(condition, arm):
            where = f"{condition} seed {seed}: {arm} and {self.baseline}"
            if run.data["val_path"] != base.data["val_path"] or run.num_records != base.num_records:
                raise UserError(
                    f"{where} were evaluated on different data ({run.num_records} and"
                    f" {base.num_records} records); run the seed again"
                )
            if not allow_mixed and (run.commit, run.machine) != (base.commit, base.machine):
                raise UserError(
                    f"{where} differ in commit or machine ({run.commit[:7]} on {run.machine},"
                    f" {base.commit[:7]} on {base.machine}); run the seed again, or pass"
                    " --allow-mixed to compare them all the same"
                )

    def pairs(self, condition: str, arm: str) -> list[tuple[int, RunResult, RunResult]]:
        """(seed, run, baseline's run) for the seeds that both arms have."""
        arms = self.runs[condition]
        if arm == self.baseline or self.baseline not in arms:
            return []
        mine, base = arms[arm], arms[self.baseline]
        return [(seed, mine[seed], base[seed]) for seed in sorted(mine.keys() & base.keys())]

    def paired(self, condition: str, outcome: Outcome) -> dict[str, Paired]:
        """Arm -> its paired comparison with the baseline, where both have the outcome."""
        compared = {}
        for arm in self.runs[condition]:
            pairs = self.pairs(condition, arm)
            if outcome.get is epochs_to_threshold:
                pairs = [p for p in pairs if _stage_lengths(p[1]) == _stage_lengths(p[2])]
            values = [(outcome.get(run), outcome.get(base)) for _, run, base in pairs]
            values = [pair for pair in values if None not in pair]
            if values:
                compared[arm] = compare_pairs(*zip(*values, strict=True))
        return compared


def runs_table(comparison: Comparison, condition: str) -> list[str]:
    """Every run of a condition, a row for each arm and seed."""
    rows = [("arm", "seed", "last stage", "best epoch", "epochs to threshold by stage", "zeroed")]
    for arm, by_seed in comparison.runs[condition].items():
        for seed, run in sorted(by_seed.items()):
            reached = _by_stage(run.outcomes["epochs_to_threshold"])
            epochs = " ".join("-" if n is None else str(n) for n in reached.values())
            best = f"{100 * run.best.acc:.1f} % (epoch {run.best.epoch}, stage {run.best.stage})"
            last = f"{100 * run.last.acc:.1f} % (stage {run.last.stage})"
            zeroed = zeroed_accuracy(run)
            zeroed = "" if zeroed is None else f"{zeroed:.1f} %"
            rows.append((arm, str(seed), last, best, epochs, zeroed))
    return markdown_table(rows)


def summary_table(comparison: Comparison, condition: str, outcome: Outcome) -> list[str]:
    """Mean and deviation over seeds of each arm, and its paired difference from the baseline."""
    paired = comparison.paired(condition, outcome)
    t_p = holm({arm: pair.t_p for arm, pair in paired.items()})
    sign_p = holm({arm: pair.sign_p for arm, pair in paired.items()})
    head = ("arm", "n", "mean", "deviation", "95 % interval")
    head += (f"minus {comparison.baseline}", "95 % interval", "pairs (higher, lower)")
    head += ("t test, Holm", "sign test, Holm", "detectable at 80 %")
    rows = [head]
    for arm, by_seed in comparison.runs[condition].items():
        values = [outcome.get(run) for run in by_seed.values()]
        values = [value for value in values if value is not None]
        if not values:
            continue
        s = summarize(values)
        possible = (0.0, 100.0) if outcome.unit == "%" else (-inf, inf)
        shown = _show(s.mean, outcome), _show(s.deviation, outcome)
        cells = (arm, str(s.n), *shown, _interval(s, possible))
        if arm in paired:
            cells += _pair_cells(paired[arm], t_p[arm], sign_p[arm], outcome)
        rows.append(cells + ("",) * (len(head) - len(cells)))
    return markdown_table(rows)


def _pair_cells(
    pair: Paired, t_p: float | None, sign_p: float | None, outcome: Outcome
) -> tuple[str, ...]:
    d = pair.difference
    sign = _show_p(sign_p)
    if d.n < MIN_PAIRS_FOR_SIGN_TEST:
        sign = f"n < {MIN_PAIRS_FOR_SIGN_TEST}: cannot reach 5 %"
    return (
        f"{d.mean:+z.{outcome.digits}f}",
        _interval(d, _possible_differences(outcome)),
        f"{d.n} ({pair.num_higher}, {pair.num_lower})",
        _show_p(t_p),
        sign,
        "one seed" if pair.detectable is None else _show_detectable(pair.detectable, outcome),
    )


def _show(value: float | None, outcome: Outcome) -> str:
    return "one seed" if value is None else f"{value:z.{outcome.digits}f}"


def _possible_differences(outcome: Outcome) -> tuple[float, float]:
    return (-100, 100) if outcome.unit == "%" else (-inf, inf)


def _show_detectable(difference: float, outcome: Outcome) -> str:
    """The smallest difference that would be detected, unless no pair could differ so much."""
    largest = _possible_differences(outcome)[1]
    return f"over {largest}" if difference > largest else f"{difference:.{outcome.digits}f}"


def _show_p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(summary: Summary, possible: tuple[float, float] = (-inf, inf)) -> str:
    """The interval, as far as values are `possible`."""
    if summary.low is None:
        return "one seed"
    return f"{max(summary.low, possible[0]):z.1f} to {min(summary.high, possible[1]):z.1f}"


def describe_comparison(comparison: Comparison) -> str:
    """What the data support in words: a Markdown list, an item for each condition and outcome."""
    items = []
    for condition in comparison.runs:
        for outcome in OUTCOMES:
            paired = comparison.paired(condition, outcome)
            if paired:
                where = "" if condition == "all" else f"{condition}, "
                items.append(
                    f"- **{where}{outcome.name}**: {_in_words(comparison, outcome, paired)}"
                )
    return "\n".join(items) or "No arm shares a seed with the baseline."


def _in_words(comparison: Comparison, outcome: Outcome, paired: dict[str, Paired]) -> str:
    """Which arms differ from the baseline at 5 %, which do not, and which cannot be tested."""
    unit = "points" if outcome.unit == "%" else outcome.unit
    adjusted = holm({arm: pair.t_p for arm, pair in paired.items()})
    differ, same, untested, detectable = [], [], [], []
    for arm, pair in paired.items():
        d, p = pair.difference, adjusted[arm]
        shown = f"{arm} {d.mean:+z.1f}"
        if d.n == 1 or pair.t_p is None:
            untested.append(f"{shown} on {'one seed' if d.n == 1 else f'each of {d.n} seeds'}")
            continue
        low, high = _possible_differences(outcome)
        shown = f"{shown} ({max(d.low, low):+z.1f} to {min(d.high, high):+z.1f}"
        if p < 0.05:
            differ.append(f"{shown}, p {_describe_p(p)})")
        else:
            same.append(f"{shown})")
            detectable.append(pair.detectable)
    parts = []
    if differ:
        parts.append(f"a difference at 5 % for {', '.join(differ)}")
    if same:
        detected = _detected(detectable, unit, outcome)
        parts.append(
            f"no difference shown for {', '.join(same)}, where {detected} would be detected with"
            " 80 % power"
        )
    if untested:
        parts.append(f"not testable: {', '.join(untested)}")
    return f"difference from {comparison.baseline} in {unit}: {'; '.join(parts)}."


def _detected(differences: list[float], unit: str, outcome: Outcome) -> str:
    """Which differences would be detected, of those that are possible."""
    largest = _possible_differences(outcome)[1]
    ends = dict.fromkeys(f"{x:.1f}" for x in sorted(differences) if x <= largest)
    if not ends:
        return f"not even a difference of {largest} {unit}"
    first, *rest = ends
    span = f"a difference of {' to '.join([first, *rest[-1:]])} {unit}"
    some = ", for some arms not even the largest possible," if max(differences) > largest else ""
    return span + some


def _describe_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def study_page(comparison: Comparison, name: str, data: Path | None) -> str:
    """The Markdown page of a study, beside its pictures."""
    runs = [run for arms in comparison.runs.values() for s in arms.values() for run in s.values()]
    origins = sorted({(run.commit[:7], run.machine) for run in runs})
    lines = [f"# {name}", "", f"Rebuilt by `python -m analysis.compare results/{name}` from the"]
    lines += [f"{len(runs)} result files beside this page; all p-values are of paired tests over"]
    lines += [
        "seeds, adjusted by Holm's method over the arms of one outcome and condition. Intervals"
    ]
    lines += ["are Student's, those of an accuracy cut at 0 and 100 %.", ""]
    lines += [f"- commit {commit} on {machine}" for commit, machine in origins]
    lines += [
        "",
        f"![Accuracy by epoch; a thin line for each seed, their mean thick]({CURVES})",
        "",
        f"![Accuracy after the last stage: a dot for each run, a line for each seed]({LAST_STAGE})",
        "",
    ]
    lines += ["## What the data support", "", describe_comparison(comparison), ""]
    for condition in comparison.runs:
        lines += [f"## {condition}" if condition != "all" else "## Arms", ""]
        for outcome in OUTCOMES:
            table = summary_table(comparison, condition, outcome)
            if len(table) > 2:
                lines += [f"### {outcome.name} ({outcome.unit})", "", *table, ""]
        censored = sum(
            num_censored(run) for s in comparison.runs[condition].values() for run in s.values()
        )
        lines += [f"Stages that never reached the threshold, all runs together: {censored}.", ""]
        lines += ["### Every run", "", *runs_table(comparison, condition), ""]
        if data is not None:
            for arm, by_seed in comparison.runs[condition].items():
                right = [run.right() for _, run in sorted(by_seed.items())]
                lines += [f"### {arm}, by shortcut", "", *shortcut_table(data, right), ""]
    return "\n".join(lines).rstrip() + "\n"


def runs_csv(comparison: Comparison) -> str:
    """All runs as CSV, a row each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["condition", "arm", "seed", "last_stage", "last_stage_accuracy", "best_epoch"]
    head += ["best_accuracy", "epochs_to_threshold", "num_censored", "accuracy_zeroed_thoughts"]
    writer.writerow([*head, "seconds", "commit", "machine"])
    for condition, arms in comparison.runs.items():
        for arm, by_seed in arms.items():
            for seed, run in sorted(by_seed.items()):
                zeroed = run.outcomes.get("accuracy_zeroed_thoughts", "")
                writer.writerow(
                    [condition, arm, seed, run.last.stage, run.last.acc, run.best.epoch]
                    + [run.best.acc, epochs_to_threshold(run), num_censored(run), zeroed]
                    + [run.seconds, run.commit, run.machine]
                )
    return out.getvalue()


def compare_study(
    folder: Path, baseline: str, out: Path, allow_mixed: bool, data: Path | None
) -> None:
    """Write a study's page with its pictures, and runs.csv, into `out`."""
    runs = read_results(folder)
    arms = [run for run in runs if not run.is_prerequisite]
    comparison = Comparison(arms, baseline, allow_mixed)
    out.mkdir(parents=True, exist_ok=True)
    draw_study_curves(comparison.runs, out / CURVES)
    draw_last_stage(comparison.runs, out / LAST_STAGE)
    atomic_write_text(out / "runs.csv", runs_csv(comparison))
    page = study_page(comparison, folder.name, data)
    atomic_write_text(out / "README.md", page)
    log.info(page)
    names = ("README.md", "runs.csv", CURVES, LAST_STAGE)
    log.info(f"written: {', '.join(str(out / name) for name in names)}")


def compare_models(first: Path, second: Path, data: Path | None) -> str:
    """Two given models on the same records, as text.

    Raises: UserError for predictions of different records.
    """
    rows = [read_predictions(_predictions(path)) for path in (first, second)]
    questions = [[row["question"] for row in one] for one in rows]
    if questions[0] != questions[1]:
        raise UserError(
            f"{first} and {second} answer different questions ({len(rows[0])} and {len(rows[1])});"
            " evaluate both on the same file"
        )
    right = [[row["correct"] for row in one] for one in rows]
    table = [("model", "right", "accuracy", "95 % interval")]
    for path, values in zip((first, second), right, strict=True):
        low, high = wilson_interval(sum(values), len(values))
        share = f"{100 * sum(values) / len(values):.1f} %"
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        table.append((str(path), f"{sum(values)} of {len(values)}", share, interval))
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in (right, right[::-1])]
    lines = markdown_table(table)
    lines += ["", f"Right in the first alone: {only[0]}; in the second alone: {only[1]}. McNemar's"]
    lines += [f"exact test: p = {mcnemar(*right):.3g}. It compares these two sets of weights; two"]
    lines += ["seeds of one method can differ as much, so methods are compared over seeds."]
    if data is not None:
        for path, values in zip((first, second), right, strict=True):
            lines += ["", f"{path}, by shortcut:", "", *shortcut_table(data, [values])]
    return "\n".join(lines)


def _predictions(path: Path) -> Path:
    """The predictions file itself, or that of the last epoch in the folder of a run."""
    if not path.is_dir():
        return path
    numbered = [
        (int(file.stem.removeprefix("predictions_")), file)
        for file in path.glob("predictions_*.jsonl")
        if file.stem.removeprefix("predictions_").isdecimal()
    ]
    if not numbered:
        raise UserError(f"{path}: holds neither results of a study nor predictions of a run")
    return max(numbered)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", type=Path, nargs="+", help="results/STUDY, or two runs or files")
    parser.add_argument("--baseline", default=DEFAULT_BASELINE, help="arm (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the page (default: results/STUDY)")
    parser.add_argument("--data", type=Path, help="the records' file, for graph fields")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="pair runs of different commits or machines"
    )
    options = parser.parse_args(argv)
    configure_logging()
    try:
        if len(options.paths) == 1:
            (folder,) = options.paths
            out = options.out or folder
            compare_study(folder, options.baseline, out, options.allow_mixed, options.data)
        elif len(options.paths) == 2:
            log.info(compare_models(*options.paths, options.data))
        else:
            raise UserError("name one folder of a study's results, or two runs or two files")
        return 0
    except ReportedError as error:
        log.error(error)
        return error.exit_status


if __name__ == "__main__":
    raise SystemExit(main())
