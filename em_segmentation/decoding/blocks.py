"""Decoding a volume block by block, larger than memory, with exactly the result of decoding it at once.

Every decision is made on integers and by an order that the whole volume defines (linear indices of voxels), so that it
is the same in any block. Per block the voxels are labelled; what crosses faces is resolved on tables of labels, which
are small; then every block is written. Finished tables lie in the scratch folder: a killed run continues there.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from common.errors import config_error
from common.files import read_text, write_text
from em_segmentation.decoding.agglomeration import groups_of_pairs
from em_segmentation.decoding.block_grid import ChannelReader, Grid, Job, LabelWriter
from em_segmentation.decoding.block_passes import (
    Output,
    compare_block,
    find_background,
    label_block,
    meet_background,
    write_block,
)
from em_segmentation.decoding.cleaning import numbered_by_appearance, smallest_dtype, without_small
from em_segmentation.decoding.executors import Executor
from em_segmentation.decoding.holes import Contacts, owners
from em_segmentation.decoding.pipeline import check_input, objects_of_fragments
from em_segmentation.decoding.region_graph import Counts, Ids, RegionGraph, added_graphs, empty_graph
from em_segmentation.decoding.settings import Settings
from em_segmentation.decoding.watershed import Passes, compacted, followed, joined_labels, merge_shallow
from em_segmentation.regions import Triple

BATCH = 32  # blocks whose graphs are added at once; bounds the memory


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A volume of which every block's final ids are known but not written."""

    job: Job
    num_objects: int

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The narrowest that holds all ids."""
        return smallest_dtype(self.num_objects)


def decode_blocks(
    reader: ChannelReader, settings: Settings, block: Triple, scratch: Path, executor: Executor
) -> Decoded:
    """All passes but the last; with write_decoded the instances equal those of pipeline.segment.

    block: edges in voxels; scratch: a folder of this volume's alone, which takes about 4 bytes per voxel (8 where
    holes are filled) and may be deleted afterwards. Raises a config error where the folder holds tables of other settings.
    """
    check_input(reader.num_channels, np.dtype(np.uint8), settings)
    if min(block) < 1:
        raise config_error(f"block: {block} (expected three edges of at least 1 voxel): correct it")
    z, y, x = reader.shape
    if settings.largest_height + 1 >= 2**63 // (3 * z * y * x):
        raise config_error(
            f"decoding.smoothing: {settings.smoothing} is too wide for {z * y * x:.1e} voxels: smooth less"
        )
    job = Job(reader, settings, Grid(reader.shape, block), scratch)
    _claim(job)
    blocks = range(len(job.grid))
    executor.map_blocks("label blocks", functools.partial(label_block, job), blocks)
    if not job.has("firsts"):
        _number_nodes(job)
    executor.map_blocks("compare blocks", functools.partial(compare_block, job), blocks)
    if not job.has("num_objects"):
        _decide(job)
    if settings.fill_holes:
        executor.map_blocks("find background", functools.partial(find_background, job), blocks)
        job.save("background_offsets", np.cumsum([0, *(int(job.load(f"background_{b}").max()) for b in blocks)]))
        executor.map_blocks("find holes", functools.partial(meet_background, job), blocks)
        job.save("owners", _owners(job))
    return Decoded(job, int(job.load("num_objects")[0]))


def write_decoded(decoded: Decoded, writer: LabelWriter, executor: Executor) -> None:
    """The last pass: each block's labels, of the narrowest type, to writer.write(corner, labels)."""
    output = Output(writer, decoded.dtype)
    blocks = range(len(decoded.job.grid))
    executor.map_blocks("write blocks", functools.partial(write_block, decoded.job, output), blocks)


def _claim(job: Job) -> None:
    """Make the scratch folder this job's, or see that it is."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    path = job.scratch / "job.json"
    told = {
        "settings": dataclasses.asdict(job.settings), "shape": job.grid.shape, "block": job.grid.block
    }  # fmt: skip
    text = json.dumps(told, indent=1)
    if path.exists() and read_text(path) != text:
        raise config_error(f"{job.scratch}: holds blocks of another volume or other settings: name another folder")
    write_text(path, text)


def _number_nodes(job: Job) -> None:
    """Number the labels of all blocks through: labels that flow over a face become those that they flow to.

    Nodes are numbered 1..n by the linear index of their lowest (or first) voxel, as in a volume in memory. Tables:
    offsets (num_blocks + 1,), of_node (all labels of all blocks,), floors, sizes and firsts (n + 1,).
    """
    blocks = range(len(job.grid))
    offsets = np.cumsum([0, *(len(job.mapped(f"stats_{b}")) for b in blocks)])
    parent = _parents(job, offsets)
    roots = [job.load(f"roots_{b}") for b in blocks]
    owner = np.concatenate([offsets[b] + 1 + np.arange(len(roots[b])) for b in blocks])
    linear, floor = np.concatenate(roots).T
    order = np.argsort(linear)
    number = np.zeros(int(offsets[-1]), np.int32)
    number[owner[order]] = np.arange(1, len(order) + 1, dtype=np.int32)
    of_node = np.take(number, parent)
    job.save("offsets", offsets)
    job.save("of_node", of_node)
    job.save("floors", np.concatenate([np.zeros(1, np.int64), floor[order]]).astype(np.int32))
    sizes = np.zeros(len(order) + 1, np.int64)
    firsts = np.full(len(order) + 1, np.iinfo(np.int64).max)
    for b in blocks:
        voxels, first = job.load(f"stats_{b}").T
        node = of_node[offsets[b] : offsets[b + 1]]
        np.add.at(sizes, node, voxels)
        np.minimum.at(firsts, node[voxels > 0], first[voxels > 0])
    job.save("sizes", sizes)
    job.save("firsts", firsts)


def _parents(job: Job, offsets: Counts) -> Counts:
    """The label, as place in the table of all, that each label's voxels flow to in the end (all labels,)."""
    parent = np.arange(int(offsets[-1]))
    for b in range(len(job.grid)):
        exits = job.load(f"exits_{b}")
        own = int(offsets[b + 1]) - len(exits) + np.arange(len(exits))
        parent[own] = _places_of_voxels(job, exits, offsets)
    return followed(parent)


