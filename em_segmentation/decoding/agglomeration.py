"""Merging fragments best first until no edge of their graph reaches a threshold.

An edge's score is the mean, or a quantile, of the affinities across it; merging adds the counts of parallel edges. Such
a score lies between those of the two edges that became one (the linkage is "reducible"), so pairs that are each other's
best may be merged all at once, with the result of merging one pair at a time (Murtagh 1983). Rounds that find few such
pairs, around fragments with very many neighbours, give way to a queue.
"""

import dataclasses
import heapq

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

from em_segmentation.decoding.region_graph import Counts, Ids, RegionGraph

Scores = npt.NDArray[np.float64]
MEAN = -1  # as `percent`: score by the mean
FEW_PAIRS = 50  # merged in one round, below which the queue is faster
Neighbours = dict[int, dict[int, tuple[Counts, int]]]  # node -> neighbour -> counts, rank


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """Edges of the shrinking graph: end points, additive counts and a rank of their own to break ties."""

    u: Counts  # (num_edges,)
    v: Counts
    counts: Counts  # (num_edges, 2): total and contacts; or (num_edges, bins): the histogram
    rank: Counts  # place of the first of its original edges in the order of (u, v)
    score: Scores  # scores_of the counts

    def only(self, rows: npt.NDArray[np.bool_] | Counts) -> "Edges":
        """Some of them."""
        return Edges(self.u[rows], self.v[rows], self.counts[rows], self.rank[rows], self.score[rows])


def agglomerate(graph: RegionGraph, num_fragments: int, percent: int, thresholds: tuple[int, ...]) -> list[Ids]:
    """Per threshold the object of each fragment (num_fragments + 1,), named by its least fragment; 0 stays 0.

    percent: -1 to score by the mean affinity, or 0..100 for that quantile of the affinities (its bin's lower end).
    thresholds: 0..255, descending; edges with score >= threshold are merged, the highest first; equal scores by the
    least (u, v) among the original edges that an edge consists of.
    """
    assert list(thresholds) == sorted(thresholds, reverse=True), f"Expected descending thresholds, got {thresholds}"
    assert percent == MEAN or graph.histogram.shape[1] > 0, "Quantiles need a graph with histograms"
    counts = np.stack([graph.total, graph.contacts], 1) if percent == MEAN else graph.histogram
    rank = np.arange(len(graph.u), dtype=np.int64)
    edges = Edges(graph.u.astype(np.int64), graph.v.astype(np.int64), counts, rank, scores_of(counts, percent))
    mapping = np.arange(num_fragments + 1, dtype=np.int32)
    results = []
    for threshold in thresholds:
        target, edges = _merge_down_to(edges, num_fragments + 1, percent, threshold, thresholds[-1])
        mapping = target[mapping]
        results.append(mapping)
    return results


def scores_of(counts: Counts, percent: int) -> Scores:
    """Mean affinity, or the lower end of the bin that holds the quantile, of each row of counts (num_edges,)."""
    if percent == MEAN:
        mean: Scores = counts[:, 0] / np.maximum(counts[:, 1], 1)
        return mean
    below = np.cumsum(counts, 1)
    filled: npt.NDArray[np.bool_] = (below * 100 >= percent * below[:, -1:]) & (below > 0)
    lower_end: Scores = filled.argmax(1) * (256.0 / counts.shape[1])
    return lower_end


def _merge_down_to(edges: Edges, num_nodes: int, percent: int, threshold: int, last: int) -> tuple[Ids, Edges]:
    """Node n becomes target[n]; the edges between what is left. `last`: the lowest threshold still to come."""
    target = np.arange(num_nodes, dtype=np.int32)
    while True:
        edges = _that_matter(edges, num_nodes, last)
        pairs = np.flatnonzero(_are_best_of_both(edges, num_nodes) & (edges.score >= threshold))
        if len(pairs) == 0:
            return target, edges
        if len(pairs) < FEW_PAIRS:
            merged = _merge_by_queue(edges, num_nodes, percent, threshold)
            return merged[target], _contracted(edges, merged, percent)
        merged = np.arange(num_nodes, dtype=np.int32)
        merged[np.maximum(edges.u[pairs], edges.v[pairs])] = np.minimum(edges.u[pairs], edges.v[pairs])
        target = merged[target]
        edges = _contracted(edges, merged, percent)


def _best_of_nodes(edges: Edges, num_nodes: int) -> Scores:
    """The highest score of each node's edges, -1 where it has none (num_nodes,)."""
    best = np.full(num_nodes, -1.0)
    np.maximum.at(best, edges.u, edges.score)
    np.maximum.at(best, edges.v, edges.score)
    return best


