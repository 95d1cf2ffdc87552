"""Watershed by steepest descent: every voxel points to its lowest face neighbour, and basins merge over their passes.

The order of voxels is strict: by height, then by linear index (the position in z, y, x order). So every voxel has one
lowest neighbour, plateaus fall apart into basins of depth 0 that merge again, and nothing depends on chance or blocks.
Basins are merged on the list of contacts between them, never voxel by voxel.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

from em_segmentation.decoding.heights import CACHED_VOXELS, LARGEST_HEIGHT, HeightMap, Heights, Mask
from em_segmentation.decoding.links import STEPS, shape_of, sides
from em_segmentation.regions import Triple

Labels = npt.NDArray[np.int32]
Index = npt.NDArray[np.int64]
Flow = npt.NDArray[np.signedinteger]  # linear indices, of 32 bits where they suffice
Codes = npt.NDArray[np.uint8]
NO_WAY = 2**31 - 1
SELF = 3  # codes of directions 0..6 ascend with the neighbour's linear index: -z -y -x self +x +y +z
VOLUME_AXES = (0, 1, 2)
SECTION_AXES = (1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """Contacts of neighbouring basins, each (num_contacts,).

    key: (height of the pass) * unit + a number of its own for every contact of the whole volume: a strict order.
    """

    low: npt.NDArray[np.int32]  # label of the voxel with the smaller linear index
    high: npt.NDArray[np.int32]
    key: Index
    unit: int

    def relabelled(self, mapping: npt.NDArray[np.int32]) -> "Passes":
        """The contacts between different labels after label l became mapping[l]."""
        low, high = mapping[self.low], mapping[self.high]
        kept = np.flatnonzero(low != high)
        return Passes(low[kept], high[kept], self.key[kept], self.unit)

    def lowest_of_pairs(self) -> "Passes":
        """Only the lowest contact of each pair of labels."""
        least, greatest = np.minimum(self.low, self.high), np.maximum(self.low, self.high)
        order = np.lexsort((self.key, greatest, least))
        is_new = np.ones(len(order), np.bool_)
        is_new[1:] = (np.diff(least[order]) != 0) | (np.diff(greatest[order]) != 0)
        kept = order[is_new]
        return Passes(self.low[kept], self.high[kept], self.key[kept], self.unit)


def watershed(height_map: HeightMap, mask: Mask, axes: tuple[int, ...], min_depth: int) -> Labels:
    """Basins [z, y, x] numbered 1..n by their lowest voxels' linear index; 0 outside the mask.

    axes: of the faces that count, (0, 1, 2) or (1, 2) for every section by itself. Basins whose lowest pass lies at
    most min_depth above their lowest voxel are joined to the neighbour behind it, shallowest passes first; 0 joins
    plateaus only. Pruning by depth is that of Najman and Schmitt 1996 (dynamics), flooding that of Meyer 1994.
    """
    labels, lowest = basins(height_map, mask, axes)
    shape = shape_of(labels)
    passes = find_passes(labels, height_map, ceilings(lowest, min_depth), axes, (0, 0, 0), shape, (0, 0, 0), shape)
    target = merge_shallow(passes, lowest, np.zeros(len(lowest), np.bool_), min_depth)
    mapping = compacted(target)
    return mapping[labels]


def seeded_watershed(height_map: HeightMap, seeds: Labels, mask: Mask, axes: tuple[int, ...]) -> Labels:
    """Every voxel of the mask that can be reached from a seed takes the seed's label; the others are 0.

    seeds [z, y, x]: 0 or a label, any number of voxels per label. A voxel descends until it meets a seed or the floor
    of a basin; basins without a seed join the neighbour behind their lowest pass until one with a seed is reached:
    the minimum spanning forest of basins rooted in the seeds (Meyer 1994; Cousty et al. 2009).
    """
    heights = height_map.heights
    floor = np.int32(heights.min() if heights.size else 0)
    raised = np.where(seeds > 0, floor, heights + np.int32(1))  # seeds are the lowest, so that no way runs past one
    sown = dataclasses.replace(height_map, heights=raised)
    codes = directions(sown, mask, axes)
    codes[(seeds > 0) & mask] = SELF
    parent = descend(codes)
    roots = np.flatnonzero(parent == np.arange(parent.size, dtype=parent.dtype))
    roots = roots[mask.reshape(-1)[roots]]
    seed_of_root = seeds.reshape(-1)[roots]
    num_seeds = int(seeds.max()) if seeds.size else 0
    number = np.where(seed_of_root > 0, seed_of_root, num_seeds + 1 + np.arange(len(roots))).astype(np.int32)
    labels = labels_of_roots(parent, roots, number, mask)
    shape = shape_of(heights)
    ceiling = np.full(num_seeds + len(roots) + 1, LARGEST_HEIGHT, np.int32)
    passes = find_passes(labels, sown, ceiling, axes, (0, 0, 0), shape, (0, 0, 0), shape)
    target = merge_unseeded(passes, num_seeds, num_seeds + len(roots))
    target[target > num_seeds] = 0
    return target[labels]


def basins(height_map: HeightMap, mask: Mask, axes: tuple[int, ...]) -> tuple[Labels, Heights]:
    """Basins [z, y, x] 1..n in the order of their lowest voxels, and the heights of these (n + 1,), first of label 0."""
    parent = descend(directions(height_map, mask, axes))
    roots = np.flatnonzero(parent == np.arange(parent.size, dtype=parent.dtype))
    roots = roots[mask.reshape(-1)[roots]]
    labels = labels_of_roots(parent, roots, np.arange(1, len(roots) + 1, dtype=np.int32), mask)
    return labels, np.concatenate([np.zeros(1, np.int32), height_map.heights.reshape(-1)[roots]])


def ceilings(lowest: Heights, min_depth: int) -> Heights:
    """How high the passes are that can matter to basins with these floors (num_labels,)."""
    return lowest + np.int32(min(min_depth, LARGEST_HEIGHT))


def labels_of_roots(parent: Flow, roots: Index, number: Labels, mask: Mask) -> Labels:
    """Labels [z, y, x]: number[k] for voxels that descend to roots[k], 0 outside the mask."""
    table = np.zeros(parent.size, np.int32)
    table[roots] = number
    return np.take(table, parent).reshape(mask.shape)


def directions(height_map: HeightMap, mask: Mask, axes: tuple[int, ...]) -> Codes:
    """The code of each voxel's lowest face neighbour, or SELF where it is a minimum or outside the mask [z, y, x]."""
    heights = height_map.heights
    assert heights.size == 0 or int(heights.max()) < LARGEST_HEIGHT, "Heights leave no room for the direction's bits"
    codes = np.empty(heights.shape, np.uint8)
    depth = max(1, CACHED_VOXELS // max(1, heights[0].size)) if len(heights) else 1
    for first in range(0, len(heights), depth):
        last = min(first + depth, len(heights))
        begin, end = max(0, first - 1), min(last + 1, len(heights))
        ranked = np.where(mask[begin:end], heights[begin:end], np.int32(LARGEST_HEIGHT - 1)) << 3
        whole = slice(begin, end), slice(0, heights.shape[1]), slice(0, heights.shape[2])
        best = _lowest_neighbours(ranked, axes, height_map.part(whole))[first - begin : last - begin]
        codes[first:last] = best.astype(np.uint8) & 7
    codes[~mask] = SELF
    return codes


def _lowest_neighbours(ranked: Heights, axes: tuple[int, ...], slab: HeightMap) -> Heights:
    """The least of height * 8 + code over a voxel and its neighbours [z, y, x]; codes break ties by linear index.

    ranked: height * 8. Neighbours behind a wall that is higher than the voxel do not count.
    """
    best = ranked + SELF
    for axis in axes:
        lower, upper = sides((0, 0, 0), shape_of(ranked), shape_of(ranked), STEPS[axis])
        from_upper, from_lower = ranked[lower] + axis, ranked[upper] + (6 - axis)
        if len(slab.walls):
            wall = slab.wall_heights(axis, lower) << 3
            from_upper[wall > ranked[upper]] = NO_WAY
            from_lower[wall > ranked[lower]] = NO_WAY
        np.minimum(best[upper], from_upper, out=best[upper])
        np.minimum(best[lower], from_lower, out=best[lower])
    return best


def descend(codes: Codes) -> Flow:
    """The linear index of the floor that each voxel flows to (voxels,), by doubling the ways of all voxels at once.

    First within slabs that fit into the cache, where ways stop before they leave; then from stop to stop.
    """
    plane, row = codes.shape[1] * codes.shape[2], codes.shape[2]
    dtype = np.int32 if codes.size < 2**31 else np.int64
    steps = np.array([-plane, -row, -1, 0, 1, row, plane], dtype)
    parent: Flow = np.empty(codes.size, dtype)
    depth = max(1, CACHED_VOXELS // max(1, plane))
    stops, beyond = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first in range(0, len(codes), depth):
        slab = codes[first : first + depth].reshape(-1)
        start = first * plane
        own: Flow = np.arange(slab.size, dtype=dtype)
        way: Flow = own + np.take(steps, slab)
        leaving = np.flatnonzero((way < 0) | (way >= slab.size))
        stops.append(leaving + start)
        beyond.append(way[leaving] + np.int64(start))
        way[leaving] = own[leaving]
        parent[start : start + slab.size] = followed(way) + dtype(start)
    return _through_stops(parent, np.concatenate(stops), np.concatenate(beyond))


def followed(parent: Flow) -> Flow:
    """Where each node ends, by doubling the ways: parent of the parent until nothing changes (num_nodes,)."""
    while True:
        further = np.take(parent, parent)
        if np.array_equal(further, parent):
            return parent
        parent = further


def _through_stops(parent: Flow, stops: Index, beyond: Index) -> Flow:
    """Ends of all ways (voxels,), from their ends within slabs; ways that stop at stops[k] go on at beyond[k]."""
    if len(stops) == 0:
        return parent
    place = np.empty(parent.size, parent.dtype)  # of a stop among the stops; elsewhere not set
    place[stops] = np.arange(len(stops), dtype=parent.dtype)
    is_stop = np.zeros(parent.size, np.bool_)
    is_stop[stops] = True
    end = parent[beyond]
    goes_on = is_stop[end]
    last = followed(np.where(goes_on, place[np.where(goes_on, end, stops[0])], np.arange(len(stops))))
    parent[stops] = end[last]
    ends: Flow = np.take(parent, parent)
    return ends


def find_passes(
    labels: Labels,
    height_map: HeightMap,
    ceiling: Heights,
    axes: tuple[int, ...],
    start: Triple,
    stop: Triple,
    corner: Triple,
    volume: Triple,
) -> Passes:
    """Contacts between different basins across faces whose lower voxel lies from start to before stop.

    labels, height_map: of a box [z, y, x] whose first voxel is at `corner` of the whole volume, of shape `volume`.
    ceiling (num_labels,): contacts higher than those of both labels are left out.
    """
    box = shape_of(labels)
    voxels = volume[0] * volume[1] * volume[2]
    unit = 3 * voxels  # times a height: decode_blocks sees to it that 63 bits hold it
    lows, highs, keys = [], [], []
    for axis in axes:
        lower, upper = sides(start, stop, box, STEPS[axis])
        for slab_lower, slab_upper in zip(_slabs(lower), _slabs(upper), strict=True):
            low, high = labels[slab_lower], labels[slab_upper]
            met = np.flatnonzero((low != high) & (low != 0) & (high != 0))
            low, high = low.reshape(-1)[met], high.reshape(-1)[met]
            heights = np.maximum(height_map.heights[slab_lower], height_map.heights[slab_upper])
            if len(height_map.walls):
                np.maximum(heights, height_map.wall_heights(axis, slab_lower), out=heights)
            passed = heights.reshape(-1)[met]
            open_ = np.flatnonzero(passed <= np.maximum(ceiling[low], ceiling[high]))
            lows.append(low[open_])
            highs.append(high[open_])
            places = _places(met[open_], slab_lower, corner, volume)
            keys.append(passed[open_].astype(np.int64) * unit + (places * 3 + axis))
    return Passes(
        np.concatenate([np.empty(0, np.int32), *lows]),
        np.concatenate([np.empty(0, np.int32), *highs]),
        np.concatenate([np.empty(0, np.int64), *keys]),
        unit,
    )


def _places(met: Index, where: tuple[slice, slice, slice], corner: Triple, volume: Triple) -> Index:
    """Linear indices in the whole volume of places in a piece of a box."""
    _, height, width = (one.stop - one.start for one in where)
    row, x = np.divmod(met, width)
    z, y = np.divmod(row, height)
    z += where[0].start + corner[0]
    y += where[1].start + corner[1]
    x += where[2].start + corner[2]
    return (z * volume[1] + y) * volume[2] + x


def _slabs(where: tuple[slice, slice, slice]) -> list[tuple[slice, slice, slice]]:
    """The box in pieces of a few sections."""
    area = max(1, (where[1].stop - where[1].start) * (where[2].stop - where[2].start))
    depth = max(1, CACHED_VOXELS // area)
    return [
        (slice(first, min(first + depth, where[0].stop)), where[1], where[2])
        for first in range(where[0].start, where[0].stop, depth)
    ]


def merge_shallow(passes: Passes, lowest: Heights, frozen: npt.NDArray[np.bool_], min_depth: int) -> Labels:
    """Join every basin at most min_depth deep to the neighbour behind its lowest pass; label l becomes target[l].

    lowest: height of each label's floor (n + 1,); frozen (n + 1,): labels with contacts that are not in the list, which
    must not choose yet. A target is the joined label with the deepest floor (the first one of several), so joining in
    blocks first (with frozen rims) and then all together gives what joining at once does.

    Taking passes in ascending order, a basin dies at the pass where it meets an older one (the elder rule). That pass
    is the lowest of the dying basin, so all basins can choose at once: rounds of Boruvka instead of a sorted list.
    """
    target = np.arange(len(lowest), dtype=np.int32)
    depth = lowest.astype(np.int64)
    while len(passes.key):
        best = _lowest_pass(passes, len(lowest))
        low_best, high_best = np.take(best, passes.low) == passes.key, np.take(best, passes.high) == passes.key
        lowest_ones = np.flatnonzero(low_best | high_best)
        low, high = passes.low[lowest_ones], passes.high[lowest_ones]
        height = passes.key[lowest_ones] // passes.unit
        is_chosen = low_best[lowest_ones] & ~frozen[low] & (height - depth[low] <= min_depth)
        is_chosen |= high_best[lowest_ones] & ~frozen[high] & (height - depth[high] <= min_depth)
        if not is_chosen.any():
            break
        roots = joined_labels(low[is_chosen], high[is_chosen], depth)
        frozen = _any_of_group(frozen, roots)
        target = roots[target]
        passes = passes.relabelled(roots)
    return target


def merge_unseeded(passes: Passes, num_seeds: int, num_labels: int) -> Labels:
    """Join labels above num_seeds to the neighbour behind their lowest pass until seeds are met; label l -> target[l]."""
    target = np.arange(num_labels + 1, dtype=np.int32)
    rank = np.arange(num_labels + 1, dtype=np.int64)  # seeds come first
    while len(passes.key):
        best = _lowest_pass(passes, num_labels + 1)
        is_chosen = (best[passes.low] == passes.key) & (passes.low > num_seeds)
        is_chosen |= (best[passes.high] == passes.key) & (passes.high > num_seeds)
        if not is_chosen.any():
            break
        roots = joined_labels(passes.low[is_chosen], passes.high[is_chosen], rank)
        target = roots[target]
        passes = passes.relabelled(roots)
    return target


def _lowest_pass(passes: Passes, num_labels: int) -> Index:
    """The least key among each label's contacts (num_labels,)."""
    best = np.full(num_labels, np.iinfo(np.int64).max)
    np.minimum.at(best, passes.low, passes.key)
    np.minimum.at(best, passes.high, passes.key)
    return best


def joined_labels(low: npt.NDArray[np.integer], high: npt.NDArray[np.integer], rank: Index) -> Labels:
    """The group of each label after pairs (low, high) were joined, named by its member of least (rank, label).

    rank (num_labels,); result (num_labels,).
    """
    num_labels = len(rank)
    ones = np.ones(len(low), np.int8)
    graph = scipy.sparse.coo_array((ones, (low, high)), shape=(num_labels, num_labels))
    count, group = scipy.sparse.csgraph.connected_components(graph, directed=False)
    order = np.argsort(rank, kind="stable")[::-1]
    named = np.empty(count, np.int32)
    named[group[order]] = order  # the last one written stays: the least
    joined: Labels = named[group]
    return joined


def _any_of_group(flags: npt.NDArray[np.bool_], roots: Labels) -> npt.NDArray[np.bool_]:
    """Whether any label of a root's group has the flag, at the root."""
    found = np.zeros(len(flags), np.bool_)
    found[roots[flags]] = True
    return found


def compacted(target: Labels) -> Labels:
    """Targets numbered 1..n in ascending order, 0 stays 0."""
    is_kept = np.zeros(len(target), np.bool_)
    is_kept[target] = True
    is_kept[:1] = False
    number = np.cumsum(is_kept, dtype=np.int32)
    return np.where(target == 0, 0, number[target]).astype(np.int32)
