"""What is done with one block in each of the passes; blocks of a pass know nothing of each other.

First: the block's labels. Second: how the labels of the whole volume meet in it. Two more where holes are filled: the
block's pieces of background, and what they touch. Last: the final ids are written.
"""

import dataclasses

import numpy as np

from em_segmentation.decoding.block_grid import Box, Job, LabelWriter
from em_segmentation.decoding.cleaning import first_voxels, label_sizes
from em_segmentation.decoding.components import components_of_faces, joined_faces, touched_voxels
from em_segmentation.decoding.heights import HeightMap, Mask
from em_segmentation.decoding.holes import background_contacts, background_pieces, with_owners
from em_segmentation.decoding.links import STEPS, Link, Volume, link_affinities, sides
from em_segmentation.decoding.pipeline import check_input, heights_of
from em_segmentation.decoding.region_graph import Counts, Ids, RegionGraph, region_graph_of_block
from em_segmentation.decoding.watershed import (
    SELF,
    Codes,
    ceilings,
    descend,
    directions,
    find_passes,
    labels_of_roots,
    merge_shallow,
)
from em_segmentation.regions import Triple

ONE: Triple = (1, 1, 1)
NONE: Triple = (0, 0, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class LocalLabels:
    """A block's labels 1..n and, for those that end in the block, their first or lowest voxel."""

    labels: Ids  # [z, y, x]; `roots` come first, then one label per exit
    roots: Counts  # (num_roots, 2): linear index of the voxel in the volume, and its height
    exits: Counts  # (num_exits,): the voxel of another block that the label's voxels flow to


def label_block(job: Job, number: int) -> None:
    """First pass: labels_N, and of each of its labels the voxels and the first one (stats_N), roots_N and exits_N."""
    if job.has(f"stats_{number}"):
        return
    box = job.grid.box(number)
    local = _local_components(job, box) if job.settings.method == "components" else _local_basins(job, box)
    count = len(local.roots) + len(local.exits)
    stats = np.zeros((count + 1, 2), np.int64)
    stats[:, 0] = label_sizes(local.labels, count)
    stats[:, 1] = _linear(first_voxels(local.labels, count), box, job.grid.shape)
    job.save(f"labels_{number}", local.labels)
    job.save(f"roots_{number}", local.roots)
    job.save(f"exits_{number}", local.exits)
    job.save(f"stats_{number}", stats)


def _local_basins(job: Job, box: Box) -> LocalLabels:
    near = box.widened(ONE, ONE, job.grid.shape)
    height_map, mask = block_heights(job, near)
    kept = box.within(near)
    codes = directions(height_map, mask, job.settings.axes)[kept]
    codes = np.ascontiguousarray(codes)
    inside, heights = mask[kept], height_map.heights[kept]
    is_exit = _leaving(codes)
    linear_step = _steps(job.grid.shape)[codes[is_exit]]
    codes[is_exit] = SELF
    parent = descend(codes)
    is_root = (parent == np.arange(parent.size, dtype=parent.dtype)) & inside.reshape(-1)
    floors, exits = np.flatnonzero(is_root & ~is_exit.reshape(-1)), np.flatnonzero(is_exit)
    ends = np.concatenate([floors, exits])
    labels = labels_of_roots(parent, ends, np.arange(1, len(ends) + 1, dtype=np.int32), inside)
    roots = np.stack([_linear(floors, box, job.grid.shape), heights.reshape(-1)[floors].astype(np.int64)], 1)
    return LocalLabels(labels, roots, _linear(exits, box, job.grid.shape) + linear_step)


def _leaving(codes: Codes) -> Mask:
    """Voxels of a block that point out of it."""
    leaves = np.zeros(codes.shape, np.bool_)
    for axis in range(3):
        for end, code in ((0, axis), (-1, 6 - axis)):
            face: list[slice | int] = [slice(None)] * 3
            face[axis] = end
            leaves[tuple(face)] |= codes[tuple(face)] == code
    return leaves


def _steps(shape: Triple) -> Counts:
    """The change of the linear index in the volume, by code of direction (7,)."""
    plane, row = shape[1] * shape[2], shape[2]
    return np.array([-plane, -row, -1, 0, 1, row, plane], np.int64)


def _linear(places: Counts, box: Box, shape: Triple) -> Counts:
    """Linear indices in the volume of linear indices in a box."""
    z, y, x = (
        one + first for one, first in zip(np.unravel_index(places, box.size), box.start, strict=True)
    )  # each (num_places,)
    linear: Counts = (z * shape[1] + y) * shape[2] + x
    return linear


def block_heights(job: Job, near: Box) -> tuple[HeightMap, Mask]:
    """Heights and mask of a box as those of the whole volume: read with all the voxels they depend on."""
    reach = job.settings.distance_reach if job.settings.height == "distance" else 0
    z, y, x = (radius + reach + 1 for radius in job.settings.smoothing)
    wide = near.widened((z, y, x), (z, y, x), job.grid.shape)
    height_map, mask = heights_of(_read(job, wide), job.settings)
    kept = near.within(wide)
    return height_map.part(kept), np.ascontiguousarray(mask[kept])


def _read(job: Job, box: Box) -> Volume:
    volume = job.read(box)
    check_input(volume.shape[0], volume.dtype, job.settings)
    return volume


def _local_components(job: Job, box: Box) -> LocalLabels:
    near = box.widened(ONE, ONE, job.grid.shape)
    joined = joined_faces(_read(job, near), job.settings.flooded_links, job.settings.threshold)
    kept = box.within(near)
    labels = components_of_faces(np.ascontiguousarray(joined[(slice(None), *kept)]), touched_voxels(joined)[kept])
    linear = _linear(first_voxels(labels, int(labels.max(initial=0)))[1:], box, job.grid.shape)
    return LocalLabels(labels, np.stack([linear, np.zeros_like(linear)], 1), np.empty(0, np.int64))


def compare_block(job: Job, number: int) -> None:
    """Second pass: which labels are one (merged_N), passes between basins (passes_N) and graphs (graph_N, far_N)."""
    if job.has(f"far_{number}"):
        return
    if job.settings.method == "components":
        job.save(f"merged_{number}", _joined_over_faces(job, job.grid.box(number)))
        job.save(f"far_{number}", np.empty((0, 4), np.int64))
    else:
        _compare_basins(job, number)


def _joined_over_faces(job: Job, box: Box) -> Counts:
    """Pairs of nodes (num_pairs, 2) joined between the block and those above it along z, y, x."""
    near = box.widened(NONE, ONE, job.grid.shape)
    nodes, volume = job.nodes(near), _read(job, near)
    pairs = [np.empty((0, 2), np.int64)]
    for link in job.settings.flooded_links:
        axis = link.offset.index(1)
        start, stop = [0, 0, 0], list(box.size)
        start[axis] = stop[axis] - 1
        corners = (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])
        lower, upper = sides(*corners, near.size, link.offset)
        joined = link_affinities(volume, link, lower, upper) >= job.settings.threshold
        met = np.stack([nodes[lower][joined], nodes[upper][joined]], 1).astype(np.int64)
        pairs.append(np.unique(met, axis=0))
    return np.concatenate(pairs)