def _that_matter(edges: Edges, num_nodes: int, last: int) -> Edges:
    """Without edges of nodes none of whose edges reaches the last threshold: scores never rise by merging."""
    best = _best_of_nodes(edges, num_nodes)
    kept = (best[edges.u] >= last) & (best[edges.v] >= last)
    return edges if kept.all() else edges.only(kept)


def _are_best_of_both(edges: Edges, num_nodes: int) -> npt.NDArray[np.bool_]:
    """Which edges are the best (highest score, then least rank) of both their ends (num_edges,)."""
    best = _best_of_nodes(edges, num_nodes)
    first = np.full(num_nodes, np.iinfo(np.int64).max)
    for end in (edges.u, edges.v):
        top = best[end] == edges.score
        np.minimum.at(first, end[top], edges.rank[top])
    found: npt.NDArray[np.bool_] = (first[edges.u] == edges.rank) & (first[edges.v] == edges.rank)
    return found


def _contracted(edges: Edges, merged: Ids, percent: int) -> Edges:
    """The edges after node n became merged[n]; only those that have become parallel to others are counted again."""
    u, v = merged[edges.u].astype(np.int64), merged[edges.v].astype(np.int64)
    low, high = np.minimum(u, v), np.maximum(u, v)
    codes = low * len(merged) + high
    order = np.argsort(codes, kind="stable")
    order = order[(low != high)[order]]
    if len(order) == 0:
        return edges.only(order)
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    first = edges.only(order[starts])
    sizes = np.diff(starts, append=len(order))
    several = np.flatnonzero(sizes > 1)
    if len(several):
        rows, heads = order[np.repeat(sizes > 1, sizes)], np.cumsum(sizes[several]) - sizes[several]
        first.counts[several] = np.add.reduceat(edges.counts[rows], heads, axis=0)
        first.rank[several] = np.minimum.reduceat(edges.rank[rows], heads)
        first.score[several] = scores_of(first.counts[several], percent)
    return dataclasses.replace(first, u=low[order[starts]], v=high[order[starts]])


def _merge_by_queue(edges: Edges, num_nodes: int, percent: int, threshold: int) -> Ids:
    """The same merging, one link at a time; node n becomes target[n]."""
    near = _neighbours(edges)
    start = np.flatnonzero(edges.score >= threshold)
    queue = list(
        zip((-edges.score[start]).tolist(), edges.rank[start].tolist(), edges.u[start].tolist(), edges.v[start].tolist(),
            strict=True)
    )  # fmt: skip
    heapq.heapify(queue)
    absorbed: list[tuple[int, int]] = []
    while queue:
        negative, rank, a, b = heapq.heappop(queue)
        if a not in near or b not in near or b not in near[a]:
            continue  # one of them was absorbed
        counts, current = near[a][b]
        if current != rank or -negative != _score(counts, percent):
            continue  # the link has changed since
        kept, gone = (a, b) if len(near[a]) >= len(near[b]) else (b, a)
        absorbed.append((kept, gone))
        for neighbour in _absorb(near, kept, gone):
            counts, rank = near[kept][neighbour]
            score_now = _score(counts, percent)
            if score_now >= threshold:
                heapq.heappush(queue, (-score_now, rank, kept, neighbour))
    return groups_of_pairs(np.array(absorbed, np.int64).reshape(-1, 2), num_nodes)


def _score(counts: Counts, percent: int) -> float:
    return float(counts[0] / counts[1]) if percent == MEAN else float(scores_of(counts[None], percent)[0])


def _neighbours(edges: Edges) -> Neighbours:
    near: Neighbours = {}
    for row, (u, v, rank) in enumerate(zip(edges.u.tolist(), edges.v.tolist(), edges.rank.tolist(), strict=True)):
        near.setdefault(u, {})[v] = near.setdefault(v, {})[u] = (edges.counts[row], rank)
    return near


def _absorb(near: Neighbours, kept: int, gone: int) -> list[int]:
    """Move the edges of one node to another; the neighbours whose link with `kept` is new or has changed."""
    moved = near.pop(gone)
    del moved[kept], near[kept][gone]
    for neighbour, (counts, rank) in moved.items():
        del near[neighbour][gone]
        if neighbour in near[kept]:
            other, other_rank = near[kept][neighbour]
            counts, rank = counts + other, min(rank, other_rank)
        near[kept][neighbour] = near[neighbour][kept] = (counts, rank)
    return list(moved)


def groups_of_pairs(pairs: Counts, num_nodes: int) -> Ids:
    """The least member of each node's group (num_nodes,) after all pairs (num_pairs, 2) were joined."""
    graph = scipy.sparse.coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(num_nodes,) * 2)
    count, group = scipy.sparse.csgraph.connected_components(graph, directed=False)
    least = np.empty(count, np.int32)
    least[group[::-1]] = np.arange(num_nodes, dtype=np.int32)[::-1]  # the last one written stays: the least
    named: Ids = least[group]
    return named
