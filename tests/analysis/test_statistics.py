"""Laws of the statistics over seeds, against SciPy's own functions and hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import (
    compare_answers,
    compare_pairs,
    detectable_difference,
    holm,
    summarize,
)
from engine.metrics import wilson_interval

ARM = [97.0, 81.0, 94.0, 98.0, 55.0, 90.0, 99.0]
BASE = [92.0, 84.0, 91.0, 98.0, 39.0, 70.0, 100.0]


def test_the_interval_is_students():
    summary = summarize(ARM)
    low, high = stats.t.interval(0.95, len(ARM) - 1, loc=np.mean(ARM), scale=stats.sem(ARM))
    assert (summary.low, summary.high) == pytest.approx((low, high))
    assert summary.deviation == pytest.approx(np.std(ARM, ddof=1))


def test_a_single_seed_has_no_interval():
    assert summarize([97.0]).low is None
    pair = compare_pairs([97.0], [90.0])
    assert (pair.t_p, pair.detectable, pair.difference.high) == (None, None, None)


def test_paired_tests_are_scipys():
    pair = compare_pairs(ARM, BASE)
    assert pair.t_p == pytest.approx(stats.ttest_rel(ARM, BASE).pvalue)
    assert (pair.num_higher, pair.num_lower) == (4, 2)
    assert pair.sign_p == pytest.approx(stats.binomtest(4, 6).pvalue)
    assert pair.difference.mean == pytest.approx(np.mean(ARM) - np.mean(BASE))


def test_equal_arms_differ_in_nothing():
    pair = compare_pairs(ARM, ARM)
    assert (pair.t_p, pair.sign_p, pair.difference.mean) == (None, None, 0.0)


def test_equal_differences_leave_no_error_to_test_against():
    assert compare_pairs([0.3 + 0.2, 0.1 + 0.2], [0.3, 0.1]).t_p is None


def test_five_pairs_cannot_reach_five_per_cent_in_a_sign_test_and_six_can():
    assert compare_pairs([1.0] * 5, [0.0] * 5).sign_p > 0.05
    assert compare_pairs([1.0] * 6, [0.0] * 6).sign_p < 0.05


@pytest.mark.parametrize("n", [2, 5, 15, 60])
def test_the_detectable_difference_is_found_in_four_of_five_simulated_studies(n):
    generator = np.random.default_rng(0)
    deviation = 3.0
    shift = detectable_difference(n, deviation)
    samples = generator.normal(shift, deviation, size=(20_000, n))
    found = stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03})
    assert adjusted == {"a": 0.03, "b": 0.06, "c": None, "d": 0.06}


@given(st.dictionaries(st.text(), st.floats(0, 1), max_size=6))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    adjusted = holm(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1.0, p * len(p_values)) + 1e-12


def answers(both, only_first, only_second, neither):
    """Two lists of answers with so many records right in both, one and none."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_the_paired_interval_is_newcombes():
    # His table II, method 10: 36, 12, 2 and 0 of 50 pairs.
    second, first = answers(36, 12, 2, 0)
    change = compare_answers(first, second)
    assert change.difference == pytest.approx(0.20)
    assert (change.low, change.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert (change.num_lost, change.num_gained) == (2, 12)
    assert change.p == pytest.approx(stats.binomtest(2, 14).pvalue)


def test_without_correlation_wilsons_intervals_are_joined_by_pythagoras():
    change = compare_answers([True] * 10, [True] * 6 + [False] * 4)
    low, high = wilson_interval(6, 10)
    below = np.hypot(0.6 - low, 0.0)
    above = np.hypot(high - 0.6, 1.0 - wilson_interval(10, 10)[0])
    assert (change.low, change.high) == pytest.approx((-0.4 - below, -0.4 + above))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_comparison_turns_round_with_its_sides(pairs):
    first, second = zip(*pairs, strict=True)
    there, back = compare_answers(first, second), compare_answers(second, first)
    assert there.low - 1e-12 <= there.difference <= there.high + 1e-12
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert (back.num_lost, back.p) == (there.num_gained, there.p)
