"""Fragments and how they touch: for every pair the number of contacts and the sum of affinities across them, exactly.

All entries are counts, so graphs of blocks (with ids that mean the same everywhere) add up to the graph of the whole.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from em_segmentation.decoding.links import Link, Volume, link_affinities, shape_of, sides
from em_segmentation.regions import Triple

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
SLAB_VOXELS = 2**20
GREYS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class RegionGraph:
    """Edges between fragments, sorted by (u, v), u < v, ids from 1; no pair twice."""

    u: Ids  # (num_edges,)
    v: Ids
    contacts: Counts  # pairs of voxels
    total: Counts  # sum of their affinities 0..255
    histogram: Counts  # (num_edges, bins) of affinities; 0 bins where none is kept

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean affinity 0..255 of each edge."""
        return self.total / np.maximum(self.contacts, 1)


def region_graph(labels: Ids, volume: Volume, links: tuple[Link, ...], bins: int) -> RegionGraph:
    """The graph of labels [z, y, x] by the affinities volume [c, z, y, x] of some links.

    bins: of the histograms, a divisor of 256, or 0 for none.
    """
    shape = shape_of(labels)
    return region_graph_of_block(labels, volume, links, bins, (0, 0, 0), shape)


def region_graph_of_block(
    labels: Ids, volume: Volume, links: tuple[Link, ...], bins: int, start: Triple, stop: Triple
) -> RegionGraph:
    """The same of contacts whose lower voxel lies from start to before stop of labels [z, y, x]."""
    assert bins == 0 or GREYS % bins == 0, f"Expected a divisor of {GREYS} as number of bins, got {bins}"
    span = int(labels.max()) + 1 if labels.size else 1
    assert span < 2**27, f"Expected less than 2^27 fragments in a block, got {span}"
    depth = max(1, SLAB_VOXELS // max(1, labels[0].size)) if len(labels) else 1
    coded = [np.empty(0, np.int64)]
    for link in links:
        for first in range(start[0], stop[0], depth):
            slab_start = (first, start[1], start[2])
            slab_stop = (min(first + depth, stop[0]), stop[1], stop[2])
            coded.append(_coded_contacts(labels, volume, link, slab_start, slab_stop, span))
    codes = np.concatenate(coded)
    codes.sort()  # (pair, affinity): sorting the numbers themselves is several times faster than sorting an index
    return _summed(codes, span, bins)


def _coded_contacts(labels: Ids, volume: Volume, link: Link, start: Triple, stop: Triple, span: int) -> Counts:
    """(u * span + v) * 256 + affinity of every contact (num_contacts,)."""
    lower, upper = sides(start, stop, shape_of(labels), link.offset)
    low, high = labels[lower], labels[upper]
    touching = np.flatnonzero((low != high) & (low != 0) & (high != 0))
    low, high = low.reshape(-1)[touching], high.reshape(-1)[touching]
    affinity = link_affinities(volume, link, lower, upper).reshape(-1)[touching]
    codes = np.minimum(low, high).astype(np.int64)
    codes *= span
    codes += np.maximum(low, high)
    codes *= GREYS
    codes += affinity
    return codes


def _summed(codes: Counts, span: int, bins: int) -> RegionGraph:
    """One edge per pair from sorted codes."""
    if len(codes) == 0:
        return empty_graph(bins)
    pairs, affinity = codes >> 8, codes & 255
    starts = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), pairs[1:] != pairs[:-1]]))
    contacts = np.diff(starts, append=len(codes))
    histogram = np.zeros((len(starts), bins), np.int64)
    if bins:
        edge = np.repeat(np.arange(len(starts)), contacts)
        cell = edge * bins + affinity // (GREYS // bins)
        histogram = np.bincount(cell, minlength=len(starts) * bins).reshape(len(starts), bins)
    unique = pairs[starts]
    u, v = (unique // span).astype(np.int32), (unique % span).astype(np.int32)
    return RegionGraph(u, v, contacts, np.add.reduceat(affinity, starts), histogram)


def empty_graph(bins: int) -> RegionGraph:
    """No edges."""
    none = np.empty(0, np.int64)
    return RegionGraph(none.astype(np.int32), none.astype(np.int32), none, none, np.empty((0, bins), np.int64))


def relabelled_graph(graph: RegionGraph, mapping: Ids) -> RegionGraph:
    """The graph after fragment f became mapping[f]: parallel edges added, inner ones and those of 0 dropped."""
    u, v = mapping[graph.u], mapping[graph.v]
    kept = np.flatnonzero((u != v) & (u != 0) & (v != 0))
    low, high = np.minimum(u, v)[kept], np.maximum(u, v)[kept]
    codes = low.astype(np.int64) * (int(mapping.max()) + 1 if mapping.size else 1) + high
    order = np.argsort(codes, kind="stable")
    if len(order) == 0:
        return empty_graph(graph.histogram.shape[1])
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    first, rows = order[starts], kept[order]
    return RegionGraph(
        low[first],
        high[first],
        np.add.reduceat(graph.contacts[rows], starts),
        np.add.reduceat(graph.total[rows], starts),
        np.add.reduceat(graph.histogram[rows], starts, axis=0),
    )


def added_graphs(graphs: list[RegionGraph], mapping: Ids) -> RegionGraph:
    """The graph of all contacts of several graphs, after fragment f became mapping[f]."""
    joined = RegionGraph(
        np.concatenate([graph.u for graph in graphs]),
        np.concatenate([graph.v for graph in graphs]),
        np.concatenate([graph.contacts for graph in graphs]),
        np.concatenate([graph.total for graph in graphs]),
        np.concatenate([graph.histogram for graph in graphs]),
    )
    return relabelled_graph(joined, mapping)
