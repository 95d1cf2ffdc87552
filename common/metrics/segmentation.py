"""How well a segmentation agrees with the truth: from the table of overlaps, which is counted once and in pieces.

Instances are integer ids of any width, 0 is background. Two volumes become a sparse table of how many voxels each pair
of ids shares; all figures of instances follow from it, so volumes may be counted block by block and the tables added.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.sparse
import scipy.sparse.csgraph

from common.errors import data_error

Ids = npt.NDArray[np.unsignedinteger] | npt.NDArray[np.signedinteger]
Counts = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
DENSE = 16  # places in a plain table per entry: fuller ones are faster than sorting, emptier ones slower
MOST_THREADS = 8  # that count blocks: numpy lets go of the interpreter meanwhile
BLOCK = 2**20  # voxels counted at once: they and what is made of them stay in the processor's cache


@dataclasses.dataclass(frozen=True, eq=False)
class Overlaps:
    """Pairs of ids that share voxels: truth_ids[row] and segment_ids[column] share `voxels`; each (num_pairs,)."""

    truth_ids: npt.NDArray[np.uint64]  # (num_truths,) ascending
    segment_ids: npt.NDArray[np.uint64]  # (num_segments,) ascending
    row: Counts
    column: Counts
    voxels: Counts

    @property
    def truth_voxels(self) -> Float:
        """Voxels of each true object that are counted (num_truths,)."""
        return np.bincount(self.row, self.voxels.astype(np.float64), len(self.truth_ids)).astype(np.float64)

    @property
    def segment_voxels(self) -> Float:
        """Voxels of each segment that are counted (num_segments,)."""
        return np.bincount(self.column, self.voxels.astype(np.float64), len(self.segment_ids)).astype(np.float64)


def count_overlaps(truth: Ids, segmentation: Ids) -> Overlaps:
    """The table of two label volumes of one shape, any integer dtype up to uint64.

    Labels come in runs along the last axis; counting runs instead of voxels makes the table several times faster.
    Raises a data error for labels that are no whole numbers or negative.
    """
    assert truth.shape == segmentation.shape, f"Expected {truth.shape}, got {segmentation.shape}"
    flat = [_flat("truth", truth), _flat("segmentation", segmentation)]
    blocks = [[labels[first : first + BLOCK] for labels in flat] for first in range(0, max(1, truth.size), BLOCK)]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return add_overlaps(list(pool.map(lambda block: _count_runs(*block), blocks)))


def _flat(name: str, labels: Ids) -> Ids:
    """Labels (voxels,) that are integers."""
    if labels.dtype.kind not in "uib":
        raise data_error(f"{name}: holds {labels.dtype} (expected whole-numbered ids): convert the labels first")
    return labels.reshape(-1).view(np.uint8) if labels.dtype.kind == "b" else labels.reshape(-1)


def _count_runs(truth: Ids, segmentation: Ids) -> Overlaps:
    """The table of flat labels (voxels,)."""
    if truth.size == 0:
        none = np.empty(0, np.uint64)
        return Overlaps(none, none, np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    changes = truth[1:] != truth[:-1]
    changes |= segmentation[1:] != segmentation[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=truth.size)
    truth_ids, row = _numbered(_unsigned("truth", truth.take(starts)))
    segment_ids, column = _numbered(_unsigned("segmentation", segmentation.take(starts)))
    return _sum_pairs(truth_ids, segment_ids, row, column, lengths)


def _unsigned(name: str, labels: Ids) -> Ids:
    """The same labels, none negative, as unsigned integers of their own width."""
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise data_error(f"{name}: holds the id {labels.min()} (expected 0 for background and ids above): renumber it")
    return labels.view(f"u{labels.dtype.itemsize}")


def _numbered(labels: Ids) -> tuple[npt.NDArray[np.uint64], Counts]:
    """The ids there are, ascending, and each label's number among them (labels,)."""
    if int(labels.max()) < DENSE * labels.size:
        places = labels.astype(np.intp)
        seen = np.zeros(int(labels.max()) + 1, np.bool_)
        seen[places] = True
        return np.flatnonzero(seen).astype(np.uint64), (np.cumsum(seen) - 1).take(places)
    ids, number = np.unique(labels, return_inverse=True)
    return ids.astype(np.uint64), number


