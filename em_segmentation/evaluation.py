"""Figures of one role's volumes: thresholds from validation, the test volumes judged once, baseline and chance beside.

A volume is judged in pieces; their counts add up to its figures, and resampling them gives the intervals.
"""

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from common.metrics.intervals import Interval, bootstrap_interval
from common.metrics.segmentation import (
    Overlaps,
    adapted_rand,
    add_overlaps,
    boundary_f1,
    count_overlaps,
    cremi_score,
    foreground_rand,
    instance_scores,
    variation_of_information,
    without_truth,
)
from em_segmentation.config import Evaluation

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Slices = tuple[slice, slice, slice]
PIECES_PER_AXIS = (4, 2, 2)  # z, y, x, of each volume: what is resampled for the intervals
FEWEST_FOR_INTERVAL = 5  # pieces


def pieces(shape: tuple[int, ...]) -> list[Slices]:
    """A volume in up to 4 x 2 x 2 boxes of about equal size."""
    axes = []
    for n, count in zip(shape, PIECES_PER_AXIS, strict=True):
        ends = np.unique(np.linspace(0, n, min(n, count) + 1).round().astype(int))
        axes.append([slice(int(a), int(b)) for a, b in itertools.pairwise(ends)])
    return [(z, y, x) for z, y, x in itertools.product(*axes)]


def mask_counts(truth: Mask, found: Mask, annotated: Mask) -> Counts:
    """Per piece: voxels of both, of the truth, of what was found; (pieces, 3)."""
    rows = []
    for where in pieces(truth.shape):
        t, f, a = truth[where], found[where], annotated[where]
        rows.append([int((t & f & a).sum()), int((t & a).sum()), int((f & a).sum())])
    return np.array(rows, np.int64)


def jaccard_of(counts: Counts) -> float:
    """Jaccard index of pooled counts (pieces, 3); 1 where there is nothing and nothing was found."""
    both, truth, found = counts.sum(0)
    return float(both / (truth + found - both)) if truth + found else 1.0


def dice_of(counts: Counts) -> float:
    both, truth, found = counts.sum(0)
    return float(2 * both / (truth + found)) if truth + found else 1.0


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


def best_mask_threshold(histogram: ByteHistogram) -> tuple[int, float]:
    """The byte t whose mask (values >= t) has the highest Jaccard index, and that index; of equals the middle one."""
    found_inside = histogram.inside[::-1].cumsum()[::-1]
    found_outside = histogram.outside[::-1].cumsum()[::-1]
    union = histogram.inside.sum() + found_outside
    jaccard = np.where(union > 0, found_inside / np.maximum(union, 1), 1.0)[1:]  # t from 1: 0 would be everything
    best = np.flatnonzero(jaccard == jaccard.max())
    return int(best[len(best) // 2]) + 1, float(jaccard.max())


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


def truth_of(labels: Ids, annotated: Mask, settings: Evaluation) -> Ids:
    """True ids, 0 where nobody looked and for objects that are too small to be judged."""
    ids = np.where(annotated, labels, 0)
    if settings.min_object_voxels <= 1:
        return ids
    values, number, counts = np.unique(ids, return_inverse=True, return_counts=True)
    values = np.where(counts < settings.min_object_voxels, 0, values)
    return np.asarray(values[number].reshape(ids.shape))


def overlap_pieces(truth: Ids, found: npt.NDArray[np.integer]) -> list[Overlaps]:
    """The table of overlaps of each piece of a volume, voxels without a true object left out."""
    return [
        without_truth(count_overlaps(np.ascontiguousarray(truth[where]), np.ascontiguousarray(found[where])), 0)
        for where in pieces(truth.shape)
    ]


def shifted(tables: list[list[Overlaps]]) -> list[Overlaps]:
    """The tables of several volumes' pieces with ids made different from volume to volume."""
    result = []
    for number, volume in enumerate(tables):
        step = np.uint64(number << 48)
        for table in volume:
            truth_ids = np.where(table.truth_ids > 0, table.truth_ids + step, table.truth_ids)
            segment_ids = np.where(table.segment_ids > 0, table.segment_ids + step, table.segment_ids)
            result.append(dataclasses.replace(table, truth_ids=truth_ids, segment_ids=segment_ids))
    return result


def rand_error(tables: list[Overlaps]) -> float:
    return adapted_rand(add_overlaps(tables)).error


def instance_figures(tables: list[Overlaps], settings: Evaluation) -> dict[str, float]:
    """All figures of instances from the pieces of all volumes."""
    table = add_overlaps(tables)
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
    for score in instance_scores(table, settings.iou_thresholds):
        figures[f"average_precision_{round(100 * score.iou)}"] = score.average_precision
    objects = int((table.truth_voxels > 0).sum()), int(((table.segment_voxels > 0) & (table.segment_ids > 0)).sum())
    return figures | {"num_true_objects": objects[0], "num_objects": objects[1]}


def interval_of_counts(counts: Counts, settings: Evaluation) -> Interval:
    """Bootstrap interval of the Jaccard index over pieces."""
    return bootstrap_interval(
        lambda chosen: jaccard_of(counts[chosen]),
        len(counts),
        settings.bootstrap_resamples,
        settings.confidence,
        settings.seed,
    )


def interval_of_rand(tables: list[Overlaps], settings: Evaluation) -> Interval:
    """Bootstrap interval of the adapted Rand error over pieces."""
    return bootstrap_interval(
        lambda chosen: rand_error([tables[k] for k in chosen]),
        len(tables),
        settings.bootstrap_resamples,
        settings.confidence,
        settings.seed,
    )


def boundary_figure(
    truth: Ids, found: npt.NDArray[np.integer], voxel_size_nm: tuple[float, float, float], settings: Evaluation
) -> float:
    """Boundary F1 of one volume, where there is truth."""
    judged = np.where(truth > 0, found, 0)
    return boundary_f1(truth, judged, voxel_size_nm, settings.boundary_tolerance_nm)
