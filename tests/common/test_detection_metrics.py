"""Matching and detection figures against known answers, exhaustive search and scikit-learn."""

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score, fbeta_score

from common.errors import UserError
from common.metrics.detection import (
    DetectionCurve,
    FloatArray,
    ScoredTomogram,
    average_precision,
    best_threshold,
    byu_counts,
    byu_curve,
    byu_f_beta,
    byu_predictions,
    detection_counts,
    f_beta_of_counts,
    localisation_error,
    match_points,
    precision_recall_curve,
)

UNIT = np.ones(3)
NOTHING = np.empty((0, 3))


def on_a_line(*positions: float) -> FloatArray:
    """Points along z."""
    return np.array([[z, 0, 0] for z in positions], dtype=np.float64).reshape(-1, 3)


def random_tomograms(seed: int, count: int, max_picks: int, max_truths: int) -> list[ScoredTomogram]:
    """Crowded boxes of 6 voxels in which many pairs compete, with tied scores."""
    draw = np.random.default_rng(seed)
    return [
        ScoredTomogram(
            draw.uniform(0, 6, (n, 3)),
            np.round(draw.uniform(0, 1, n), 1),
            draw.uniform(0, 6, (m, 3)),
            draw.uniform(5, 20, 3),
        )
        for n, m in draw.integers(0, [max_picks + 1, max_truths + 1], size=(count, 2))
    ]


def exhaustive_matching(distance: FloatArray, tolerance: float) -> tuple[int, float]:
    """The largest number of allowed pairs and the least total distance among those, over all assignments."""
    distance = distance if distance.shape[0] <= distance.shape[1] else distance.T
    best = (0, 0.0)
    for columns in permutations(range(distance.shape[1]), distance.shape[0]):
        chosen = distance[np.arange(len(columns)), list(columns)]
        allowed = chosen[chosen <= tolerance]
        if (len(allowed), -allowed.sum()) > (best[0], -best[1]):
            best = (len(allowed), float(allowed.sum()))
    return best


def test_f_beta_equals_its_formula_and_is_zero_without_hits() -> None:
    counts = np.array([[[9, 2, 1], [3, 1, 1]], [[0, 0, 0], [0, 5, 5]]])
    assert f_beta_of_counts(counts, 2).tolist() == [
        [pytest.approx(5 * 9 / (5 * 9 + 4 * 1 + 2)), pytest.approx(15 / (15 + 4 + 1))],
        [0, 0],
    ]
    assert f_beta_of_counts(np.array([3, 1, 1]), 1) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(150))
def test_matching_equals_exhaustive_search(seed: int) -> None:
    (tomogram,) = random_tomograms(seed, 1, 6, 5)
    tolerance = float(np.random.default_rng(seed).uniform(10, 60))
    found = match_points(tomogram.points, tomogram.truths, tomogram.spacing_angstrom, tolerance)
    offsets = (tomogram.points[:, None] - tomogram.truths[None]) * tomogram.spacing_angstrom
    distance = np.sqrt((offsets**2).sum(-1))
    number, total = exhaustive_matching(distance, tolerance)
    assert len(found.pick) == number
    assert found.distance_angstrom.sum() == pytest.approx(total)
    assert len(set(found.pick)) == len(set(found.truth)) == number
    assert np.allclose(found.distance_angstrom, distance[found.pick, found.truth])


def test_gating_never_costs_a_match() -> None:
    """Raw distances prefer 0 + 5.95 to 4 + 4.4, and a cut at 4.5 afterwards would keep one pair of two."""
    picks, truths = on_a_line(0, 4), np.array([[4.0, 0, 0], [4.0, 4.4, 0]])
    distance = np.linalg.norm(picks[:, None] - truths[None], axis=2)
    assert (distance[linear_sum_assignment(distance)] <= 4.5).sum() == 1
    matches = match_points(picks, truths, UNIT, 4.5)
    assert matches.pick.tolist() == matches.truth.tolist() == [0, 1]
    assert matches.distance_angstrom.tolist() == pytest.approx([4, 4.4])


