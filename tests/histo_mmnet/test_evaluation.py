"""Figures of predictions: patients are units, thresholds never see who is tested, importance is exact."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from histo_mmnet.composites import Composite
from histo_mmnet.config import Evaluation
from histo_mmnet.evaluation import (
    Cases,
    cases_of,
    figures_of,
    magnification_importance,
    recognition_rate,
    scores_of_sets,
    threshold_of,
)
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.predictions import ALL, NUM_SETS, Predictions, probability
from histo_mmnet.shapley import shapley_values
from histo_mmnet.slides import Slide

SETTINGS = Evaluation(bootstrap_resamples=200)


def predictions(labels: list[int], counts: list[int], logits: np.ndarray, of_sets: np.ndarray) -> Predictions:
    """Composites of patients one after another, so many each."""
    composites = []
    for patient, (label, count) in enumerate(zip(labels, counts, strict=True)):
        slide = Slide(f"slide {patient}", f"14-{patient:03d}", label, {40: (Path("a.png"),)}, {})
        composites += [Composite(slide, (Path("a.png"), None, None, None))] * count
    return Predictions(composites, logits, of_sets, np.full((len(logits), 4), np.nan))


def random_predictions(seed: int, patients: int) -> Predictions:
    random = np.random.default_rng(seed)
    labels, counts = (np.arange(patients) % 2).tolist(), random.integers(1, 5, patients).tolist()
    truth = np.repeat(labels, counts)
    of_sets = random.normal(0, 1, (len(truth), NUM_SETS)) + truth[:, None] * 1.5
    of_sets[:, 0] = np.nan
    return predictions(labels, counts, of_sets[:, ALL], of_sets)


def test_shapley_values_of_known_games() -> None:
    """Additive players keep their worth; two that only work together share it; a player without effect gets nothing."""
    additive = np.array([sum(w for m, w in enumerate((1.0, 2.0, 3.0)) if s >> m & 1) for s in range(8)])
    np.testing.assert_allclose(shapley_values(additive), [1, 2, 3])
    pair = np.array([float(s & 3 == 3) for s in range(8)])
    np.testing.assert_allclose(shapley_values(pair), [0.5, 0.5, 0])


@pytest.mark.parametrize("seed", range(3))
def test_shapley_values_are_the_mean_over_all_orders(seed: int) -> None:
    game = np.random.default_rng(seed).normal(size=16)
    expected = np.zeros(4)
    for order in itertools.permutations(range(4)):
        there = 0
        for player in order:
            expected[player] += (game[there | 1 << player] - game[there]) / math.factorial(4)
            there |= 1 << player
    np.testing.assert_allclose(shapley_values(game), expected)
    assert expected.sum() == pytest.approx(game[15] - game[0])


def test_importance_adds_up_to_the_area_above_chance() -> None:
    found = random_predictions(0, 40)
    importance = magnification_importance([found], SETTINGS)
    patients = cases_of([found], [0.5], ALL).of_patients()
    from common.metrics.classification import roc_auc

    total = sum(interval.estimate for interval in importance)
    assert total == pytest.approx(roc_auc(patients.label, patients.probability) - 0.5)
    assert all(interval.low <= interval.estimate <= interval.high for interval in importance)


def test_a_patient_without_a_magnification_counts_as_unknown_with_it_alone() -> None:
    found = random_predictions(1, 12)
    first = [k for k, composite in enumerate(found.composites) if composite.slide.accession == "14-000"]
    found.of_sets[first, 1 << 2] = np.nan
    label, scores = scores_of_sets([found])
    assert len(label) == 12 and scores[0, 1 << 2] == 0.5 and scores[0, 0] == 0.5 and np.isfinite(scores).all()
    assert len(magnification_importance([found], SETTINGS)) == len(MAGNIFICATIONS)


def test_the_official_score_is_the_share_of_what_is_right() -> None:
    cases = Cases(np.array([0.9, 0.2, 0.8, 0.1]), np.array([1, 1, 1, 0]), np.array([0, 0, 0, 1]), np.full(4, 0.5))
    np.testing.assert_allclose(cases.scores(), [2 / 3, 1])
    assert recognition_rate(cases, SETTINGS).estimate == pytest.approx(5 / 6)
    patients = cases.of_patients()
    assert patients.positive.tolist() == [True, False] and patients.label.tolist() == [1, 0]


def test_thresholds_do_not_know_the_tested_patients() -> None:
    found = random_predictions(2, 30)
    left_out = {f"14-{patient:03d}" for patient in range(10)}
    before = threshold_of([found], left_out, "f1")
    tested = [k for k, composite in enumerate(found.composites) if composite.slide.accession in left_out]
    found.logits[tested] *= -7
    assert threshold_of([found], left_out, "f1") == before
    assert threshold_of([found], {composite.slide.accession for composite in found.composites}, "f1") == 0.5


def test_intervals_resample_patients() -> None:
    """Copies of a patient's composites do not make the interval narrower."""
    found = random_predictions(3, 30)
    few = figures_of(cases_of([found], [0.5], ALL), "composite", SETTINGS)
    cases = cases_of([found], [0.5], ALL)
    many = Cases(*(np.repeat(getattr(cases, name), 9) for name in ("probability", "label", "patient", "threshold")))
    copied = figures_of(many, "composite", SETTINGS)
    for name in ("composite_auc", "composite_auc_low", "composite_auc_high"):
        assert copied[name] == pytest.approx(few[name])
    assert few["composite_auc_low"] < few["composite_auc"] < few["composite_auc_high"]


def test_a_threshold_parts_patients_not_their_composites() -> None:
    """One composite of a malignant patient looks benign: by composites the threshold would follow it."""
    logits = np.array([-2.0, -2.0, -2.0, -3.0, 4.0, 4.0, 4.0, 4.0])
    found = predictions([0, 1, 1], [3, 3, 2], logits, np.full((8, NUM_SETS), np.nan))
    threshold = threshold_of([found], set(), "f1")
    means = [probability(logits[a:b]).mean() for a, b in ((0, 3), (3, 6), (6, 8))]
    assert means[0] < threshold < means[1] < means[2]
    assert threshold == pytest.approx((means[0] + means[1]) / 2)
