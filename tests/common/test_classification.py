"""Classification figures: known answers, the peer's values, and what is not defined."""

import math
from typing import get_args

import numpy as np
import pytest
import sklearn.metrics
import torch

from common.metrics.classification import (
    Confusion,
    Criterion,
    best_threshold,
    calibration,
    confusion,
    roc_auc,
    roc_curve,
)
from common.schedule import Mode, num_plateaus, num_since_best


def drawn(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with ties."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, n)
    return labels, np.round(random.normal(0.8 * labels, 1, n), 1)


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn(seed: int) -> None:
    labels, scores = drawn(seed, 83)
    counts = confusion(labels, scores >= 0.4)
    called = (scores >= 0.4).astype(int)
    assert counts.accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, called))
    assert counts.balanced_accuracy == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, called))
    assert counts.f1 == pytest.approx(sklearn.metrics.f1_score(labels, called))
    assert counts.precision == pytest.approx(sklearn.metrics.precision_score(labels, called))
    assert counts.recall == pytest.approx(sklearn.metrics.recall_score(labels, called))
    assert roc_auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_equals_scikit_learns(seed: int) -> None:
    labels, scores = drawn(seed, 60)
    false_rate, true_rate, thresholds = roc_curve(labels, scores)
    expected = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(false_rate, expected[0])
    np.testing.assert_allclose(true_rate, expected[1])
    np.testing.assert_allclose(thresholds, expected[2])
    assert np.trapezoid(true_rate, false_rate) == pytest.approx(roc_auc(labels, scores))


@pytest.mark.parametrize("criterion", ["f1", "balanced_accuracy"])
@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better(seed: int, criterion: Criterion) -> None:
    labels, scores = drawn(seed, 40)
    probabilities = 1 / (1 + np.exp(-scores))
    cuts = (best_threshold(labels, probabilities, criterion), *probabilities, 0.0, 1.1)
    chosen, *others = (getattr(confusion(labels, probabilities >= cut), criterion) for cut in cuts)
    assert chosen == pytest.approx(max(others))


def test_the_threshold_lies_between_two_scores() -> None:
    both, positives, negatives = np.array([0, 0, 1, 1]), np.array([1, 1]), np.array([0, 0])
    for criterion in get_args(Criterion):
        assert best_threshold(both, np.array([0.1, 0.3, 0.7, 0.9]), criterion) == pytest.approx(0.5)
        assert best_threshold(negatives, np.array([0.6, 0.8]), criterion) == 0.5
    assert best_threshold(positives, np.array([0.6, 0.8]), "f1") == pytest.approx(0.3)
    assert best_threshold(positives, np.array([0.6, 0.8]), "balanced_accuracy") == 0.5


def test_f1_lets_the_larger_class_win_and_balanced_accuracy_does_not() -> None:
    labels, scores = np.array([0, 0, 1, 1, 1, *[1] * 9]), np.array([0.5, 0.4, 0.3, 0.3, 0.3, *[0.9] * 9])
    assert confusion(labels, scores >= best_threshold(labels, scores, "f1")).specificity == 0
    assert confusion(labels, scores >= best_threshold(labels, scores, "balanced_accuracy")).specificity == 1


def test_what_is_not_defined_is_nan() -> None:
    only = Confusion(3, 1, 0, 0)
    assert math.isnan(only.recall) and math.isnan(only.balanced_accuracy) and only.precision == 0
    assert math.isnan(roc_auc(np.zeros(3, np.int64), np.arange(3.0)))
    assert Confusion(1, 0, 2, 0).precision == 0.0


def test_calibration_of_a_known_case() -> None:
    labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.15, 0.15, 0.95, 0.95])
    said, was, count, error = calibration(labels, probabilities, 10)
    np.testing.assert_allclose(said, [0.15, 0.95])
    np.testing.assert_allclose(was, [0.5, 1.0])
    assert count.tolist() == [2, 2] and error == pytest.approx((0.35 + 0.05) / 2)


def test_a_certain_and_right_probability_is_calibrated() -> None:
    assert calibration(np.array([0, 1]), np.array([0.0, 1.0]), 10)[3] == 0


@pytest.mark.parametrize(
    ("values", "patience", "falls"),
    [
        ([0.5, 0.6, 0.7], 1, 0),
        ([0.7, 0.6, 0.6], 1, 1),
        ([0.7, 0.6, 0.6, 0.6, 0.6], 1, 2),
        ([0.7, 0.6, 0.8, 0.7], 1, 0),
        ([0.7, 0.6], 0, 1),
        ([], 1, 0),
    ],
)
def test_plateaus(values: list[float], patience: int, falls: int) -> None:
    assert num_plateaus(values, patience, "max") == falls
    assert num_plateaus([-value for value in values], patience, "min") == falls


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateaus_are_those_of_torch(seed: int, patience: int, mode: Mode) -> None:
    values = np.random.default_rng(seed).integers(0, 12, 40).astype(float).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, 0.5, patience, threshold=0, eps=0)
    for number, value in enumerate(values, 1):
        scheduler.step(value)
        assert optimizer.param_groups[0]["lr"] == 0.5 ** num_plateaus(values[:number], patience, mode)


def test_since_best_counts_from_the_first_of_equals() -> None:
    assert num_since_best([0.5, 0.9, 0.9, 0.1], "max") == 2
    assert num_since_best([], "max") == 0
