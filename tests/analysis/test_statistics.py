"""Laws of the statistics over seeds, against SciPy's own functions and hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import compare_pairs, detectable_difference, holm, summarize

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