def _sum_pairs(
    truth_ids: npt.NDArray[np.uint64], segment_ids: npt.NDArray[np.uint64], row: Counts, column: Counts, voxels: Counts
) -> Overlaps:
    """One entry per pair."""
    if len(truth_ids) * len(segment_ids) < DENSE * len(row):
        table = np.bincount(row * len(segment_ids) + column, voxels, len(truth_ids) * len(segment_ids))
        pairs = np.flatnonzero(table)
        rows, columns = np.divmod(pairs, len(segment_ids))
        return Overlaps(truth_ids, segment_ids, rows, columns, table[pairs].astype(np.int64))
    sparse = scipy.sparse.coo_array((voxels, (row, column)), shape=(len(truth_ids), len(segment_ids))).tocsr()
    sparse.sum_duplicates()
    rows = np.repeat(np.arange(len(truth_ids)), np.diff(sparse.indptr))
    return Overlaps(truth_ids, segment_ids, rows, sparse.indices.astype(np.int64), sparse.data)


def add_overlaps(tables: list[Overlaps]) -> Overlaps:
    """The table of several volumes, or of the blocks of one whose ids mean the same everywhere."""
    if len(tables) == 1:
        return tables[0]
    truth_ids = np.unique(np.concatenate([table.truth_ids for table in tables]))
    segment_ids = np.unique(np.concatenate([table.segment_ids for table in tables]))
    rows = [np.searchsorted(truth_ids, table.truth_ids)[table.row] for table in tables]
    columns = [np.searchsorted(segment_ids, table.segment_ids)[table.column] for table in tables]
    voxels = np.concatenate([table.voxels for table in tables])
    return _sum_pairs(truth_ids, segment_ids, np.concatenate(rows), np.concatenate(columns), voxels)


def without_truth(table: Overlaps, ignored: int) -> Overlaps:
    """The table without the voxels of one true id (0: what lies between the objects is not judged)."""
    kept = table.truth_ids[table.row] != ignored
    return dataclasses.replace(table, row=table.row[kept], column=table.column[kept], voxels=table.voxels[kept])


@dataclasses.dataclass(frozen=True)
class RandScore:
    """Adapted Rand error = 1 - F1 of pairs of voxels; precision falls with merges, recall with splits."""

    error: float
    precision: float
    recall: float


def adapted_rand(table: Overlaps) -> RandScore:
    """SNEMI3D's score (Arganda-Carreras et al. 2015) of a table, usually without_truth(table, 0).

    Of all pairs of voxels: precision = pairs together in both / together in the segmentation, recall = / in the truth.
    """
    both = _pairs(table.voxels.astype(np.float64))
    segment, truth = _pairs(table.segment_voxels), _pairs(table.truth_voxels)
    if segment + truth == 0:
        return RandScore(0.0, 1.0, 1.0)  # nothing could be joined and nothing is
    precision, recall = both / segment if segment else 1.0, both / truth if truth else 1.0
    return RandScore(1 - 2 * both / (segment + truth), precision, recall)


def foreground_rand(table: Overlaps) -> float:
    """V_rand of the ISBI 2012 challenge, of without_truth(table, 0): 1 is perfect (Arganda-Carreras et al. 2015, eq. 1).

    sum p_ij^2 / (sum s_i^2 / 2 + sum t_j^2 / 2), where p_ij is the share of voxels in segment i and true object j.
    """
    segment, truth = float((table.segment_voxels**2).sum()), float((table.truth_voxels**2).sum())
    if segment + truth == 0:
        return 1.0
    return float(2 * (table.voxels.astype(np.float64) ** 2).sum() / (segment + truth))


def _pairs(sizes: Float) -> float:
    """Ordered pairs of different voxels inside groups of these sizes."""
    return float((sizes * (sizes - 1)).sum())


@dataclasses.dataclass(frozen=True)
class VariationOfInformation:
    """In bits. split: H(segmentation | truth), merge: H(truth | segmentation) (Meila 2007)."""

    split: float
    merge: float


def variation_of_information(table: Overlaps) -> VariationOfInformation:
    """How many bits the two partitions do not share, of a table, usually without_truth(table, 0)."""
    voxels = table.voxels.astype(np.float64)
    total = voxels.sum()
    if total == 0:
        return VariationOfInformation(0.0, 0.0)
    in_truth = table.truth_voxels[table.row]
    in_segment = table.segment_voxels[table.column]
    split = float((voxels * np.log2(in_truth / voxels)).sum() / total)
    merge = float((voxels * np.log2(in_segment / voxels)).sum() / total)
    return VariationOfInformation(split, merge)


