"""Linear probes against a fit for each fold, and what their controls show on made-up thoughts."""

import numpy as np
import pytest

from analysis.linear_probes import NUM_FOLDS, fold_predictor, probe, probe_steps


def fit_without(features, targets, left_out, penalty):
    """Predictions (n, C) for the rows `left_out` by weights fitted to all other rows."""
    standardised = (features - features.mean(0)) / features.std(0)
    x = np.column_stack([np.ones(len(features)), standardised])
    ridge = penalty * np.eye(x.shape[1])
    ridge[0, 0] = 0  # the intercept
    kept = ~left_out
    weights = np.linalg.solve(x[kept].T @ x[kept] + ridge, x[kept].T @ targets[kept])
    return x[left_out] @ weights


@pytest.mark.parametrize("shape", [(40, 6), (20, 50)])
def test_one_matrix_gives_the_predictions_of_a_fit_to_the_other_folds(shape):
    generator = np.random.default_rng(0)
    features = generator.normal(size=shape) * generator.uniform(0.1, 10, shape[1]) + 3
    targets = generator.normal(size=(shape[0], 3))
    folds = np.arange(shape[0]) % 4
    predictions = fold_predictor(features, folds) @ targets
    for fold in range(4):
        expected = fit_without(features, targets, folds == fold, penalty=shape[1])
        assert predictions[folds == fold] == pytest.approx(expected, abs=1e-9)


def test_thoughts_that_never_change_predict_the_other_folds_mean():
    folds = np.arange(10) % 5
    targets = np.arange(10.0)[:, None]
    predictions = fold_predictor(np.ones((10, 4)), folds) @ targets
    for fold in range(5):
        assert predictions[folds == fold] == pytest.approx(targets[folds != fold].mean())


def test_a_linear_code_is_found_and_noise_is_not():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 200)
    code = generator.normal(size=(4, 16))
    found = probe(code[labels] + 0.3 * generator.normal(size=(200, 16)), labels, 19)
    assert found["accuracy"] > 0.95
    assert found["p"] == 1 / 20
    noise = probe(generator.normal(size=(200, 16)), labels, 19)
    assert noise["accuracy"] < 0.4
    assert noise["p"] > 1 / 20
    assert noise["majority"] == np.bincount(labels).max() / 200


def test_rare_classes_and_missing_labels_are_left_out():
    labels = np.repeat([0, 1, 2, -1], [20, NUM_FOLDS, NUM_FOLDS - 1, 8])
    features = np.random.default_rng(0).normal(size=(len(labels), 3))
    found = probe(features, labels)
    assert (found["n"], found["num_classes"]) == (20 + NUM_FOLDS, 2)
    assert found["majority"] == pytest.approx(20 / (20 + NUM_FOLDS))
    assert probe(features, np.zeros_like(labels)) is None


def test_each_thought_is_compared_with_the_best_other_step():
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 3, (120, 2))
    labels[:30, 1] = -1  # records with one step
    code = 5 * np.eye(3)
    thoughts = np.stack([code[labels[:, 0]], code[labels[:, 1]]], 1)
    thoughts += 0.1 * generator.normal(size=thoughts.shape)
    thoughts[:30, 1] = np.nan
    entries = {(e["k"], e["step"]): e for e in probe_steps(thoughts, labels, own_steps=[0, 1])}
    assert set(entries) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    for own, other in (((1, 1), (1, 2)), ((2, 2), (2, 1))):
        assert entries[own]["accuracy"] == 1.0
        assert entries[own]["best_other_step"] == entries[other]["accuracy"] < 0.6
        assert entries[own]["p"] < 0.01
        assert entries[other]["p"] is None
    assert entries[2, 2]["n"] == 90
