"""How confident a model is of its answers, and whether it is right as often as it is confident.

Confidence is the probability that the model gave to all it wrote: the product over its tokens, the
end included. A calibrated model is right in a share p of the answers whose confidence is p.
"""

from typing import Any

import numpy as np

from analysis.statistics import area_under_curve, mean_interval
from engine.metrics import wilson_interval

NUM_BINS = 10


def describe_confidence(log_p: np.ndarray, is_correct: np.ndarray) -> dict[str, Any]:
    """log p by right and wrong answers, and the reliability curve.

    log_p: (n,) natural logarithm of the confidence; is_correct: (n,) bool.
    auc: how well confidence tells right from wrong answers; None where all are alike.
    calibration_error: the mean over answers of |accuracy - mean confidence| of their bin.
    """
    confidence = np.exp(log_p)
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    reliability, error = [], 0.0
    for number in np.unique(bins):
        rows = bins == number
        num_rows, num_correct = int(rows.sum()), int(is_correct[rows].sum())
        low, high = wilson_interval(num_correct, num_rows)
        point = {"from": number / NUM_BINS, "to": (number + 1) / NUM_BINS, "n": num_rows}
        point |= {"confidence": float(confidence[rows].mean()), "acc": num_correct / num_rows}
        reliability.append(point | {"low": low, "high": high})
        error += num_rows / len(bins) * abs(point["acc"] - point["confidence"])
    return {
        "right": mean_interval(log_p[is_correct]),
        "wrong": mean_interval(log_p[~is_correct]),
        "auc": area_under_curve(log_p, is_correct),
        "calibration_error": error,
        "reliability": reliability,
    }
