"""What is left to do with labels: small objects, and ids that start at 1."""

import numpy as np
import numpy.typing as npt

from em_segmentation.decoding.agglomeration import groups_of_pairs
from em_segmentation.decoding.region_graph import Counts, Ids, RegionGraph, relabelled_graph

Compact = npt.NDArray[np.unsignedinteger]
AnyIds = npt.NDArray[np.integer]


def without_small(sizes: Counts, min_size: int) -> Ids:
    """Mapping that keeps labels of at least min_size voxels and makes others 0; sizes (n + 1,) by label."""
    mapping = np.arange(len(sizes), dtype=np.int32)
    mapping[sizes < min_size] = 0
    return mapping


def small_joined(sizes: Counts, graph: RegionGraph, min_size: int) -> Ids:
    """Mapping that joins labels below min_size voxels to the neighbour of highest mean affinity, again and again.

    Equal means by the least (u, v). A group without neighbours stays as it is. sizes (n + 1,) by label; groups are
    named by their least label.
    """
    mapping = np.arange(len(sizes), dtype=np.int32)
    while len(graph.u):
        is_small = sizes < min_size
        best = np.full(len(sizes), -1.0)
        mean, rank = graph.mean, np.arange(len(graph.u))
        first = np.full(len(sizes), len(graph.u))
        for end in (graph.u, graph.v):
            np.maximum.at(best, end, mean)
        for end in (graph.u, graph.v):
            top = (best[end] == mean) & is_small[end]
            np.minimum.at(first, end[top], rank[top])
        chosen = np.unique(first[first < len(graph.u)])
        if len(chosen) == 0:
            break
        joined = groups_of_pairs(np.stack([graph.u[chosen], graph.v[chosen]], 1).astype(np.int64), len(sizes))
        sizes = np.bincount(joined, sizes.astype(np.float64), len(sizes)).astype(np.int64)
        mapping = joined[mapping]
        graph = relabelled_graph(graph, joined)
    return mapping


def label_sizes(labels: Ids, num_labels: int) -> Counts:
    """Voxels of labels 0..num_labels (num_labels + 1,)."""
    return np.bincount(labels.reshape(-1), minlength=num_labels + 1)


def first_voxels(labels: Ids, num_labels: int) -> Counts:
    """The linear index of the first voxel of labels 0..num_labels (num_labels + 1,); 0 where there is none."""
    first = np.zeros(num_labels + 1, np.int64)
    flat = labels.reshape(-1)
    first[flat[::-1]] = np.arange(flat.size)[::-1]  # the last one written stays: the first voxel
    return first


def numbered_by_appearance(objects: Ids, firsts: Counts) -> tuple[Compact, int]:
    """Objects of labels numbered 1..n by their first voxels (num_labels + 1,), and n; 0 stays 0.

    objects: of each label; firsts: linear index of each label's first voxel.
    """
    first = np.full(len(objects), np.iinfo(np.int64).max)
    np.minimum.at(first, objects, firsts)
    is_used = np.zeros(len(objects), np.bool_)
    is_used[objects] = True
    is_used[0] = False
    used = np.flatnonzero(is_used)
    number = np.zeros(len(objects), smallest_dtype(len(used)))
    number[used[np.argsort(first[used])]] = np.arange(1, len(used) + 1, dtype=number.dtype)
    return number[objects], len(used)


def smallest_dtype(largest: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest of uint8, uint16, uint32, uint64 that holds the id `largest`."""
    return next(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.uint64) if largest <= np.iinfo(kind).max)
