"""Region graphs count exactly; merging in rounds is merging one best pair at a time; mutexes are kept."""

import itertools
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import UserError
from common.streams import random_for
from em_segmentation.decoding.agglomeration import MEAN, agglomerate, scores_of
from em_segmentation.decoding.links import Link, affinity_links, boundary_links
from em_segmentation.decoding.mutex import mutex_watershed
from em_segmentation.decoding.region_graph import RegionGraph, added_graphs, region_graph, relabelled_graph

Ids = npt.NDArray[np.int32]
OFFSETS = ((1, 0, 0), (0, -1, 0), (0, 0, 1), (0, 2, -1), (-1, 0, 3))


def naive_graph(
    labels: Ids, volume: npt.NDArray[np.uint8], offsets: tuple[tuple[int, int, int], ...], stored_at: str
) -> dict[tuple[int, int], list[int]]:
    """All affinities per pair, straight from the definition of the two conventions."""
    found: dict[tuple[int, int], list[int]] = {}
    for c, offset in enumerate(offsets):
        for cell in np.ndindex(labels.shape):
            step = np.array(offset) if stored_at == "source" else -np.array(offset)
            other = tuple((np.array(cell) + step).tolist())
            if not all(0 <= a < n for a, n in zip(other, labels.shape, strict=True)):
                continue
            u, v = sorted((int(labels[cell]), int(labels[other])))
            if u and u != v:
                found.setdefault((u, v), []).append(int(volume[(c, *cell)]))
    return found


def as_lists(graph: RegionGraph) -> dict[tuple[int, int], tuple[int, int]]:
    rows = zip(graph.u.tolist(), graph.v.tolist(), graph.contacts.tolist(), graph.total.tolist(), strict=True)
    return {(u, v): (contacts, total) for u, v, contacts, total in rows}


@pytest.mark.parametrize("stored_at", ["source", "destination"])
def test_region_graph_counts_every_contact(stored_at: str) -> None:
    random = random_for("graph", 0)
    labels = random.integers(0, 6, (4, 5, 6)).astype(np.int32)
    volume = random.integers(0, 256, (5, 4, 5, 6), dtype=np.uint8)
    graph = region_graph(labels, volume, affinity_links(OFFSETS, stored_at), 16)
    expected = naive_graph(labels, volume, OFFSETS, stored_at)
    assert as_lists(graph) == {pair: (len(values), sum(values)) for pair, values in expected.items()}
    for row, pair in enumerate(zip(graph.u.tolist(), graph.v.tolist(), strict=True)):
        counted = Counter(value // 16 for value in expected[pair])
        assert graph.histogram[row].tolist() == [counted[b] for b in range(16)]


def test_boundary_maps_count_with_the_larger_of_two_boundaries() -> None:
    volume = np.array([10, 40, 20], np.uint8).reshape(1, 1, 1, 3)
    graph = region_graph(np.array([[[1, 2, 3]]], np.int32), volume, boundary_links(), 0)
    assert as_lists(graph) == {(1, 2): (1, 215), (2, 3): (1, 215)}


def test_graphs_of_relabelled_fragments_and_of_pieces() -> None:
    random = random_for("graph", 1)
    labels = random.integers(0, 9, (4, 6, 6)).astype(np.int32)
    volume = random.integers(0, 256, (3, 4, 6, 6), dtype=np.uint8)
    links = affinity_links(OFFSETS[:3], "source")
    mapping = np.array([0, 1, 1, 2, 0, 3, 3, 1, 4], np.int32)
    whole = region_graph(mapping[labels], volume, links, 8)
    for graph in (
        relabelled_graph(region_graph(labels, volume, links, 8), mapping),
        added_graphs([region_graph(labels, volume, (link,), 8) for link in links], mapping),
    ):
        for field in ("u", "v", "contacts", "total", "histogram"):
            assert np.array_equal(getattr(graph, field), getattr(whole, field)), field


def test_offsets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="channel 1 joins voxels to themselves"):
        affinity_links(((0, 0, 1), (0, 0, 0)), "source")
    with pytest.raises(UserError, match="expected source or destination"):
        affinity_links(((0, 0, 1),), "sink")
    assert affinity_links(((0, 0, -1),), "source") == (Link(0, (0, 0, 1), True, False),)