def _compare_basins(job: Job, number: int) -> None:
    settings, shape, box = job.settings, job.grid.shape, job.grid.box(number)
    wide = box.widened(*_reach(settings.links), shape)
    ids, labels = _present(job.nodes(wide), len(job.mapped("floors")))
    floors = np.asarray(job.mapped("floors")[ids]).astype(np.int32)
    near = box.widened(NONE, ONE, shape)
    in_wide = near.within(wide)
    height_map, _ = block_heights(job, near)
    depth = settings.min_depth * height_map.scale
    passes = find_passes(
        np.ascontiguousarray(labels[in_wide]), height_map, ceilings(floors, depth), settings.axes,
        NONE, box.size, near.start, shape,
    )  # fmt: skip
    frozen = _seen_outside(labels, box, wide, shape, len(ids))
    target = merge_shallow(passes, floors, frozen, depth)
    moved = np.flatnonzero(target != np.arange(len(ids)))
    job.save(f"merged_{number}", np.stack([ids[moved], ids[target[moved]]], 1))
    left = passes.relabelled(target).lowest_of_pairs()
    job.save(f"passes_{number}", np.stack([ids[left.low], ids[left.high], left.key], 1))
    fragments, volume = target[labels], _read(job, wide)
    within = box.within(wide)
    start, stop = _corners(within)
    graph = region_graph_of_block(fragments, volume, settings.direct_links, settings.graph_bins, start, stop)
    _save_graph(job, f"graph_{number}", graph, ids)
    job.save(f"bins_{number}", graph.histogram.astype(np.int32))
    far_links = settings.repulsive_links if settings.method == "mutex" else ()
    _save_graph(job, f"far_{number}", region_graph_of_block(fragments, volume, far_links, 0, start, stop), ids)


