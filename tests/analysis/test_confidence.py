"""Confidence by right and wrong answers, and the reliability curve, by hand."""

import numpy as np
import pytest

from analysis.confidence import describe_confidence
from engine.metrics import wilson_interval


def test_the_reliability_curve_counts_answers_by_confidence():
    confidence = np.array([0.05, 0.15, 0.15, 0.92, 0.98, 1.0])
    is_correct = np.array([False, True, False, True, False, True])
    found = describe_confidence(np.log(confidence), is_correct)
    assert [(p["from"], p["n"], p["acc"]) for p in found["reliability"]] == [
        (0.0, 1, 0.0), (0.1, 2, 0.5), (0.9, 3, pytest.approx(2 / 3)),
    ]  # fmt: skip
    last = found["reliability"][-1]
    assert last["confidence"] == pytest.approx((0.92 + 0.98 + 1.0) / 3)
    assert (last["low"], last["high"]) == wilson_interval(2, 3)
    distances = [0.05, 0.35, abs(2 / 3 - last["confidence"])]
    assert found["calibration_error"] == pytest.approx(np.dot([1, 2, 3], distances) / 6)
    assert found["right"]["mean"] == pytest.approx(np.log([0.15, 0.92, 1.0]).mean())
    assert (found["right"]["n"], found["wrong"]["n"]) == (3, 3)
    # Of the nine pairs the right answer is surer in 6; one pair ties.
    assert found["auc"] == pytest.approx(6.5 / 9)


def test_a_model_that_is_always_right_has_no_wrong_answers():
    found = describe_confidence(np.log(np.full(4, 0.9)), np.ones(4, dtype=bool))
    assert found["wrong"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert found["auc"] is None
    assert found["calibration_error"] == pytest.approx(0.1)