def test_tolerance_follows_the_spacing_of_each_tomogram_and_axis() -> None:
    """1000 angstrom are 153 voxels at 6.5 angstrom and 50 at 19.7, whatever the working resolution."""
    fine = ScoredTomogram(on_a_line(150), np.ones(1), on_a_line(0), np.full(3, 6.5))
    coarse = ScoredTomogram(on_a_line(60), np.ones(1), on_a_line(0), np.full(3, 19.7))
    thick_slices = ScoredTomogram(on_a_line(60), np.ones(1), on_a_line(0), np.array([19.7, 6.5, 6.5]))
    counts = detection_counts([fine, coarse, thick_slices], 0.5, 1000)
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert byu_f_beta([on_a_line(150)[0]], [on_a_line(0)], np.full((1, 3), 6.5), 1000, 2) == 1
    assert byu_f_beta([on_a_line(60)[0]], [on_a_line(0)], np.full((1, 3), 19.7), 1000, 2) == 0


def test_a_pair_at_exactly_the_tolerance_matches() -> None:
    assert len(match_points(on_a_line(100), on_a_line(0), np.full(3, 10.0), 1000).pick) == 1
    assert len(match_points(on_a_line(100.001), on_a_line(0), np.full(3, 10.0), 1000).pick) == 0


def test_official_byu_example() -> None:
    """The docstring example of the competition's metric: one false alarm, one hit, one far off, one missed."""
    solution = [NOTHING, *(np.full((1, 3), centre) for centre in (250.0, 100.0, 200.0))]
    answers, spacing = [np.full(3, 100.0), np.full(3, 251.0), np.full(3, 600.0), None], np.full((4, 3), 10.0)
    assert byu_f_beta(answers, solution, spacing, 1000, 2) == pytest.approx(0.3571428571428571, abs=1e-15)
    assert byu_counts(answers, solution, spacing, 1000).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_answering_the_right_place_everywhere_scores_0_863_at_the_prevalence_of_the_training_set() -> None:
    truths = [on_a_line(0) if i < 362 else NOTHING for i in range(648)]
    score = byu_f_beta([np.zeros(3)] * 648, truths, np.full((648, 3), 13.1), 1000, 2)
    assert score == pytest.approx(0.863, abs=1e-3)


def test_byu_score_equals_scikit_learn_on_the_official_formulation() -> None:
    draw = np.random.default_rng(3)
    truths = [draw.uniform(0, 100, (draw.integers(0, 2), 3)) for _ in range(80)]
    answers = [draw.uniform(0, 100, 3) if draw.random() < 0.7 else None for _ in range(80)]
    spacing = draw.choice([6.5, 13.1, 19.7], 80)
    y_true = np.array([len(centres) for centres in truths])
    y_predicted = np.array([answer is not None for answer in answers], dtype=int)
    for i, (answer, centres) in enumerate(zip(answers, truths, strict=True)):
        if answer is not None and len(centres) and np.linalg.norm(answer - centres[0]) > 1000 / spacing[i]:
            y_predicted[i] = 0
    expected = fbeta_score(y_true, y_predicted, beta=2)
    assert 0.2 < expected < 0.9
    assert byu_f_beta(answers, truths, np.repeat(spacing[:, None], 3, axis=1), 1000, 2) == pytest.approx(expected)


def test_a_hit_on_any_of_several_motors_counts_once() -> None:
    counts = byu_counts([on_a_line(500)[0]], [on_a_line(0, 505, 900)], UNIT[None], 10)
    assert counts.tolist() == [[1, 0, 0]]


def test_zero_is_a_place_and_minus_one_is_not() -> None:
    assert byu_counts([np.zeros(3)], [NOTHING], UNIT[None], 10).tolist() == [[0, 1, 0]]
    with pytest.raises(UserError, match="expected None"):
        byu_counts([np.array([5.0, -1, 5])], [NOTHING], UNIT[None], 10)


@pytest.mark.parametrize("seed", range(40))
def test_curve_equals_the_matching_at_every_threshold(seed: int) -> None:
    tomograms = [*random_tomograms(seed, 3, 25, 12), ScoredTomogram(NOTHING, np.empty(0), on_a_line(1), UNIT)]
    curve = precision_recall_curve(tomograms, 25, 2)
    assert curve.thresholds.tolist() == sorted({s for t in tomograms for s in t.scores.tolist()}, reverse=True)
    for i, threshold in enumerate(curve.thresholds):
        tp, fp, fn = detection_counts(tomograms, threshold, 25).sum(axis=0)
        assert (curve.tp[i], curve.fp[i], curve.fn[i]) == (tp, fp, fn)
        assert curve.recall[i] == tp / (tp + fn) and curve.precision[i] == tp / (tp + fp)
        assert curve.f_beta[i] == pytest.approx(f_beta_of_counts(np.array([tp, fp, fn]), 2))


