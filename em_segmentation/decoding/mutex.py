"""Mutex watershed of a region graph: strong attractions join fragments, strong repulsions forbid to join them."""

import numpy as np

from em_segmentation.decoding.agglomeration import groups_of_pairs
from em_segmentation.decoding.links import FULL
from em_segmentation.decoding.region_graph import Ids, RegionGraph


def mutex_watershed(attractive: RegionGraph, repulsive: RegionGraph, num_fragments: int) -> Ids:
    """The object of each fragment (num_fragments + 1,), named by its least fragment; 0 stays 0.

    attractive: graph of direct affinities, of strength mean; repulsive: graph of long-range affinities, of strength
    255 - mean. In descending order of strength (equal ones: attractive first, then by (u, v)) an attraction joins two
    objects unless they exclude each other, and a repulsion makes two objects exclude each other unless they are one.
    Source: Wolf et al. 2018, "The mutex watershed: efficient, parameter-free image partitioning", algorithm 1.
    """
    strength = np.concatenate([attractive.mean, FULL - repulsive.mean])
    is_repulsive = np.repeat([False, True], [len(attractive.u), len(repulsive.u)])
    order = np.lexsort((np.arange(len(strength)), is_repulsive, -strength))
    u = np.concatenate([attractive.u, repulsive.u])[order].tolist()
    v = np.concatenate([attractive.v, repulsive.v])[order].tolist()
    parent = list(range(num_fragments + 1))
    excluded: dict[int, set[int]] = {}  # root -> roots that it must not join
    joined: list[tuple[int, int]] = []
    for a, b, repels in zip(u, v, is_repulsive[order].tolist(), strict=True):
        root_a, root_b = _root(parent, a), _root(parent, b)
        if root_a == root_b:
            continue
        if repels:
            excluded.setdefault(root_a, set()).add(root_b)
            excluded.setdefault(root_b, set()).add(root_a)
        elif root_a not in excluded or root_b not in excluded[root_a]:
            joined.append((root_a, root_b))
            _join(parent, excluded, root_a, root_b)
    return groups_of_pairs(np.array(joined, np.int64).reshape(-1, 2), num_fragments + 1)


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], excluded: dict[int, set[int]], a: int, b: int) -> None:
    """Make two roots one; the root with more exclusions stays, so that few have to be rewritten."""
    num_a = len(excluded[a]) if a in excluded else 0
    num_b = len(excluded[b]) if b in excluded else 0
    kept, gone = (a, b) if num_a >= num_b else (b, a)
    parent[gone] = kept
    if gone not in excluded:
        return
    for other in excluded.pop(gone):
        excluded[other].discard(gone)
        excluded[other].add(kept)
        excluded.setdefault(kept, set()).add(other)
