"""Detection of points in tomograms: gated one-to-one matching, precision-recall curves and the BYU 2025 score."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from common.errors import data_error

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ScoredTomogram:
    """One tomogram's scored picks beside its true points; a UserError if a number is not finite or a spacing is 0."""

    points: FloatArray  # (n, 3) z, y, x in voxels, voxel centres at integers
    scores: FloatArray  # (n,) the higher the surer
    truths: FloatArray  # (m, 3) z, y, x in voxels
    spacing_angstrom: FloatArray  # (3,) along z, y, x

    def __post_init__(self) -> None:
        assert self.points.shape == (len(self.scores), 3), f"Expected (n, 3) points, got {self.points.shape}"
        assert self.truths.shape == (len(self.truths), 3), f"Expected (m, 3) truths, got {self.truths.shape}"
        _check_numbers("scores", self.scores)
        _check_geometry(self.points, self.truths, self.spacing_angstrom)


@dataclass(frozen=True, eq=False)
class Matches:
    """Matched pairs: indices into points and truths, and their distance; each array has shape (num_matches,)."""

    pick: IntArray
    truth: IntArray
    distance_angstrom: FloatArray


@dataclass(frozen=True, eq=False)
class DetectionCurve:
    """Figures at every distinct score used as threshold (score >= threshold is a pick), strictest first; each (k,)."""

    thresholds: FloatArray
    precision: FloatArray
    recall: FloatArray
    f_beta: FloatArray
    tp: IntArray
    fp: IntArray
    fn: IntArray


@dataclass(frozen=True)
class BestThreshold:
    """A threshold and the F-beta it reaches on the curve it was chosen from."""

    threshold: float
    f_beta: float


@dataclass(frozen=True)
class LocalisationError:
    """Distances of matched pairs in angstrom; NaN where nothing matched."""

    num_matches: int
    median_angstrom: float
    mean_angstrom: float
    percentile_90_angstrom: float


def f_beta_of_counts(counts: NDArray[np.number], beta: float) -> FloatArray:
    """F-beta = (1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP) of counts (..., 3) holding TP, FP, FN; shape (...).

    0 without any TP (van Rijsbergen 1979).
    """
    assert counts.shape[-1] == 3, f"Expected (..., 3) counts, got {counts.shape}"
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    weighted = (1 + beta**2) * tp
    total = weighted + beta**2 * fn + fp
    score: FloatArray = np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)
    return score


def match_points(
    points: FloatArray, truths: FloatArray, spacing_angstrom: FloatArray, tolerance_angstrom: float
) -> Matches:
    """Match picks to truths one to one: as many pairs within the tolerance as possible, then least total distance.

    Points (n, 3) and truths (m, 3) are z, y, x in voxels, spacing (3,); a pair at exactly the tolerance may match.
    Pairs beyond it are priced above any sum of allowed ones inside each connected group, so gating never loses a match.
    """
    picks, targets, distances = _pairs_within(points, truths, spacing_angstrom, tolerance_angstrom)
    matched: list[IntArray] = [np.empty(0, dtype=np.int64)]
    for edges in _connected_groups(picks, targets, len(points), len(truths)):
        group_picks, rows = np.unique(picks[edges], return_inverse=True)
        group_targets, columns = np.unique(targets[edges], return_inverse=True)
        shape = (len(group_picks), len(group_targets))
        cost = np.full(shape, min(shape) + 1.0)
        edge_at = np.full(shape, -1)
        cost[rows, columns], edge_at[rows, columns] = distances[edges] / tolerance_angstrom, edges
        chosen = edge_at[linear_sum_assignment(cost)]
        matched.append(chosen[chosen >= 0])
    chosen = np.sort(np.concatenate(matched))  # pairs are ordered by pick
    return Matches(picks[chosen], targets[chosen], distances[chosen])


