"""Figures of one role's volumes: thresholds from validation, the test volumes judged once, baseline and chance beside.

A volume is judged in pieces; their counts add up to its figures, and resampling them gives the intervals.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.sparse

from common.metrics.intervals import Interval, bootstrap_interval
from common.metrics.segmentation import (
    InstanceScore,
    Overlaps,
    adapted_rand,
    add_overlaps,
    boundary_f1,
    count_overlaps,
    cremi_score,
    foreground_rand,
    instance_scores,
    jaccard,
    mask_overlap,
    variation_of_information,
    without_truth,
)
from em_segmentation.config_inference import Evaluation

Ids = npt.NDArray[np.int64]
Found = npt.NDArray[np.unsignedinteger] | npt.NDArray[np.signedinteger]
Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Slices = tuple[slice, slice, slice]
PIECES_PER_AXIS = (4, 2, 2)  # z, y, x, of each volume: what is resampled for the intervals


def pieces(shape: tuple[int, ...]) -> list[Slices]:
    """A volume in up to 4 x 2 x 2 boxes of about equal size."""
    axes = []
    for n, count in zip(shape, PIECES_PER_AXIS, strict=True):
        ends = np.unique(np.linspace(0, n, min(n, count) + 1).round().astype(int))
        axes.append([slice(int(a), int(b)) for a, b in itertools.pairwise(ends)])
    return [(z, y, x) for z, y, x in itertools.product(*axes)]


def mask_counts(truth: Mask, found: Mask, annotated: Mask) -> Counts:
    """Per piece: voxels of both, of the truth, of what was found; (pieces, 3)."""
    return np.stack([mask_overlap(truth[where], found[where], annotated[where]) for where in pieces(truth.shape)])


@dataclasses.dataclass(frozen=True)
class ByteHistogram:
    """How many annotated voxels of each byte lie inside and outside a true mask; (256,) each."""

    inside: Counts
    outside: Counts

    @staticmethod
    def of(values: Bytes, truth: Mask, annotated: Mask) -> "ByteHistogram":
        inside = np.bincount(values[truth & annotated].ravel(), minlength=256)
        return ByteHistogram(inside, np.bincount(values[~truth & annotated].ravel(), minlength=256))

    def __add__(self, other: "ByteHistogram") -> "ByteHistogram":
        return ByteHistogram(self.inside + other.inside, self.outside + other.outside)


def jaccard_curve(histogram: ByteHistogram) -> npt.NDArray[np.float64]:
    """The Jaccard index of the mask values >= t for t = 1 .. 255 (255,); 1 where there is nothing and nothing is found."""
    found_inside = histogram.inside[::-1].cumsum()[::-1]
    found_outside = histogram.outside[::-1].cumsum()[::-1]
    union = histogram.inside.sum() + found_outside
    return np.where(union > 0, found_inside / np.maximum(union, 1), 1.0)[1:]  # t = 0 would be everything


def best_mask_threshold(curve: npt.NDArray[np.float64]) -> int:
    """The byte t of a jaccard_curve's highest value; of equals the middle one."""
    best = np.flatnonzero(curve == curve.max())
    return int(best[len(best) // 2]) + 1


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure of the validation volumes over the thresholds 0..255 that were tried, and the one that was chosen."""

    name: str
    thresholds: list[int]
    values: list[float]
    chosen: int


def otsu_threshold(image: npt.NDArray[np.floating]) -> float:
    """The grey value that parts an image into two classes of least variance (Otsu 1979), from 256 bins."""
    counts, edges = np.histogram(image, 256)
    middles = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = (counts * middles).cumsum()
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * (mean_above - mean_below) ** 2)])


def dark_as_boundary(image: npt.NDArray[np.floating]) -> Bytes:
    """Grey values as boundary bytes, the darkest 255: what a watershed of the raw image floods. [1, z, y, x]"""
    low, high = np.percentile(image, [0.5, 99.5])
    scaled: Bytes = np.clip((high - image) / max(high - low, 1e-6) * 255, 0, 255).round().astype(np.uint8)
    return scaled[None]


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """True instances [z, y, x], 0 between objects, and which voxels are judged at all."""

    ids: Ids
    judged: Mask


def truth_of(labels: Ids, annotated: Mask, settings: Evaluation) -> Truth:
    """Not judged: what nobody looked at, and objects that are too small."""
    ids = np.where(annotated, labels, 0)
    if settings.min_object_voxels <= 1:
        return Truth(ids, annotated)
    values, number, counts = np.unique(ids, return_inverse=True, return_counts=True)
    is_small = ((counts < settings.min_object_voxels) & (values != 0))[number].reshape(ids.shape)
    return Truth(np.where(is_small, 0, ids), annotated & ~is_small)


def overlap_pieces(truth: Truth, found: Found) -> list[Overlaps]:
    """The table of overlaps of the judged voxels of each piece of a volume."""
    tables = []
    for where in pieces(truth.ids.shape):
        judged = truth.judged[where]
        tables.append(count_overlaps(truth.ids[where][judged], found[where][judged]))
    return tables


def in_objects(volumes: list[list[Overlaps]]) -> list[Overlaps]:
    """The tables of all pieces of several volumes, where there are true objects, with ids told apart by volume.

    What is not found (0) in one volume is not the same as in another.
    """
    result: list[Overlaps] = []
    truths = segments = np.uint64(0)
    for tables in volumes:
        together = add_overlaps(tables)
        for table in tables:
            kept = without_truth(table, 0)
            truth_ids = truths + np.searchsorted(together.truth_ids, kept.truth_ids).astype(np.uint64)
            segment_ids = segments + np.searchsorted(together.segment_ids, kept.segment_ids).astype(np.uint64)
            result.append(dataclasses.replace(kept, truth_ids=truth_ids, segment_ids=segment_ids))
        truths, segments = truths + np.uint64(len(together.truth_ids)), segments + np.uint64(len(together.segment_ids))
    return result


def rand_error(volumes: list[list[Overlaps]]) -> float:
    """Adapted Rand error over all volumes."""
    return adapted_rand(add_overlaps(in_objects(volumes))).error


def instance_figures(volumes: list[list[Overlaps]], settings: Evaluation) -> dict[str, float]:
    """All figures of instances from the pieces of all volumes.

    Rand and information where there are true objects; average precision, and the number of objects, over all that is
    judged: a found object in the background is a false one.
    """
    table = add_overlaps(in_objects(volumes))
    rand, information = adapted_rand(table), variation_of_information(table)
    figures = {
        "adapted_rand_error": rand.error,
        "rand_precision": rand.precision,
        "rand_recall": rand.recall,
        "v_rand": foreground_rand(table),
        "voi_split": information.split,
        "voi_merge": information.merge,
        "cremi_score": cremi_score(rand, information),
    }
    wholes = [add_overlaps(tables) for tables in volumes]
    scores = [instance_scores(one, settings.iou_thresholds) for one in wholes]
    for position, iou in enumerate(settings.iou_thresholds):
        own = [score[position] for score in scores]
        total = InstanceScore(iou, sum(s.tp for s in own), sum(s.fp for s in own), sum(s.fn for s in own))
        figures[f"average_precision_{round(100 * iou)}"] = total.average_precision
    figures["num_true_objects"] = sum(int((one.truth_ids > 0).sum()) for one in wholes)
    figures["num_objects"] = sum(int((one.segment_ids > 0).sum()) for one in wholes)
    return figures


def interval_of_counts(counts: Counts, settings: Evaluation) -> Interval:
    """Bootstrap interval of the Jaccard index over pieces."""
    return interval_over_pieces(lambda chosen: jaccard(counts[chosen]), len(counts), settings)


def interval_of_rand(volumes: list[list[Overlaps]], settings: Evaluation) -> Interval:
    """Bootstrap interval of the adapted Rand error over pieces.

    With piece k drawn w_k times, pairs of voxels inside it count w_k times and those between it and piece l w_k w_l n / (n - 1)
    times, as often as in the sample in the mean; the copies of a piece have no pairs between them. The pieces' products G hold
    all that is needed: no resample needs the tables. The interval is widened to hold the estimate.
    """
    tables = in_objects(volumes)
    table = add_overlaps(tables)
    if len(table.voxels) == 0:
        return Interval(0.0, 0.0, 0.0)  # nothing could be joined and nothing is
    pairs = scipy.sparse.vstack([row_of_pairs(one, table) for one in tables]).tocsr()  # (pieces, pairs)
    of_row, of_column = (
        scipy.sparse.csr_array((np.ones(len(group)), (np.arange(len(group)), group)))
        for group in (table.row, table.column)
    )
    products = [(one @ one.T).toarray() for one in (pairs, pairs @ of_row, pairs @ of_column)]
    within = [np.diag(one) - pairs.sum(1) for one in products]  # pairs of different voxels
    between = [(one - np.diag(np.diag(one))) * len(tables) / max(1, len(tables) - 1) for one in products]

    def error(chosen: Counts) -> float:
        weights = np.bincount(chosen, minlength=len(tables)).astype(np.float64)
        both, truth, segment = (
            float(weights @ far @ weights + weights @ near) for far, near in zip(between, within, strict=True)
        )
        return 1 - 2 * both / (truth + segment) if truth + segment > 0 else 0.0

    found, estimate = interval_over_pieces(error, len(tables), settings), adapted_rand(table).error
    return Interval(estimate, min(found.low, estimate), max(found.high, estimate))


def row_of_pairs(piece: Overlaps, table: Overlaps) -> scipy.sparse.csr_array:
    """A piece's voxels of each pair of ids of the table of all pieces, (1, pairs)."""
    width = len(table.segment_ids)
    row = np.searchsorted(table.truth_ids, piece.truth_ids)[piece.row]
    column = np.searchsorted(table.segment_ids, piece.segment_ids)[piece.column]
    place = np.searchsorted(table.row * width + table.column, row * width + column)
    return scipy.sparse.csr_array(
        (piece.voxels.astype(np.float64), (np.zeros(len(place), np.int64), place)), shape=(1, len(table.voxels))
    )


def interval_over_pieces(statistic: Callable[[Counts], float], n: int, settings: Evaluation) -> Interval:
    return bootstrap_interval(statistic, n, settings.bootstrap_resamples, settings.confidence, settings.seed)


def boundary_figure(
    truth: Truth, found: Found, voxel_size_nm: tuple[float, float, float], by_section: bool, settings: Evaluation
) -> float:
    """Boundary F1 of one volume, in and between true objects; by_section: the mean of its sections, each by itself.

    Labels that leave membranes 0 and labels that touch mean the same boundaries: true objects are grown by the tolerance.
    """
    tolerance = settings.boundary_tolerance_nm
    step = 1 if by_section else len(found)
    figures = []
    for first in range(0, len(found), step):
        part = slice(first, first + step)
        ids = grown_into_gaps(truth.ids[part], voxel_size_nm, tolerance)
        judged = truth.judged[part] & (ids > 0)
        figures.append(boundary_f1(ids, found[part], judged, voxel_size_nm, tolerance))
    return float(np.mean(figures))


def grown_into_gaps(ids: Ids, voxel_size_nm: tuple[float, float, float], reach_nm: float) -> Ids:
    """Ids [z, y, x] with every 0 that lies within reach of an object given to the nearest."""
    if (ids > 0).all() or not (ids > 0).any():
        return ids
    distance, (z, y, x) = scipy.ndimage.distance_transform_edt(ids == 0, voxel_size_nm, return_indices=True)
    grown: Ids = np.where(distance <= reach_nm, ids[z, y, x], 0)
    return grown