def _corners(where: tuple[slice, slice, slice]) -> tuple[Triple, Triple]:
    z, y, x = where
    return (z.start, y.start, x.start), (z.stop, y.stop, x.stop)


def _reach(links: tuple[Link, ...]) -> tuple[Triple, Triple]:
    """How far links lead from a block's voxels, below and above; at least 1 above."""
    offsets = np.array([*(link.offset for link in links), *STEPS])
    below, above = np.maximum(-offsets, 0).max(0).tolist(), offsets.max(0).tolist()
    return (below[0], below[1], below[2]), (above[0], above[1], above[2])


def _present(nodes: Ids, num_nodes: int) -> tuple[Counts, Ids]:
    """The ids there are, ascending from 0, and labels [z, y, x] that count them."""
    is_present = np.zeros(num_nodes, np.bool_)
    is_present[nodes] = True
    is_present[0] = True
    ids = np.flatnonzero(is_present)
    number = np.empty(num_nodes, np.int32)
    number[ids] = np.arange(len(ids), dtype=np.int32)
    return ids, np.take(number, nodes)


def _seen_outside(labels: Ids, box: Box, wide: Box, shape: Triple, num_labels: int) -> Mask:
    """Labels that have voxels next to, or beyond, a face of the block that is none of the volume (num_labels,)."""
    interior = box.widened(NONE, NONE, shape)
    start = [a + (a > 0) for a in interior.start]
    stop = [b - (b < n) for b, n in zip(interior.stop, shape, strict=True)]
    is_outside = np.ones(labels.shape, np.bool_)
    core = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    if min(core.size) > 0:
        is_outside[core.within(wide)] = False
    seen = np.zeros(num_labels, np.bool_)
    seen[labels[is_outside]] = True
    return seen


def _save_graph(job: Job, name: str, graph: RegionGraph, ids: Counts) -> None:
    job.save(name, np.stack([ids[graph.u], ids[graph.v], graph.contacts, graph.total], 1))


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the last pass writes."""

    writer: LabelWriter
    dtype: np.dtype[np.unsignedinteger]


def find_background(job: Job, number: int) -> None:
    """Where holes are filled: the block's pieces of background (background_N)."""
    if not job.has(f"background_{number}"):
        job.save(f"background_{number}", background_pieces(job.objects(job.grid.box(number))))


def meet_background(job: Job, number: int) -> None:
    """Then: what pieces of background touch in the block (outside_N, joined_N, around_N)."""
    if job.has(f"around_{number}"):
        return
    box, offsets = job.grid.box(number), job.load("background_offsets")
    near = box.widened(NONE, ONE, job.grid.shape)
    pieces = job.gathered(near, "background", lambda block: counted_from(offsets, block))
    contacts = background_contacts(job.objects(near), pieces, box, near, job.grid.shape)
    job.save(f"outside_{number}", contacts.outside)
    job.save(f"joined_{number}", contacts.joined)
    job.save(f"around_{number}", contacts.around)


def counted_from(offsets: Counts, block: int) -> Counts:
    """The numbers in the volume of a block's pieces 0..n, of which 0 stays 0; offsets (num_blocks + 1,)."""
    numbers = np.arange(offsets[block], offsets[block + 1] + 1)
    numbers[0] = 0
    return numbers


def write_block(job: Job, output: Output, number: int) -> None:
    """Last pass: the block's final ids."""
    box = job.grid.box(number)
    labels = job.objects(box)
    if job.settings.fill_holes:
        numbers = counted_from(job.load("background_offsets"), number)
        labels = with_owners(labels, np.take(numbers, job.load(f"background_{number}")), job.load("owners"))
    output.writer.write(box.start, labels.astype(output.dtype))
