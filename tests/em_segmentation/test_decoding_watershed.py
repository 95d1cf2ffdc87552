"""Watershed: equal to flooding voxel by voxel, plateaus whole, sections apart, seeds kept."""

import heapq
import itertools

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from common.streams import random_for
from em_segmentation.decoding.heights import (
    HeightMap,
    boundary_sum,
    distance_height,
    foreground,
    smoothed,
    without_walls,
)
from em_segmentation.decoding.links import affinity_links, boundary_links
from em_segmentation.decoding.walls import walls_between
from em_segmentation.decoding.watershed import SECTION_AXES, VOLUME_AXES, basins, seeded_watershed, watershed

Heights = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Cell = tuple[int, int, int]


def random_heights(number: int, shape: Cell, levels: int) -> Heights:
    """A smooth random field of few levels, so that there are plateaus."""
    noise = scipy.ndimage.gaussian_filter(random_for("heights", number).normal(size=shape), 1.0)
    ranks = noise.reshape(-1).argsort().argsort().reshape(shape)
    return (ranks * levels // noise.size).astype(np.int32)


def neighbours(cell: Cell, shape: tuple[int, ...], axes: tuple[int, ...]) -> list[Cell]:
    found = []
    for axis, step in itertools.product(axes, (-1, 1)):
        moved = list(cell)
        moved[axis] += step
        if 0 <= moved[axis] < shape[axis]:
            found.append((moved[0], moved[1], moved[2]))
    return found


def same_partition(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> bool:
    pairs = np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] and bool(((a == 0) == (b == 0)).all())


def naive_watershed(height_map: HeightMap, mask: Mask, axes: tuple[int, ...], min_depth: int) -> npt.NDArray[np.int64]:
    """Follow each voxel down; then take passes in ascending order, the younger floor dies if it is shallow."""
    heights = height_map.heights

    def wall(a: Cell, b: Cell) -> int:
        axis = int(np.flatnonzero(np.subtract(a, b))[0])
        return int(height_map.walls[(axis, *min(a, b))]) * height_map.scale if len(height_map.walls) else 0

    order = {cell: (int(heights[cell]), i) for i, cell in enumerate(np.ndindex(heights.shape)) if mask[cell]}

    def floor(cell: Cell) -> Cell:
        open_ = [n for n in neighbours(cell, heights.shape, axes) if n in order and wall(cell, n) <= heights[cell]]
        lowest = min([cell, *open_], key=order.__getitem__)
        return cell if lowest == cell else floor(lowest)

    floors = {cell: floor(cell) for cell in order}
    flooded, region = {c: c for c in floors.values()}, {c: c for c in floors.values()}

    def root(parent: dict[Cell, Cell], cell: Cell) -> Cell:
        return cell if parent[cell] == cell else root(parent, parent[cell])

    passes = sorted(
        (max(int(heights[a]), int(heights[b]), wall(a, b)), order[a][1], axis, a, b)
        for a in order
        for axis in axes
        for b in [tuple(np.add(a, np.eye(3, dtype=int)[axis]).tolist())]
        if b in order
    )
    for height, _, _, a, b in passes:
        elder, younger = sorted([root(flooded, floors[a]), root(flooded, floors[b])], key=order.__getitem__)
        if elder == younger:
            continue
        flooded[younger] = elder
        if height - order[younger][0] <= min_depth:
            joined = sorted([root(region, floors[a]), root(region, floors[b])], key=order.__getitem__)
            region[joined[1]] = joined[0]
    labels = np.zeros(heights.shape, np.int64)
    for cell in order:
        labels[cell] = order[root(region, floors[cell])][1] + 1
    return labels


@pytest.mark.parametrize("number", range(12))
def test_watershed_equals_flooding_pass_by_pass(number: int) -> None:
    random = random_for("case", number)
    shape = (int(random.integers(1, 7)), int(random.integers(2, 9)), int(random.integers(2, 9)))
    heights = random_heights(number, shape, int(random.integers(3, 60)))
    mask = random.random(shape) < (1.0 if number % 3 else 0.8)
    axes = SECTION_AXES if number % 4 == 3 else VOLUME_AXES
    walls = random.integers(0, 30, (3, *shape), dtype=np.uint8) * (random.random((3, *shape)) < 0.3)
    height_map = HeightMap(heights, 2, walls) if number % 2 else without_walls(heights, 1)
    for depth in (0, 2, 7, 100):
        labels = watershed(height_map, mask, axes, depth)
        assert same_partition(labels, naive_watershed(height_map, mask, axes, depth))
        assert sorted(np.unique(labels[labels > 0])) == list(range(1, labels.max() + 1))


def test_a_plateau_of_any_form_is_one_basin() -> None:
    heights = np.full((3, 9, 9), 5, np.int32)
    heights[:, 4, 1:] = 9  # a wall with one gap, on the level of both halves
    assert watershed(without_walls(heights, 1), np.ones(heights.shape, np.bool_), VOLUME_AXES, 0).max() == 1
    heights[:, 4, 0] = 6
    assert watershed(without_walls(heights, 1), np.ones(heights.shape, np.bool_), VOLUME_AXES, 0).max() == 2
    assert watershed(without_walls(heights, 1), np.ones(heights.shape, np.bool_), VOLUME_AXES, 1).max() == 1


def test_sections_alone_are_the_sections_of_a_stack() -> None:
    heights = random_heights(5, (4, 20, 20), 40)
    mask = np.ones(heights.shape, np.bool_)
    stack = watershed(without_walls(heights, 1), mask, SECTION_AXES, 3)
    for z in range(4):
        assert same_partition(
            stack[z : z + 1], watershed(without_walls(heights[z : z + 1], 1), mask[z : z + 1], VOLUME_AXES, 3)
        )
    assert all(len(np.intersect1d(stack[z], stack[z + 1])) == 0 for z in range(3))


def test_empty_and_masked_volumes() -> None:
    assert watershed(
        without_walls(np.zeros((0, 4, 4), np.int32), 1), np.zeros((0, 4, 4), np.bool_), VOLUME_AXES, 0
    ).shape == (0, 4, 4)
    heights = random_heights(1, (3, 4, 5), 9)
    assert not watershed(without_walls(heights, 1), np.zeros(heights.shape, np.bool_), VOLUME_AXES, 0).any()


def naive_seeded(heights: Heights, seeds: npt.NDArray[np.int32], mask: Mask) -> npt.NDArray[np.int32]:
    """The lowest possible highest point on a way to any seed, per voxel: labels whose way attains it are right."""
    best = np.full((int(seeds.max()) + 1, *heights.shape), 10**6)
    for label in range(1, int(seeds.max()) + 1):
        queue = [(0, cell) for cell in zip(*map(list, np.nonzero((seeds == label) & mask)), strict=True)]
        while queue:
            height, cell = heapq.heappop(queue)
            if height >= best[(label, *cell)]:
                continue
            best[(label, *cell)] = height
            for n in neighbours(cell, heights.shape, VOLUME_AXES):
                if mask[n] and seeds[n] in (0, label):
                    heapq.heappush(queue, (max(height, int(heights[n])), n))
    return best


@pytest.mark.parametrize("number", range(6))
def test_seeded_watershed_reaches_every_voxel_over_the_lowest_pass(number: int) -> None:
    random = random_for("seeds", number)
    heights = random_heights(number, (5, 8, 9), 400)
    mask = random.random(heights.shape) < (1.0 if number % 2 else 0.75)
    seeds = (random.integers(1, 5, heights.shape) * (random.random(heights.shape) < 0.03)).astype(np.int32) * mask
    labels = seeded_watershed(without_walls(heights, 1), seeds, mask, VOLUME_AXES)
    best = naive_seeded(heights, seeds, mask)
    assert (labels[seeds > 0] == seeds[seeds > 0]).all() and not labels[~mask].any()
    reached = best[1:].min(0) < 10**6
    assert ((labels > 0) == (reached & mask)).all()
    # a voxel may lie above its basin's pass; floors must be reached over the lowest of all ways
    floors, _ = basins(without_walls(heights, 1), mask & (seeds == 0), VOLUME_AXES)
    for index in range(1, int(floors.max()) + 1):
        cells = np.argwhere(floors == index)
        cell = tuple(min(cells.tolist(), key=lambda c: (heights[tuple(c)], c)))
        if labels[cell]:
            assert best[(labels[cell], *cell)] == best[(slice(1, None), *cell)].min()


def test_two_seeds_in_one_valley_share_it() -> None:
    heights = np.abs(np.arange(-5, 6, dtype=np.int32))[None, None]
    seeds = np.zeros(heights.shape, np.int32)
    seeds[0, 0, [2, 7]] = 1, 2
    labels = seeded_watershed(without_walls(heights, 1), seeds, np.ones(heights.shape, np.bool_), VOLUME_AXES)
    assert labels[0, 0, :3].tolist() == [1, 1, 1] and labels[0, 0, 7:].tolist() == [2] * 4
    assert set(labels.reshape(-1).tolist()) == {1, 2}


def test_heights_do_not_depend_on_where_affinities_are_stored() -> None:
    offsets = ((1, 0, 0), (0, -1, 0), (0, 0, 1))
    at_source = random_for("stored", 0).integers(0, 256, (3, 4, 5, 6), dtype=np.uint8)
    at_destination = np.zeros_like(at_source)
    for c, offset in enumerate(offsets):
        at_destination[c] = np.roll(at_source[c], offset, (0, 1, 2))  # aff[c, v] -> aff[c, v + offset]
    one = boundary_sum(at_source, affinity_links(offsets, "source"))
    other = boundary_sum(at_destination, affinity_links(offsets, "destination"))
    assert one.scale == other.scale == 6 and (one.heights == other.heights).all()
    weakness = 255 - at_source.astype(int)
    z, y, x = 2, 2, 3
    expected = weakness[0, z, y, x] + weakness[0, z - 1, y, x] + weakness[1, z, y, x] + weakness[1, z, y + 1, x]
    assert one.heights[z, y, x] == expected + weakness[2, z, y, x] + weakness[2, z, y, x - 1]


def test_smoothing_is_binomial_and_exact() -> None:
    heights = random_heights(2, (6, 7, 8), 200)
    result = smoothed(without_walls(heights, 1), (1, 0, 2))
    expected = scipy.ndimage.correlate1d(heights, [1, 2, 1], 0, mode="nearest")
    expected = scipy.ndimage.correlate1d(expected, [1, 4, 6, 4, 1], 2, mode="nearest")
    assert result.scale == 64 and (result.heights == expected).all()


def test_distances_are_capped_squares() -> None:
    inside = np.ones((9, 9, 9), np.bool_)
    inside[4, 4, 4] = False
    heights = distance_height(inside, 3, False).heights
    assert heights[4, 4, 4] == 9 and heights[5, 5, 4] == 7 and heights[0, 4, 4] == 0
    assert not distance_height(np.ones((2, 2, 2), np.bool_), 3, False).heights.any()
    assert distance_height(inside, 3, True).heights[5].sum() == 0


def test_foreground_is_a_threshold_of_mean_affinity() -> None:
    volume = np.array([0, 55, 56, 255], np.uint8).reshape(1, 1, 1, 4)
    summed = boundary_sum(volume, boundary_links())
    assert foreground(summed, 200)[0, 0].tolist() == [True, True, False, False]
    assert foreground(summed, 0).all()


def test_a_boundary_without_thickness_parts_thin_objects() -> None:
    """Two layers, each one voxel thick, between which every affinity is 0: all voxels are equally high."""
    volume = np.full((3, 2, 8, 8), 255, np.uint8)
    volume[0] = 0
    links = affinity_links(((1, 0, 0), (0, 1, 0), (0, 0, 1)), "source")
    summed, mask = boundary_sum(volume, links), np.ones((2, 8, 8), np.bool_)
    assert watershed(summed, mask, VOLUME_AXES, 30).max() == 1
    walled = HeightMap(summed.heights, summed.scale, walls_between(volume, links, 128))
    labels = watershed(walled, mask, VOLUME_AXES, 30)
    assert (labels[0] == 1).all() and (labels[1] == 2).all()
    assert (
        walls_between(volume, links, 0).shape == walls_between(volume[:1], boundary_links(), 128).shape == (0, 2, 8, 8)
    )
    membrane = np.concatenate([volume, np.zeros_like(volume)], 1)  # two more layers that nothing is joined to
    assert not walls_between(membrane, links, 128)[:, 1:].any()
    seeds = np.zeros((2, 8, 8), np.int32)
    seeds[0, 3, 3], seeds[1, 4, 4] = 2, 1
    grown = seeded_watershed(walled, seeds, mask, VOLUME_AXES)
    assert (grown[0] == 2).all() and (grown[1] == 1).all()