def detection_counts(tomograms: list[ScoredTomogram], threshold: float, tolerance_angstrom: float) -> IntArray:
    """TP, FP, FN of each tomogram for picks with score >= threshold, matched one to one; shape (num_tomograms, 3)."""
    counts = np.zeros((len(tomograms), 3), dtype=np.int64)
    for row, tomogram in zip(counts, tomograms, strict=True):
        kept = tomogram.points[tomogram.scores >= threshold]
        tp = len(match_points(kept, tomogram.truths, tomogram.spacing_angstrom, tolerance_angstrom).pick)
        row[:] = tp, len(kept) - tp, len(tomogram.truths) - tp
    return counts


def localisation_error(
    tomograms: list[ScoredTomogram], threshold: float, tolerance_angstrom: float
) -> LocalisationError:
    """Distance between matched picks (score >= threshold) and truths over all tomograms, in angstrom."""
    distances = [np.empty(0)]
    for tomogram in tomograms:
        kept = tomogram.points[tomogram.scores >= threshold]
        matches = match_points(kept, tomogram.truths, tomogram.spacing_angstrom, tolerance_angstrom)
        distances.append(matches.distance_angstrom)
    merged = np.concatenate(distances)
    if len(merged) == 0:
        return LocalisationError(0, float("nan"), float("nan"), float("nan"))
    median, percentile_90 = np.quantile(merged, [0.5, 0.9])
    return LocalisationError(len(merged), float(median), float(merged.mean()), float(percentile_90))


def precision_recall_curve(tomograms: list[ScoredTomogram], tolerance_angstrom: float, beta: float) -> DetectionCurve:
    """The exact one-to-one detection counts at every distinct score; a UserError if no tomogram has a true point.

    Picks enter from the highest score down. A pick adds one match exactly if an augmenting path starts at it (Berge
    1957) and no match is ever lost, so a single pass gives the maximum matching at every threshold.
    """
    hits = [np.empty(0, dtype=np.bool_)]
    for tomogram in tomograms:
        picks, targets, _ = _pairs_within(
            tomogram.points, tomogram.truths, tomogram.spacing_angstrom, tolerance_angstrom
        )
        hits.append(_adds_a_match(np.argsort(-tomogram.scores, kind="stable"), picks, targets))
    scores = np.concatenate([np.empty(0), *(tomogram.scores for tomogram in tomograms)])
    hit = np.concatenate(hits)
    return _curve(scores, hit, ~hit, sum(len(tomogram.truths) for tomogram in tomograms), beta)


def byu_curve(tomograms: list[ScoredTomogram], tolerance_angstrom: float, beta: float) -> DetectionCurve:
    """The BYU 2025 counts over tomograms when each answers its best pick, at every distinct best score.

    Equals byu_counts of byu_predictions at each threshold; a UserError if no tomogram has a true point.
    """
    answered = [tomogram for tomogram in tomograms if len(tomogram.scores) > 0]
    answers = byu_predictions(answered, -np.inf)
    truths = [tomogram.truths for tomogram in answered]
    spacing = np.array([tomogram.spacing_angstrom for tomogram in answered]).reshape(-1, 3)
    counts = byu_counts(answers, truths, spacing, tolerance_angstrom)
    scores = np.array([tomogram.scores.max() for tomogram in answered], dtype=np.float64)
    num_positive = sum(len(tomogram.truths) > 0 for tomogram in tomograms)
    return _curve(scores, counts[:, 0] == 1, counts[:, 1] == 1, num_positive, beta)


def byu_predictions(tomograms: list[ScoredTomogram], threshold: float) -> list[FloatArray | None]:
    """Each tomogram's best pick (3,), or None if its score is below the threshold; the first of equal scores."""
    return [
        tomogram.points[np.argmax(tomogram.scores)]
        if len(tomogram.scores) > 0 and tomogram.scores.max() >= threshold
        else None
        for tomogram in tomograms
    ]


