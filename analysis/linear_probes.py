"""Linear probes of thoughts, with the controls without which their accuracy means little.

A probe predicts the label of a step from a thought by ridge regression on one-hot labels,

    min |Y - 1 b - X W|^2 + D |W|^2        X (n, D) standardised, Y (n, C) one-hot

and answers with the largest output, on records of folds that its weights were not fitted on. The
predictions of all folds are a matrix times Y (`fold_predictor`), so that nothing is fitted twice
and shuffled labels cost one product. The controls: the best accuracy of the same thoughts for any
other step, the share of the largest class, and the p-value of the accuracy among those for shuffled
labels.
Source: Hewitt and Liang 2019, arXiv 1909.03368, for controls by other labels; leaving out by blocks
follows from the normal equations as for single rows (Allen 1974, PRESS).
"""

from collections.abc import Sequence

import numpy as np

NUM_FOLDS = 5
NUM_PERMUTATIONS = 199


def fold_predictor(features: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """M (n, n): M @ Y are the predictions for each record by a fit to the records of other folds.

    features: (n, D) float; folds: (n,) integers.
    """
    num_records, width = features.shape
    centred = features - features.mean(0)
    deviation = centred.std(0)
    varies = deviation > 1e-9 * max(1.0, float(np.abs(features).max()))
    x = centred[:, varies] / deviation[varies]
    # The ridge's hat matrix, by the smaller of its two forms; the intercept has no penalty.
    if x.shape[1] <= num_records:
        hat = x @ np.linalg.solve(x.T @ x + width * np.eye(x.shape[1]), x.T)
    else:
        gram = x @ x.T
        hat = np.linalg.solve(gram + width * np.eye(num_records), gram)
    hat += 1 / num_records
    predictor = np.eye(num_records)
    for fold in np.unique(folds):
        left_out = np.flatnonzero(folds == fold)
        own = np.eye(len(left_out)) - hat[np.ix_(left_out, left_out)]
        residuals = np.eye(num_records)[left_out] - hat[left_out]
        predictor[left_out] -= np.linalg.solve(own, residuals)
    return predictor


def probe(features: np.ndarray, labels: np.ndarray, num_permutations: int = 0) -> dict | None:
    """What a probe reaches: accuracy, majority, n, num_classes, and p with permutations.

    features: (n, D); labels: (n,) integers, below 0 for a record without one. Classes with fewer
    than NUM_FOLDS records are left out; None where fewer than two remain.
    """
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes = values[counts >= NUM_FOLDS]
    if len(classes) < 2:
        return None
    kept = np.flatnonzero(np.isin(labels, classes))
    targets = np.searchsorted(classes, labels[kept])  # (n,)
    generator = np.random.default_rng(0)
    folds = generator.permutation(len(kept)) % NUM_FOLDS
    predictor = fold_predictor(features[kept].astype(np.float64), folds)
    one_hot = np.eye(len(classes))

    def accuracy(targets: np.ndarray) -> float:
        return float(((predictor @ one_hot[targets]).argmax(1) == targets).mean())

    own = accuracy(targets)
    shuffled = [accuracy(generator.permutation(targets)) for _ in range(num_permutations)]
    num_as_good = sum(other >= own for other in shuffled)
    return {
        "n": len(kept),
        "num_classes": len(classes),
        "accuracy": own,
        "majority": float(np.bincount(targets).max() / len(kept)),
        "p": (1 + num_as_good) / (1 + num_permutations) if num_permutations else None,
    }


def probe_steps(thoughts: np.ndarray, labels: np.ndarray, own_steps: Sequence[int]) -> list[dict]:
    """A probe of every thought for every step that has one.

    thoughts: (n, K, D), nan where a record has no such thought, and n so small that an (n, n)
    matrix is; labels: (n, S) as in `probe`;
    own_steps: for each thought the step, from 0, that it replaces.
    Each entry: what `probe` returns, k and step from 1, and best_other_step, the highest accuracy
    of the same thoughts for a step that is not this one. Labels are shuffled for own steps alone.
    """
    entries = []
    for k, own_step in enumerate(own_steps):
        has_thought = ~np.isnan(thoughts[:, k, 0])
        found = {}
        for step in range(labels.shape[1]):
            num_permutations = NUM_PERMUTATIONS if step == own_step else 0
            outcome = probe(thoughts[has_thought, k], labels[has_thought, step], num_permutations)
            if outcome:
                found[step] = outcome
        for step, outcome in found.items():
            others = [other["accuracy"] for number, other in found.items() if number != step]
            best = {"best_other_step": max(others, default=None)}
            entries.append({"k": k + 1, "step": step + 1} | outcome | best)
    return entries
