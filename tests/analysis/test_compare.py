"""The comparison of hand-made runs, value by value, and what it refuses."""

import csv
import json
import re

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from scipy import stats
from study_results import make_epoch, make_run

from analysis import compare, plots
from analysis.plots import _fill_rows
from analysis.results import read_result, read_results, write_result

SEEDS = range(7)
ACCURACY = {"m1": [81, 94, 97, 98, 55, 90, 99], "m3": [18, 86, 98, 84, 39, 95, 99]}


@pytest.fixture
def folder(tmp_path):
    for arm, values in ACCURACY.items():
        for seed, value in zip(SEEDS, values, strict=True):
            write_result(tmp_path / "lags", make_run(arm, seed, value / 100))
    return tmp_path / "lags"


def cells(page, arm):
    """The rows of an arm in the tables of summaries, as lists of cells."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith(f"| {arm} ")]
    return [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 13]


def test_a_result_is_read_back_as_it_was_written(tmp_path):
    run = make_run(acc=0.37)
    assert read_result(write_result(tmp_path, run)) == run
    assert run.right().tolist() == [True] * 37 + [False] * 63


def test_the_page_gives_scipys_values(folder, capsys):
    assert compare.main([str(folder)]) == 0
    page = (folder / "README.md").read_text()
    assert capsys.readouterr().out.startswith(page.rstrip())
    m1, m3 = map(np.array, ACCURACY.values())
    row = cells(page, "m3")[0]
    low, _ = stats.t.interval(0.95, 6, loc=m3.mean(), scale=stats.sem(m3))
    assert row[4] == f"{low:.1f} to 100.0"  # cut: the interval itself ends above
    low, high = stats.t.interval(0.95, 6, loc=(m3 - m1).mean(), scale=stats.sem(m3 - m1))
    assert row[1:4] == ["7", f"{m3.mean():.1f}", f"{m3.std(ddof=1):.1f}"]
    assert row[5:7] == [f"{(m3 - m1).mean():+.1f}", f"{low:.1f} to {high:.1f}"]
    assert row[7] == "7 (2, 4)"
    assert row[8] == f"{stats.ttest_rel(m3, m1).pvalue:.3f}"
    assert row[9] == f"{stats.binomtest(2, 6).pvalue:.3f}"


def test_the_pictures_show_every_run(folder, monkeypatch):
    """A dot for each run in one, a thin line for each and a thick one for each arm in the other."""
    shown = {}
    close = plots.plt.close

    def look(figure):
        (axes,) = figure.axes
        dots = [len(x.get_offsets()) for x in axes.collections if isinstance(x, PathCollection)]
        shown[axes.get_ylabel()] = (len(axes.lines), dots)
        close(figure)

    monkeypatch.setattr(plots.plt, "close", look)
    compare.main([str(folder)])
    assert shown["held-out accuracy (%)"][0] == 2 * 7 + 2
    assert shown["accuracy after the last stage (%)"][1] == [7, 7]
    page = (folder / "README.md").read_text()
    for name in re.findall(r"!\[.+?\]\((.+?)\)", page):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_last_stage_and_best_epoch_are_listed_separately(folder):
    compare.main([str(folder)])
    with open(folder / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if (row["arm"], row["seed"]) == ("m3", "0"))
    assert (row["last_stage"], row["last_stage_accuracy"]) == ("2", "0.18")
    assert (row["best_epoch"], row["best_accuracy"]) == ("5", "0.96")


def test_a_stage_that_never_reached_the_threshold_counts_one_more_than_its_epochs():
    assert compare.epochs_to_threshold(make_run(acc=0.5)) == 2 + 3
    assert compare.num_censored(make_run(acc=0.5)) == 1
    assert compare.epochs_to_threshold(make_run(acc=0.99)) == 2 + 2


def test_a_single_seed_gets_no_interval_and_says_so(tmp_path, capsys):
    for arm in ("m1", "m3"):
        write_result(tmp_path, make_run(arm))
    assert compare.main([str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert cells(page, "m3")[0][3:5] == ["one seed", "one seed"]
    assert re.search(r"not testable: m3 \S+ on one seed", page)


def test_few_pairs_are_reported_as_too_few_for_the_sign_test(folder):
    for seed in (5, 6):
        (folder / f"lag2.m3.seed{seed}.json").unlink()
    compare.main([str(folder)])
    assert cells((folder / "README.md").read_text(), "m3")[0][9] == "n < 6: cannot reach 5 %"


def test_differences_end_at_100_points_and_none_is_minus_zero(tmp_path):
    for seed, (m1, m3) in enumerate([(0.1, 0.9), (0.9, 0.1)]):
        write_result(tmp_path, make_run("m1", seed, m1))
        write_result(tmp_path, make_run("m3", seed, m3 - 1e-6))
    compare.main([str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    row = cells(page, "m3")[0]
    assert row[5:7] == ["+0.0", "-100.0 to 100.0"]
    assert row[10] == "over 100"
    assert "where not even a difference of 100 points would be detected" in page


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"commit": "b" * 40}, "differ in commit or machine"),
        ({"machine": "Xeon"}, "--allow-mixed"),
        ({"data": {"val_path": {"sha256": "1", "bytes": 1}}}, "different data"),
        ({"num_records": 99}, "different data (99 and 100 records)"),
        ({"epochs": [make_epoch(4, 1, 0.5)]}, "different lengths"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(folder, capsys, changes, words):
    write_result(folder, make_run("m3", 3, 0.84, **changes))
    assert compare.main([str(folder)]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "README.md").exists()


def test_mixed_commits_are_compared_when_allowed_and_shown(folder):
    write_result(folder, make_run("m3", 3, 0.84, commit="b" * 40))
    assert compare.main([str(folder), "--allow-mixed"]) == 0
    page = (folder / "README.md").read_text()
    assert "- commit aaaaaaa on EPYC" in page and "- commit bbbbbbb on EPYC" in page


def test_an_unknown_baseline_and_a_broken_result_are_one_message(folder, capsys):
    assert compare.main([str(folder), "--baseline", "m2"]) == 2
    assert "no run of arm 'm2'; known: m1, m3" in capsys.readouterr().err
    (folder / "lag2.m1.seed0.json").write_text("{}")
    assert compare.main([str(folder)]) == 2
    assert "is not the result of a run" in capsys.readouterr().err
    with pytest.raises(Exception, match="holds no results"):
        read_results(folder / "nowhere")


def write_predictions(path, right, questions=None):
    rows = [
        {"index": i, "question": questions[i] if questions else f"q{i}", "correct": r}
        for i, r in enumerate(right)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_two_models_get_mcnemars_test_labelled_as_such(tmp_path, capsys):
    first = write_predictions(tmp_path / "a.jsonl", [True] * 8 + [False] * 2)
    second = write_predictions(tmp_path / "b.jsonl", [True] * 3 + [False] * 7)
    assert compare.main([first, second]) == 0
    said = capsys.readouterr().out
    assert f"exact test: p = {stats.binomtest(5, 5).pvalue:.3g}" in said
    assert "compares these two sets of weights" in said


def test_predictions_of_other_questions_are_refused(tmp_path, capsys):
    first = write_predictions(tmp_path / "a.jsonl", [True] * 3)
    second = write_predictions(tmp_path / "b.jsonl", [True] * 4)
    assert compare.main([first, second]) == 2
    assert "answer different questions (3 and 4)" in capsys.readouterr().err


def test_panels_fill_rows_in_order_and_a_wide_one_has_a_row_of_its_own():
    runs = {name: range(arms) for name, arms in {"a": 3, "b": 3, "c": 9, "d": 2, "e": 6}.items()}
    assert _fill_rows(runs, 8) == [["a", "b"], ["c"], ["d", "e"]]