def _places_of_voxels(job: Job, linear: Counts, offsets: Counts) -> Counts:
    """The label of voxels by linear index in the volume, as place in the table of all labels (num_voxels,)."""
    voxel = np.stack(np.unravel_index(linear, job.grid.shape))  # (3, num_voxels)
    block_edges = np.array(job.grid.block)[:, None]
    number = np.ravel_multi_index(tuple(voxel // block_edges), job.grid.counts)
    places = np.empty(len(linear), np.int64)
    for b in np.unique(number).tolist():
        mine = np.flatnonzero(number == b)
        local = voxel[:, mine] - np.array(job.grid.box(b).start)[:, None]
        places[mine] = job.mapped(f"labels_{b}")[tuple(local)] + offsets[b]
    return places


def _decide(job: Job) -> None:
    """The final id of every label of every block: `final` (all labels,), and num_objects (1,)."""
    sizes, firsts = job.load("sizes"), job.load("firsts")
    merged = _concatenated(job, "merged", 2)
    if job.settings.method == "components":
        joined = groups_of_pairs(merged, len(sizes))
        total = _summed(sizes, joined, len(sizes))
        objects = without_small(total, job.settings.min_size)[joined]
    else:
        objects = _objects_of_basins(job, merged, sizes)
    final, num_objects = numbered_by_appearance(objects, firsts)
    job.save("final", final[job.load("of_node")])
    job.save("num_objects", np.array([num_objects]))


def _owners(job: Job) -> Ids:
    """The object that each piece of background is a hole of, or 0 (num_pieces + 1,)."""
    blocks = range(len(job.grid))
    outside = np.concatenate([job.load(f"outside_{b}") for b in blocks])
    contacts = Contacts(outside, _concatenated(job, "joined", 2), _concatenated(job, "around", 2))
    return owners(contacts, int(job.load("background_offsets")[-1]))


def _objects_of_basins(job: Job, merged: Counts, sizes: Counts) -> Ids:
    """The object of each basin (num_basins + 1,)."""
    floors = job.load("floors").astype(np.int32)
    target = joined_labels(merged[:, 0], merged[:, 1], floors.astype(np.int64))
    low, high, key = _concatenated(job, "passes", 3).T
    voxels = job.grid.shape[0] * job.grid.shape[1] * job.grid.shape[2]
    passes = Passes(low.astype(np.int32), high.astype(np.int32), key, 3 * voxels).relabelled(target)
    depth = job.settings.min_depth * job.settings.height_scale
    target = merge_shallow(passes, floors, np.zeros(len(floors), np.bool_), depth)[target]
    fragment = compacted(target)
    attractive = _added(job, "graph", fragment)
    repulsive = _added(job, "far", fragment)
    fragment_sizes = _summed(sizes, fragment, int(fragment.max(initial=0)) + 1)
    thresholds = (job.settings.threshold,)
    return objects_of_fragments(attractive, repulsive, fragment_sizes, job.settings, thresholds)[0][fragment]


def _concatenated(job: Job, name: str, columns: int) -> Counts:
    tables = [job.load(f"{name}_{b}") for b in range(len(job.grid))]
    return np.concatenate([np.empty((0, columns), np.int64), *tables])


def _summed(values: Counts, group: Ids, num_groups: int) -> Counts:
    """Sums of values by group (num_groups,)."""
    sums = np.zeros(num_groups, np.int64)
    np.add.at(sums, group, values)
    return sums


def _added(job: Job, name: str, fragment: Ids) -> RegionGraph:
    """The graph of fragments of the whole volume."""
    bins = job.settings.graph_bins if name == "graph" else 0
    identity = np.arange(int(fragment.max(initial=0)) + 1, dtype=np.int32)
    graph = empty_graph(bins)
    blocks = range(len(job.grid))
    for first in range(0, len(blocks), BATCH):
        pieces = [_piece(job, name, b, bins) for b in blocks[first : first + BATCH]]
        graph = added_graphs([graph, added_graphs(pieces, fragment)], identity)
    return graph


def _piece(job: Job, name: str, block: int, bins: int) -> RegionGraph:
    u, v, contacts, total = job.load(f"{name}_{block}").T
    histogram: Counts = np.empty((len(u), 0), np.int64)
    if bins:
        histogram = job.load(f"bins_{block}").astype(np.int64)
    return RegionGraph(u.astype(np.int32), v.astype(np.int32), contacts, total, histogram)