def random_graph(number: int, num_nodes: int, num_edges: int, levels: int) -> RegionGraph:
    """Few levels of affinity and of contacts make many ties."""
    random = random_for("random graph", number)
    pairs = sorted(
        {(min(a, b), max(a, b)) for a, b in random.integers(1, num_nodes + 1, (num_edges, 2)).tolist() if a != b}
    )
    u, v = np.array(pairs, np.int32).T
    histogram = random.integers(0, 4, (len(u), levels)).astype(np.int64)
    histogram[:, 0] += histogram.sum(1) == 0
    total = histogram @ np.linspace(0, 255, levels).astype(np.int64)
    return RegionGraph(u, v, histogram.sum(1), total, histogram)


def merge_one_by_one(graph: RegionGraph, num_nodes: int, percent: int, threshold: int) -> Ids:
    """Search the best of all edges again after every merge."""
    counts = np.stack([graph.total, graph.contacts], 1) if percent == MEAN else graph.histogram
    edges = {(int(u), int(v)): (counts[i], i) for i, (u, v) in enumerate(zip(graph.u, graph.v, strict=True))}
    mapping = np.arange(num_nodes + 1, dtype=np.int32)
    while edges:
        score = {pair: float(scores_of(row[None], percent)[0]) for pair, (row, _) in edges.items()}
        kept, gone = min(edges, key=lambda pair: (-score[pair], edges[pair][1]))
        if score[kept, gone] < threshold:
            break
        mapping[mapping == gone] = kept
        merged: dict[tuple[int, int], tuple[npt.NDArray[np.int64], int]] = {}
        for (u, v), (row, rank) in edges.items():
            a, b = sorted(kept if end == gone else end for end in (u, v))
            if a != b:
                other = merged[a, b] if (a, b) in merged else (np.zeros_like(row), rank)
                merged[a, b] = (other[0] + row, min(other[1], rank))
        edges = merged
    return mapping


@pytest.mark.parametrize("number", range(8))
def test_rounds_of_mean_linkage_are_the_sequence_of_best_pairs(number: int) -> None:
    graph = random_graph(number, 40, 150, 3 if number % 2 else 6)
    thresholds = (190, 150, 128, 110, 40)
    results = agglomerate(graph, 40, MEAN, thresholds)
    for threshold, result in zip(thresholds, results, strict=True):
        assert np.array_equal(result, merge_one_by_one(graph, 40, MEAN, threshold))
        assert np.array_equal(result, agglomerate(graph, 40, MEAN, (threshold,))[0])


def test_rounds_and_queue_agree_on_a_large_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(100, 3000, 9000, 4)
    results = []
    for few_pairs in (0, 50, 10**9):  # rounds only, as usual, queue only
        monkeypatch.setattr("em_segmentation.decoding.agglomeration.FEW_PAIRS", few_pairs)
        results.append([agglomerate(graph, 3000, MEAN, (150, 120))])
    assert all(np.array_equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(results[0][0], results[2][0], strict=True))
    assert 100 < len(np.unique(results[0][0][1])) < 2900


@pytest.mark.parametrize("percent", [25, 50, 85])
def test_quantile_linkage_without_ties_is_the_sequence_of_best_pairs(percent: int) -> None:
    for number in range(4):
        random = random_for("quantile", number)
        graph = random_graph(number, 12, 24, 2)
        affinity = random.permutation(256)[: len(graph.u)]  # one affinity per edge, all different
        histogram = np.zeros((len(graph.u), 256), np.int64)
        histogram[np.arange(len(graph.u)), affinity] = 1 + 2 ** np.arange(
            len(graph.u)
        )  # each outweighs the ones before
        graph = RegionGraph(graph.u, graph.v, histogram.sum(1), histogram @ np.arange(256), histogram)
        for threshold in (200, 120, 30):
            result = agglomerate(graph, 12, percent, (threshold,))[0]
            assert np.array_equal(result, merge_one_by_one(graph, 12, percent, threshold))


