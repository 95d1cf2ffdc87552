"""Figures of predictions: patients are units, thresholds never see who is tested, importance is exact."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from common.metrics.classification import roc_auc
from histo_mmnet.composites import SLOTS, Composite
from histo_mmnet.config import Evaluation
from histo_mmnet.evaluation import (
    Cases,
    FoldVerdict,
    Thresholds,
    cases_of,
    figures_of,
    magnification_importance,
    recognition_rate,
    scores_of_sets,
    thresholds_of,
)
from histo_mmnet.members import mmnet_of
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.predictions import ALL, NUM_SETS, Predictions, probability
from histo_mmnet.shapley import shapley_values
from histo_mmnet.slides import Slide

SETTINGS = Evaluation(bootstrap_resamples=200)
HALF = Thresholds(0.5, 0.5, 0.5)


def predictions(labels: list[int], counts: list[int], logits: np.ndarray, of_sets: np.ndarray) -> Predictions:
    """Composites of patients one after another, so many each, of a photograph each."""
    composites: list[Composite] = []
    for patient, (label, count) in enumerate(zip(labels, counts, strict=True)):
        paths = [Path(f"{patient} {k}.png") for k in range(count)]
        slide = Slide(f"slide {patient}", f"14-{patient:03d}", label, {40: tuple(paths)}, {})
        composites += [Composite(slide, (path, None, None, None), SLOTS) for path in paths]
    n = len(logits)
    nothing = np.full((n, 4), np.nan), np.full((n, 4, 4), np.nan)
    return Predictions(composites, logits, of_sets, *nothing, np.arange(n), logits.copy())


def verdict(found: Predictions, fold: int, thresholds: Thresholds) -> FoldVerdict:
    return FoldVerdict(mmnet_of(fold), found, found, thresholds, 0.0)


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
    folds = [verdict(random_predictions(0, 40), 0, HALF)]
    importance = magnification_importance(folds, "accession", SETTINGS)
    patients = cases_of(folds, "patient", "accession")
    total = sum(interval.estimate for interval in importance)
    assert total == pytest.approx(roc_auc(patients.label, patients.probability) - 0.5)
    assert all(interval.low <= interval.estimate <= interval.high for interval in importance)


def test_a_patient_without_a_magnification_counts_as_unknown_with_it_alone() -> None:
    found = random_predictions(1, 12)
    first = [k for k, composite in enumerate(found.composites) if composite.slide.accession == "14-000"]
    found.of_sets[first, 1 << 2] = np.nan
    folds = [verdict(found, 0, HALF)]
    patients, scores = scores_of_sets(folds, "accession")
    assert len(patients.label) == 12 and scores[0, 1 << 2] == 0.5 and scores[0, 0] == 0.5
    assert np.isfinite(scores).all()
    assert len(magnification_importance(folds, "accession", SETTINGS)) == len(MAGNIFICATIONS)


def test_the_official_score_is_the_share_of_what_is_right() -> None:
    names = ("14-1", "14-1", "14-1", "14-2")
    cases = Cases(np.array([0.9, 0.2, 0.8, 0.1]), np.array([1, 1, 1, 0]), np.full(4, 0.5), names, names)
    np.testing.assert_allclose(cases.scores(), [2 / 3, 1])
    assert recognition_rate(cases, SETTINGS).estimate == pytest.approx(5 / 6)
    patients = cases.of_patients()
    assert patients.positive.tolist() == [True, False] and patients.label.tolist() == [1, 0]
    assert patients.patient == ("14-1", "14-2")


def test_the_official_score_counts_photographs_not_composites() -> None:
    """A composite that is right makes none of its photographs right."""
    found = predictions([0, 1], [2, 2], np.array([-2.0, -2.0, 2.0, 2.0]), np.full((4, NUM_SETS), np.nan))
    found.alone[:] = [-2.0, 2.0, 2.0, 2.0]
    folds = [verdict(found, 0, HALF)]
    assert cases_of(folds, "composite", "accession").scores().tolist() == [1, 1]
    assert cases_of(folds, "image", "accession").scores().tolist() == [0.5, 1]


def test_a_slide_tested_in_two_official_trials_is_two_patients_of_one_accession() -> None:
    """Wrong in one trial and right in the other is a half, not the mean of both networks."""
    slide = np.full((2, NUM_SETS), np.nan)
    wrong, right = (predictions([1, 0], [1, 1], np.array([logit, -3.0]), slide) for logit in (-0.5, 3.0))
    folds = [verdict(wrong, 0, HALF), verdict(right, 1, HALF)]
    patients = cases_of(folds, "patient", "official")
    assert len(patients.label) == 4 and sorted(set(patients.accession)) == ["14-000", "14-001"]
    figures = figures_of(patients, "patient", SETTINGS)
    assert figures["patient_recall"] == 0.5 and figures["patient_specificity"] == 1 and figures["n_patients"] == 4
    rates = [cases_of([fold], "image", "official").scores().mean() for fold in folds]
    assert recognition_rate(cases_of(folds, "image", "official"), SETTINGS).estimate == pytest.approx(np.mean(rates))


def test_thresholds_do_not_know_the_tested_patients() -> None:
    found = random_predictions(2, 30)
    left_out = {f"14-{patient:03d}" for patient in range(10)}
    before = thresholds_of([(0, found)], left_out, "balanced_accuracy", "accession")
    tested = [k for k, composite in enumerate(found.composites) if composite.slide.accession in left_out]
    found.logits[tested] *= -7
    found.alone[tested] *= -7
    assert thresholds_of([(0, found)], left_out, "balanced_accuracy", "accession") == before
    everybody = {composite.slide.accession for composite in found.composites}
    assert thresholds_of([(0, found)], everybody, "f1", "accession") == HALF


def test_intervals_resample_patients() -> None:
    """Copies of a patient's composites do not make the interval narrower."""
    found = random_predictions(3, 30)
    cases = cases_of([verdict(found, 0, HALF)], "composite", "accession")
    few = figures_of(cases, "composite", SETTINGS)
    rows = np.repeat(np.arange(len(cases.label)), 9)
    names = tuple(cases.patient[k] for k in rows)
    many = Cases(cases.probability[rows], cases.label[rows], cases.threshold[rows], names, names)
    copied = figures_of(many, "composite", SETTINGS)
    for name in ("composite_auc", "composite_auc_low", "composite_auc_high"):
        assert copied[name] == pytest.approx(few[name])
    assert few["composite_auc_low"] < few["composite_auc"] < few["composite_auc_high"]


def test_a_threshold_parts_patients_not_their_composites() -> None:
    """One composite of a malignant patient looks benign: by composites the threshold would follow it."""
    logits = np.array([-2.0, -2.0, -2.0, -3.0, 4.0, 4.0, 4.0, 4.0])
    found = predictions([0, 1, 1], [3, 3, 2], logits, np.full((8, NUM_SETS), np.nan))
    thresholds = thresholds_of([(0, found)], set(), "f1", "accession")
    means = [probability(logits[a:b]).mean() for a, b in ((0, 3), (3, 6), (6, 8))]
    assert means[0] < thresholds.patient < means[1] < means[2]
    assert thresholds.patient == pytest.approx((means[0] + means[1]) / 2)
    assert thresholds.composite == pytest.approx(probability(np.array([-2.0, 4.0])).mean())