@pytest.mark.parametrize("seed", range(20))
def test_byu_curve_equals_the_metric_at_every_threshold(seed: int) -> None:
    tomograms = [*random_tomograms(seed, 12, 3, 2), ScoredTomogram(NOTHING, np.empty(0), on_a_line(1), UNIT)]
    curve = byu_curve(tomograms, 30, 2)
    truths, spacing = [t.truths for t in tomograms], np.array([t.spacing_angstrom for t in tomograms])
    for i, threshold in enumerate(curve.thresholds):
        answers = byu_predictions(tomograms, threshold)
        assert byu_counts(answers, truths, spacing, 30).sum(axis=0).tolist() == [curve.tp[i], curve.fp[i], curve.fn[i]]
        assert byu_f_beta(answers, truths, spacing, 30, 2) == pytest.approx(curve.f_beta[i])


def test_average_precision_equals_scikit_learn_where_each_truth_has_one_pick() -> None:
    draw = np.random.default_rng(0)
    truths = on_a_line(*range(0, 4000, 10))
    picks = np.concatenate([truths, truths + [0, 500, 0]])
    scores = np.round(np.concatenate([draw.normal(1, 1, 400), draw.normal(0, 1, 400)]), 2)
    curve = precision_recall_curve([ScoredTomogram(picks, scores, truths, UNIT)], 3, 1)
    expected = average_precision_score(np.arange(800) < 400, scores)
    assert average_precision(curve) == pytest.approx(expected, abs=1e-12)


def test_duplicate_picks_are_false_positives() -> None:
    tomogram = ScoredTomogram(on_a_line(0, 0.1, 0.2), np.array([0.9, 0.8, 0.7]), on_a_line(0), UNIT)
    assert detection_counts([tomogram], 0, 5).tolist() == [[1, 2, 0]]
    assert precision_recall_curve([tomogram], 5, 1).fp.tolist() == [0, 1, 2]


def test_the_order_of_picks_truths_and_tomograms_does_not_matter() -> None:
    tomograms = random_tomograms(7, 6, 20, 9)
    draw = np.random.default_rng(1)
    shuffled = []
    for tomogram in reversed(tomograms):
        order = draw.permutation(len(tomogram.scores))
        truths = draw.permutation(tomogram.truths)
        picks, scores = tomogram.points[order], tomogram.scores[order]
        shuffled.append(ScoredTomogram(picks, scores, truths, tomogram.spacing_angstrom))
    one, other = (precision_recall_curve(group, 25, 2) for group in (tomograms, shuffled))
    assert one.tp.tolist() == other.tp.tolist() and one.f_beta.tolist() == other.f_beta.tolist()
    assert localisation_error(tomograms, 0.3, 25).mean_angstrom == pytest.approx(
        localisation_error(shuffled, 0.3, 25).mean_angstrom
    )


def test_a_long_chain_of_hand_overs_is_followed() -> None:
    """The last pick fits only by moving 3000 matched picks along, deeper than a recursion could go."""
    picks, truths = on_a_line(*range(1, 3002), 0), on_a_line(*np.arange(0.5, 3002))
    scores = np.append(np.linspace(1, 0.5, 3001), 0.1)
    curve = precision_recall_curve([ScoredTomogram(picks, scores, truths, UNIT)], 0.5, 1)
    assert curve.tp[-1] == 3002 and curve.fp[-1] == 0


def test_localisation_error_in_angstrom() -> None:
    tomogram = ScoredTomogram(on_a_line(0, 101, 202, 350), np.ones(4), on_a_line(0, 100, 200), np.array([10.0, 1, 1]))
    error = localisation_error([tomogram], 0.5, 100)
    assert (error.num_matches, error.median_angstrom, error.mean_angstrom) == (3, 10, 10)
    assert error.percentile_90_angstrom == pytest.approx(18)
    assert np.isnan(localisation_error([tomogram], 2, 100).median_angstrom)