def test_quantiles_are_those_of_the_sorted_affinities() -> None:
    random = random_for("quantile", 9)
    for _ in range(30):
        values = random.integers(0, 256, int(random.integers(1, 30)))
        row = np.bincount(values, minlength=256)[None]
        for percent in (0, 10, 50, 75, 100):
            place = max(0, -(-percent * len(values) // 100) - 1)
            assert scores_of(row, percent)[0] == np.sort(values)[place]


def test_a_hub_with_very_many_neighbours_is_merged_quickly() -> None:
    leaves = np.arange(2, 4002, dtype=np.int32)
    ring = np.stack([leaves, np.roll(leaves, 1)]).astype(np.int64)
    pairs = np.concatenate([np.stack([np.ones(4000, np.int64), leaves]), np.sort(ring, 0)], 1)
    total = np.concatenate([150 + np.arange(4000) % 100, np.full(4000, 10)])
    order = np.lexsort((pairs[1], pairs[0]))
    u, v = pairs[:, order].astype(np.int32)
    graph = RegionGraph(u, v, np.ones(8000, np.int64), total[order], np.empty((8000, 0), np.int64))
    result = agglomerate(graph, 4001, MEAN, (140,))[0]
    assert result[1] == 1 and len(np.unique(result)) < 3000


def naive_mutex(attractive: RegionGraph, repulsive: RegionGraph, num_nodes: int) -> list[frozenset[int]]:
    """The definition with sets: walk all edges by strength, look up every exclusion among the members."""
    edges = [(-mean, 0, i, u, v) for i, (mean, u, v) in
             enumerate(zip(attractive.mean.tolist(), attractive.u.tolist(), attractive.v.tolist(), strict=True))]  # fmt: skip
    edges += [(mean - 255, 1, i, u, v) for i, (mean, u, v) in
              enumerate(zip(repulsive.mean.tolist(), repulsive.u.tolist(), repulsive.v.tolist(), strict=True))]  # fmt: skip
    group = {n: frozenset([n]) for n in range(1, num_nodes + 1)}
    excluded: set[frozenset[int]] = set()
    for _, repels, _, u, v in sorted(edges):
        if group[u] == group[v]:
            continue
        if repels:
            excluded.add(frozenset((u, v)))
        elif not any(frozenset(pair) in excluded for pair in itertools.product(group[u], group[v])):
            joined = group[u] | group[v]
            group.update(dict.fromkeys(joined, joined))
    return [group[n] for n in range(1, num_nodes + 1)]


@pytest.mark.parametrize("number", range(6))
def test_mutex_watershed_of_single_voxels_is_that_of_its_definition(number: int) -> None:
    random = random_for("mutex", number)
    labels = np.arange(1, 61, dtype=np.int32).reshape(3, 4, 5)
    volume = random.integers(0, 256 if number % 2 else 5, (5, 3, 4, 5)).astype(np.uint8)
    if number % 2 == 0:
        volume[3:] = volume[3:] // 2 + 127
    links = affinity_links(OFFSETS, "source")
    attractive = region_graph(labels, volume, links[:3], 0)
    repulsive = region_graph(labels, volume, links[3:], 0)
    result = mutex_watershed(attractive, repulsive, 60)
    expected = naive_mutex(attractive, repulsive, 60)
    assert result[0] == 0 and result[1:].tolist() == [min(group) for group in expected]
    assert 1 < len(set(expected)) < 60


def test_an_exclusion_outlives_any_number_of_joins() -> None:
    def graph(edges: list[tuple[int, int, int]]) -> RegionGraph:
        u, v, total = np.array(edges, np.int64).reshape(-1, 3).T
        none = np.empty((len(u), 0), np.int64)
        return RegionGraph(u.astype(np.int32), v.astype(np.int32), np.ones(len(u), np.int64), total, none)

    chain = graph([(1, 2, 200), (2, 3, 210), (3, 4, 100), (4, 5, 220), (5, 6, 230)])
    assert mutex_watershed(chain, graph([(1, 6, 5)]), 6).tolist() == [0, 1, 1, 1, 4, 4, 4]
    assert mutex_watershed(chain, graph([(1, 6, 250)]), 6).tolist() == [0, 1, 1, 1, 1, 1, 1]