def byu_counts(
    predictions: list[FloatArray | None],
    truths: list[FloatArray],
    spacing_angstrom: FloatArray,
    tolerance_angstrom: float,
) -> IntArray:
    """TP, FP, FN of each tomogram under the BYU 2025 rule, shape (num_tomograms, 3).

    One answer per tomogram: a point (3,) z, y, x in voxels or None for "no motor"; truths are (m, 3), spacing
    (num_tomograms, 3). With a motor, an answer within the tolerance is a TP, anything else one FN (a wrong place is no
    FP); without one, an answer is a FP. The official metric knows at most one motor per tomogram; where there are
    several, a hit on any of them counts. Source: the metric of the Kaggle competition "BYU - Locating Bacterial
    Flagellar Motors 2025", with tolerance 1000 angstrom. A UserError if a point holds -1, its mark of "no motor".
    """
    assert len(predictions) == len(truths) and spacing_angstrom.shape == (len(truths), 3), (
        f"Expected {len(predictions)} truths and ({len(predictions)}, 3) spacings, got {spacing_angstrom.shape}"
    )
    counts = np.zeros((len(predictions), 3), dtype=np.int64)
    for row, point, centres, spacing in zip(counts, predictions, truths, spacing_angstrom, strict=True):
        if point is not None and (point == -1).any():
            raise data_error(f"prediction {point.tolist()}: -1 stands for no motor, expected None")
        if len(centres) == 0:
            row[1] = point is not None
            continue
        answer = np.empty((0, 3)) if point is None else point[None]
        hit = len(_pairs_within(answer, centres, spacing, tolerance_angstrom)[0]) > 0
        row[:] = hit, 0, not hit
    return counts


def byu_f_beta(
    predictions: list[FloatArray | None],
    truths: list[FloatArray],
    spacing_angstrom: FloatArray,
    tolerance_angstrom: float,
    beta: float,
) -> float:
    """The BYU 2025 score: F-beta (officially beta 2, 1000 angstrom) over tomograms; arguments as in byu_counts."""
    counts = byu_counts(predictions, truths, spacing_angstrom, tolerance_angstrom)
    return float(f_beta_of_counts(counts.sum(axis=0), beta))


def best_threshold(curve: DetectionCurve, lowest: float, highest: float) -> BestThreshold:
    """The threshold in [lowest, highest] with the highest F-beta: the middle of the widest plateau that reaches it.

    Any threshold in (next score, score] keeps the same picks, so the middle of such a stretch, joined with equally good
    neighbours, is as far from both cliffs as the data allow. Thresholds above all scores pick nothing: F-beta 0.
    """
    assert lowest < highest, f"Expected lowest < highest, got {lowest} and {highest}"
    upper = np.clip(np.concatenate([[np.inf], curve.thresholds]), lowest, highest)  # stretch: (lower, upper]
    lower = np.append(upper[1:], lowest)
    values = np.concatenate([[0.0], curve.f_beta])
    open_stretch = upper > lower
    upper, lower, values = upper[open_stretch], lower[open_stretch], values[open_stretch]
    is_best = np.isclose(values, values.max(), rtol=1e-12, atol=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_best, [False]])))
    first, last = edges[0::2], edges[1::2] - 1
    widest = int(np.argmax(upper[first] - lower[last]))
    top, bottom = float(upper[first[widest]]), float(lower[last[widest]])
    middle = bottom + (top - bottom) / 2
    return BestThreshold(middle if middle > bottom else top, float(values.max()))


def average_precision(curve: DetectionCurve) -> float:
    """Sum over thresholds of (recall gained) x precision, without interpolation; truths never found add nothing."""
    return float(np.sum(np.diff(curve.recall, prepend=0.0) * curve.precision))


def _curve(scores: FloatArray, is_tp: BoolArray, is_fp: BoolArray, num_truths: int, beta: float) -> DetectionCurve:
    """Accumulate each pick's (n,) contribution from the highest score down, one entry per distinct score."""
    if num_truths == 0:
        raise data_error("no true point in any tomogram: recall and F-beta are undefined without one")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_tie = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    tp = np.cumsum(is_tp[order], dtype=np.int64)[last_of_tie]
    fp = np.cumsum(is_fp[order], dtype=np.int64)[last_of_tie]
    fn = num_truths - tp
    precision = tp / np.maximum(tp + fp, 1)  # 0 if no pick counts either way
    score = f_beta_of_counts(np.stack([tp, fp, fn], axis=1), beta)
    return DetectionCurve(ordered[last_of_tie], precision, tp / num_truths, score, tp, fp, fn)