def cremi_score(rand: RandScore, information: VariationOfInformation) -> float:
    """The geometric mean sqrt(ARE * (VOI split + VOI merge)) of the CREMI challenge 2016."""
    return float(np.sqrt(rand.error * (information.split + information.merge)))


@dataclasses.dataclass(frozen=True)
class InstanceScore:
    """Objects found at one threshold of intersection over union; average precision is TP / (TP + FP + FN)."""

    iou: float
    tp: int
    fp: int
    fn: int

    @property
    def average_precision(self) -> float:
        """1 where there is nothing to find and nothing was found."""
        total = self.tp + self.fp + self.fn
        return self.tp / total if total else 1.0

    @property
    def f1(self) -> float:
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else 1.0


def instance_scores(table: Overlaps, thresholds: tuple[float, ...]) -> list[InstanceScore]:
    """Objects matched one to one at IoU >= each threshold, 0 < threshold <= 1; id 0 is background in both.

    Above one half at most one partner qualifies; below, as many pairs as possible are matched. The average precision of
    the Data Science Bowl 2018 (Caicedo et al. 2019), there with > instead of >=.
    """
    objects = (table.truth_ids[table.row] != 0) & (table.segment_ids[table.column] != 0)
    row, column, shared = table.row[objects], table.column[objects], table.voxels[objects].astype(np.float64)
    iou = shared / (table.truth_voxels[row] + table.segment_voxels[column] - shared)
    num_truths = int(((table.truth_ids != 0) & (table.truth_voxels > 0)).sum())
    num_segments = int(((table.segment_ids != 0) & (table.segment_voxels > 0)).sum())
    scores = []
    for threshold in thresholds:
        assert 0 < threshold <= 1, f"Expected a threshold in (0, 1], got {threshold}"
        kept = iou >= threshold
        shape = (len(table.truth_ids), len(table.segment_ids))
        graph = scipy.sparse.csr_array((np.ones(int(kept.sum())), (row[kept], column[kept])), shape=shape)
        tp = int((scipy.sparse.csgraph.maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())
        scores.append(InstanceScore(threshold, tp, num_segments - tp, num_truths - tp))
    return scores


def mask_overlap(truth: Mask, found: Mask, judged: Mask) -> Counts:
    """Voxels of both, of the truth and of what was found, of those that are judged (3,); three masks of one shape."""
    assert truth.shape == found.shape == judged.shape, f"{truth.shape}, {found.shape}, {judged.shape}"
    return np.array([int((truth & found & judged).sum()), int((truth & judged).sum()), int((found & judged).sum())])


def jaccard(overlaps: Counts) -> float:
    """|A and B| / |A or B| of pooled mask_overlap (..., 3); 1 where there is nothing and nothing was found."""
    both, truth, found = overlaps.reshape(-1, 3).sum(0)
    return float(both / (truth + found - both)) if truth + found else 1.0


def dice(overlaps: Counts) -> float:
    """2 |A and B| / (|A| + |B|) of pooled mask_overlap (..., 3); 1 where there is nothing and nothing was found."""
    both, truth, found = overlaps.reshape(-1, 3).sum(0)
    return float(2 * both / (truth + found)) if truth + found else 1.0


def boundary_f1(
    truth: Ids,
    segmentation: Ids,
    judged: npt.NDArray[np.bool_],
    voxel_size_nm: tuple[float, float, float],
    tolerance_nm: float,
) -> float:
    """F1 of boundary voxels that have a boundary of the other volume within a tolerance; 1 where neither has any.

    A boundary voxel differs from a neighbour across a face; those that are not judged do not count. All of one shape.
    Source: Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?", in 3D and physical units.
    """
    lines = [label_boundaries(truth) & judged, label_boundaries(segmentation) & judged]
    if not lines[0].any() or not lines[1].any():
        return float(lines[0].any() == lines[1].any())
    near = [scipy.ndimage.distance_transform_edt(~line, voxel_size_nm) <= tolerance_nm for line in lines]
    recall, precision = float(near[1][lines[0]].mean()), float(near[0][lines[1]].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def label_boundaries(labels: Ids) -> npt.NDArray[np.bool_]:
    """Voxels that differ from a neighbour across a face; of the labels' shape."""
    found = np.zeros(labels.shape, np.bool_)
    for axis in range(labels.ndim):
        low, high = [slice(None)] * labels.ndim, [slice(None)] * labels.ndim
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        differs = labels[tuple(low)] != labels[tuple(high)]
        found[tuple(low)] |= differs
        found[tuple(high)] |= differs
    return found