def curve_of(thresholds: list[float], f: list[float]) -> DetectionCurve:
    """A curve of which only thresholds and F-beta matter."""
    unused, counts = np.zeros(len(f)), np.zeros(len(f), dtype=np.int64)
    return DetectionCurve(np.array(thresholds), unused, unused, np.array(f), counts, counts, counts)


def test_best_threshold_is_the_middle_of_the_widest_plateau() -> None:
    best = best_threshold(curve_of([0.9, 0.8, 0.7, 0.3, 0.1], [0.5, 0.9, 0.2, 0.9, 0.6]), 0, 1)
    assert (best.threshold, best.f_beta) == (pytest.approx(0.2), 0.9)  # (0.1, 0.3] is wider than (0.7, 0.8]
    joined = best_threshold(curve_of([0.9, 0.8, 0.6, 0.5], [0.5, 0.9, 0.9, 0.2]), 0, 1)
    assert joined.threshold == pytest.approx(0.65)  # (0.5, 0.8]
    together = best_threshold(curve_of([0.9, 0.8, 0.7, 0.6, 0.35, 0.2], [0.9, 0.9, 0.9, 0.1, 0.9, 0.1]), 0, 1)
    assert together.threshold == pytest.approx(0.75)  # (0.6, 0.9] in three stretches is wider than (0.2, 0.35]
    assert best_threshold(curve_of([0.4], [0.7]), 0, 1).threshold == pytest.approx(0.2)  # down to the lower end
    assert best_threshold(curve_of([], []), 0, 1) == best_threshold(curve_of([2.0], [0.0]), 0, 1)
    next_to = float(np.nextafter(0.5, 1))
    assert best_threshold(curve_of([next_to, 0.5], [0.9, 0.1]), 0, 1).threshold == next_to


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_beats_a_fine_grid_and_delivers_its_value(seed: int) -> None:
    tomograms = random_tomograms(seed, 10, 6, 3)
    counted = best_threshold(precision_recall_curve(tomograms, 25, 2), 0, 1)
    assert f_beta_of_counts(detection_counts(tomograms, counted.threshold, 25).sum(0), 2) == pytest.approx(
        counted.f_beta
    )
    grid = [f_beta_of_counts(detection_counts(tomograms, t, 25).sum(0), 2) for t in np.linspace(0.01, 1, 60)]
    assert max(grid) <= counted.f_beta + 1e-12
    byu = best_threshold(byu_curve(tomograms, 25, 2), 0, 1)
    truths, spacing = [t.truths for t in tomograms], np.array([t.spacing_angstrom for t in tomograms])
    answers = byu_predictions(tomograms, byu.threshold)
    assert byu_f_beta(answers, truths, spacing, 25, 2) == pytest.approx(byu.f_beta)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="no true point"):
        precision_recall_curve([ScoredTomogram(on_a_line(0), np.ones(1), NOTHING, UNIT)], 5, 2)
    with pytest.raises(UserError, match="scores: 1 of 2"):
        ScoredTomogram(on_a_line(0, 1), np.array([np.nan, 1]), NOTHING, UNIT)
    with pytest.raises(UserError, match="voxel spacing"):
        ScoredTomogram(NOTHING, np.empty(0), NOTHING, np.zeros(3))


def test_no_picks_at_all_gives_an_empty_curve() -> None:
    tomogram = ScoredTomogram(NOTHING, np.empty(0), on_a_line(1, 2), UNIT)
    for curve in (precision_recall_curve([tomogram], 5, 2), byu_curve([tomogram], 5, 2)):
        assert len(curve.thresholds) == 0 and average_precision(curve) == 0
    assert detection_counts([tomogram], 0, 5).tolist() == [[0, 0, 2]]


def test_the_curve_of_a_crowd_of_thousands_is_exact() -> None:
    draw = np.random.default_rng(2)
    crowd = ScoredTomogram(draw.uniform(0, 100, (6000, 3)), draw.random(6000), draw.uniform(0, 100, (1500, 3)), UNIT)
    curve = precision_recall_curve([crowd], 5, 2)
    assert len(curve.thresholds) == 6000 and (np.diff(curve.tp) >= 0).all()
    for i in (500, 5999):
        assert curve.tp[i] == detection_counts([crowd], curve.thresholds[i], 5)[0, 0]