def _pairs_within(
    points: FloatArray, truths: FloatArray, spacing_angstrom: FloatArray, tolerance_angstrom: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """All (pick, truth) index pairs at most the tolerance apart and their distances, ordered by pick, then truth."""
    assert tolerance_angstrom > 0, f"Expected a tolerance > 0, got {tolerance_angstrom}"
    _check_geometry(points, truths, spacing_angstrom)
    if len(points) == 0 or len(truths) == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    near = cKDTree(points * spacing_angstrom).sparse_distance_matrix(
        cKDTree(truths * spacing_angstrom), tolerance_angstrom * (1 + 1e-9), output_type="ndarray"
    )
    pick, truth = near["i"].astype(np.int64), near["j"].astype(np.int64)
    distance = np.linalg.norm((points[pick] - truths[truth]) * spacing_angstrom, axis=1)
    kept = np.flatnonzero(distance <= tolerance_angstrom)
    kept = kept[np.lexsort((truth[kept], pick[kept]))]
    return pick[kept], truth[kept], distance[kept]


def _connected_groups(picks: IntArray, targets: IntArray, num_picks: int, num_targets: int) -> Iterator[IntArray]:
    """Yield the pair indices of each connected group of picks and truths."""
    size = num_picks + num_targets
    graph = coo_array((np.ones(len(picks)), (picks, num_picks + targets)), shape=(size, size))
    group_of_pair = connected_components(graph, directed=False)[1][picks]
    order = np.argsort(group_of_pair, kind="stable")
    cuts = np.flatnonzero(np.diff(group_of_pair[order])) + 1
    return (edges for edges in np.split(order, cuts) if len(edges) > 0)


def _adds_a_match(order: IntArray, picks: IntArray, targets: IntArray) -> BoolArray:
    """Whether each pick (n,), entering in the given order, enlarges the maximum matching over the given pairs.

    After a failed search the truths it reached are closed for good: no later path can leave them for a free truth.
    """
    adds = np.zeros(len(order), dtype=np.bool_)
    reachable: dict[int, list[int]] = {}
    for pick, truth in zip(picks.tolist(), targets.tolist(), strict=True):
        reachable.setdefault(pick, []).append(truth)
    pick_of: dict[int, int] = {}
    truth_of = [-1] * len(order)
    closed: set[int] = set()
    for start in (pick for pick in order.tolist() if pick in reachable):
        reached_from: dict[int, int] = {}
        free = _free_truth(start, reachable, pick_of, closed, reached_from)
        if free < 0:
            closed.update(reached_from)
            continue
        adds[start] = True
        while free >= 0:  # hand each truth on the path over to the pick that reached it
            pick = reached_from[free]
            pick_of[free], truth_of[pick], free = pick, free, truth_of[pick]
    return adds


def _free_truth(
    start: int, reachable: dict[int, list[int]], pick_of: dict[int, int], closed: set[int], reached_from: dict[int, int]
) -> int:
    """A free truth at the end of an augmenting path from a pick, or -1; fills reached_from (truth -> pick)."""
    waiting = [start]
    while waiting:
        pick = waiting.pop()
        for truth in reachable[pick]:
            if truth in closed or truth in reached_from:
                continue
            reached_from[truth] = pick
            if truth not in pick_of:
                return truth
            waiting.append(pick_of[truth])
    return -1


def _check_geometry(points: FloatArray, truths: FloatArray, spacing_angstrom: FloatArray) -> None:
    """Raise a UserError unless all coordinates are finite and the spacing (3,) is positive."""
    assert spacing_angstrom.shape == (3,), f"Expected a spacing (3,) along z, y, x, got {spacing_angstrom.shape}"
    _check_numbers("points", points)
    _check_numbers("true points", truths)
    if not (np.isfinite(spacing_angstrom).all() and (spacing_angstrom > 0).all()):
        raise data_error(f"voxel spacing {spacing_angstrom.tolist()} angstrom: expected finite numbers > 0")


def _check_numbers(name: str, values: FloatArray) -> None:
    """Raise a UserError unless all values are finite."""
    if not np.isfinite(values).all():
        raise data_error(f"{name}: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite numbers")
