"""Statistics of comparisons: intervals, paired tests, what could have been detected.

Plain numbers in, numbers out; SciPy computes. Methods are compared over seeds, never over the
records of two trained models: McNemar's test (engine/metrics.py) compares two given models, and two
seeds of one method can differ by it as much as two methods do. Two answers of one model to the same
records are compared over the records (`compare_answers`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from engine.metrics import mcnemar, wilson_interval

# With fewer pairs a two-sided sign test cannot reach 5 %, whatever the pairs show.
MIN_PAIRS_FOR_SIGN_TEST = 6
POWER = 0.8
LEVEL = 0.05
ROUNDING = 1e-9


@dataclass(frozen=True)
class Summary:
    """n values with mean, sample deviation and the 95 % interval of the mean.

    deviation, low and high are None for a single value.
    """

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Mean, deviation (n - 1) and Student's 95 % interval of the mean of at least one value."""
    assert len(values) > 0
    mean = float(np.mean(values))
    if len(values) == 1:
        return Summary(1, mean, None, None, None)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Summary(len(values), mean, deviation, mean - half, mean + half)


def mean_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """n, the mean of `values` and low and high, its interval by `summarize`; None without values.

    low and high are None for a single value.
    """
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    summary = summarize(values)
    return {"mean": summary.mean, "low": summary.low, "high": summary.high, "n": summary.n}


def area_under_curve(scores: np.ndarray, is_positive: np.ndarray) -> float | None:
    """The share of pairs (positive, other) in which the positive scores higher, ties as half.

    scores, is_positive: (n,). None without a positive or without another.
    """
    num_positive = int(is_positive.sum())
    num_other = len(is_positive) - num_positive
    if num_positive == 0 or num_other == 0:
        return None
    rank_sum = stats.rankdata(scores)[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(rank_sum / (num_positive * num_other))


@dataclass(frozen=True)
class Paired:
    """Differences between two arms over the seeds they share.

    difference: of the mean, with interval. num_higher, num_lower: seeds by sign; ties are the rest.
    t_p, sign_p: two-sided p-values, None where they cannot be computed. detectable: the smallest
    true difference that n such pairs show at 5 % with 80 % power, None for fewer than two pairs.
    """

    difference: Summary
    num_higher: int
    num_lower: int
    t_p: float | None
    sign_p: float | None
    detectable: float | None


def compare_pairs(arm: Sequence[float], baseline: Sequence[float]) -> Paired:
    """The paired comparison `arm` - `baseline`; element i of both belongs to the same seed."""
    assert len(arm) == len(baseline) > 0
    differences = np.asarray(arm, dtype=float) - np.asarray(baseline, dtype=float)
    summary = summarize(differences)
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    t_p = detectable = None
    if summary.n > 1:
        # Equal differences, such as one record more on each of two seeds, leave no error to test
        # against; rounding must not make them look certain.
        if summary.deviation > ROUNDING * np.abs([*arm, *baseline]).max():
            t_p = float(stats.ttest_rel(arm, baseline).pvalue)
        detectable = detectable_difference(summary.n, summary.deviation)
    sign_p = float(stats.binomtest(higher, higher + lower).pvalue) if higher + lower else None
    return Paired(summary, higher, lower, t_p, sign_p, detectable)


def detectable_difference(n: int, deviation: float) -> float:
    """The smallest true mean difference that a paired t test at 5 % shows with 80 % power.

    n: pairs, at least 2; deviation: of the differences, in the unit of the result.
    """
    assert n >= 2
    degrees = n - 1
    critical = stats.t.ppf(1 - LEVEL / 2, degrees)

    def missing_power(noncentrality: float) -> float:
        shown = stats.nct.sf(critical, degrees, noncentrality)
        # Far in the tail SciPy gives nan for what is 0.
        shown += np.nan_to_num(stats.nct.cdf(-critical, degrees, noncentrality))
        return shown - POWER

    # With two pairs the critical value is 12.7, so the root is below 40.
    root = optimize.brentq(missing_power, 0.0, 60.0)
    return float(root) * deviation / math.sqrt(n)


@dataclass(frozen=True)
class AnswerChange:
    """How the answers to the same records changed, from right to wrong and back.

    difference: of the shares that are right, with its 95 % interval low to high.
    p: of McNemar's exact test, two-sided. num_lost, num_gained: records that became wrong, right.
    """

    difference: float
    low: float
    high: float
    p: float
    num_lost: int
    num_gained: int


def compare_answers(before: Sequence[bool], after: Sequence[bool]) -> AnswerChange:
    """The paired comparison `after` - `before`; element i of both belongs to record i.

    The interval is Newcombe's: Wilson's intervals of the two shares, joined by their correlation.
    Source: R. G. Newcombe, Statistics in Medicine 17, 2635, 1998, method 10.
    """
    assert len(before) == len(after) > 0
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    n, num_first, num_second = len(first), int(first.sum()), int(second.sum())
    p_1, p_2 = num_first / n, num_second / n
    (low_1, high_1), (low_2, high_2) = (wilson_interval(k, n) for k in (num_first, num_second))
    phi = _phi(first, second)

    def half(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return AnswerChange(
        difference=p_2 - p_1,
        low=p_2 - p_1 - half(p_2 - low_2, high_1 - p_1),
        high=p_2 - p_1 + half(high_2 - p_2, p_1 - low_1),
        p=mcnemar(first.tolist(), second.tolist()),
        num_lost=int((first & ~second).sum()),
        num_gained=int((~first & second).sum()),
    )


def _phi(first: np.ndarray, second: np.ndarray) -> float:
    """Newcombe's correlation of two answers, corrected for continuity; 0 where one is constant."""
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    margins = math.prod(int(v.sum()) * int((~v).sum()) for v in (first, second))
    product = both * neither - only_first * only_second
    if product > 0:
        product = max(product - len(first) / 2, 0)
    return product / math.sqrt(margins) if margins else 0.0


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p-values of one family; None stays None and does not count.

    Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = largest
    return adjusted
