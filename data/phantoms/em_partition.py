"""Space divided among neurites: every point belongs to the curve whose tube is nearest, faces lie where two tie."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph
import scipy.spatial

from data.phantoms.em_curves import Curves
from data.phantoms.em_grid import Box, Float, Grid, Points, Warp, box_shape, refined

Ids = npt.NDArray[np.int32]

SPLINTER_NODES = 90  # pieces of fewer nodes vanish from the plan
REGION, BLOCK = (12, 18, 18), (6, 6, 6)  # cells between nodes whose curves are gathered, and worked on, at once
STEEPEST = 0.5  # smallest slope by which a difference of distances is divided


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """What lies at each voxel of the fine grid."""

    body: Ids  # the neurite, 1 and above
    neighbour: Ids  # the neurite beyond the nearest face
    depth: Float  # nm to that face


def near_curves(curves: Curves, points: Points) -> Curves:
    """The curve points that can be part of the nearest two neurites at any of the points (..., 3).

    Within reach of the points' centre no distance changes by more than the reach, so whatever exceeds the second nearest
    neurite by twice the reach can be left out.
    """
    centre = points.reshape(-1, 3).mean(0)
    reach = float(np.sqrt(((points - centre) ** 2).sum(-1).max()))
    at_centre = scipy.spatial.distance.cdist(centre[None], curves.position)[0] - curves.radius
    second = np.partition(np.minimum.reduceat(at_centre, first_points(curves)), 1)[1]
    return curves.of(np.flatnonzero(at_centre <= second + 2 * reach))


def first_points(curves: Curves) -> npt.NDArray[np.int64]:
    """Where each neurite's points start."""
    return np.flatnonzero(np.diff(curves.neurite, prepend=-1))


def blocks_with_curves(curves: Curves, grid: Grid, warp: Warp) -> Iterator[tuple[Box, Curves, Points]]:
    """Boxes of nodes, the curve points that matter there, and the distances to their tubes (nodes, points) nm."""
    z, y, x = grid.nodes
    planned = warp.nodes_to_plan((slice(0, z), slice(0, y), slice(0, x)))
    for region in grid.blocks(REGION):
        of_region = near_curves(curves, planned[region])
        for box in grid.blocks_of(region, BLOCK):
            points = planned[box]
            near = near_curves(of_region, points)
            distance = scipy.spatial.distance.cdist(points.reshape(-1, 3), near.position)
            distance -= near.radius
            yield box, near, distance


def connected(curves: Curves, grid: Grid, warp: Warp) -> Curves:
    """The curves whose neurites are connected bodies: splinters are taken out, larger pieces become neurites."""
    owner = np.empty(grid.nodes, np.int32)
    numbered = dataclasses.replace(curves, path=np.arange(len(curves.path)))
    for box, near, distance in blocks_with_curves(numbered, grid, warp):
        owner[box] = near.path[distance.argmin(1)].reshape(box_shape(box))
    pieces = connected_pieces(curves.neurite[owner])
    size = np.bincount(pieces.ravel())
    pairs, votes = np.unique(owner.ravel().astype(np.int64) * len(size) + pieces.ravel(), return_counts=True)
    point, piece = np.divmod(pairs, len(size))
    order = np.lexsort((votes, point))  # the last entry of a point is the piece it owns most of
    last = order[np.flatnonzero(np.diff(point[order], append=-1))]
    point, piece = point[last], piece[last]
    kept = size[piece] >= SPLINTER_NODES
    left = dataclasses.replace(curves.of(point[kept]), neurite=piece[kept])
    left = left.of(np.argsort(left.neurite, kind="stable"))
    if len(np.unique(left.neurite)) == 1:  # a small canvas inside one neurite: the others keep it company from outside
        return dataclasses.replace(curves, neurite=curves.neurite + 1)
    return dataclasses.replace(left, neurite=np.unique(left.neurite, return_inverse=True)[1] + 1)


def divide(curves: Curves, grid: Grid, warp: Warp) -> Partition:
    """The partition of the fine grid."""
    body, neighbour = np.empty(grid.shape, np.int32), np.empty(grid.shape, np.int32)
    gap = np.empty(grid.shape, np.float32)
    margin = 0.6 * float(np.linalg.norm(np.array(grid.steps) * np.array(grid.spacing)))
    for box, near, distance in blocks_with_curves(curves, grid, warp):
        starts = first_points(near)
        fields = np.minimum.reduceat(distance, starts, axis=1).T  # (k, nodes)
        second = np.partition(fields, 1, axis=0)[1]
        possible = (fields - second).min(1) <= margin
        fine = grid.fine_box(box)
        z, y, x = box_shape(fine)
        fields = refined(fields[possible].reshape(-1, *box_shape(box)), grid.steps)[:, :z, :y, :x]
        body[fine], neighbour[fine], gap[fine] = nearest_two(fields, near.neurite[starts][possible])
    return Partition(body, neighbour, depths(gap, grid))


def nearest_two(fields: Float, neurites: npt.NDArray[np.int64]) -> tuple[Ids, Ids, Float]:
    """The nearest and the second neurite of fields (k, z, y, x), and the difference of their distances."""
    first = fields.argmin(0)[None]
    nearest = np.take_along_axis(fields, first, 0)
    np.put_along_axis(fields, first, np.float32(np.inf), 0)
    second = fields.argmin(0)[None]
    gap = np.take_along_axis(fields, second, 0) - nearest
    ids = neurites.astype(np.int32)
    return ids[first[0]], ids[second[0]], gap[0]


def depths(gap: Float, grid: Grid) -> Float:
    """Distance to the face in nm: the difference of distances over its slope, the steeper side of every voxel counting.

    At a face the difference is 0 and rises on both sides, so central differences would vanish there.
    """
    squared = np.zeros_like(gap)
    for axis, spacing in enumerate(grid.spacing):
        rise = np.abs(np.diff(gap, axis=axis)) / np.float32(spacing)
        steeper = np.zeros_like(gap)
        low: list[slice] = [slice(None)] * 3
        high: list[slice] = [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        steeper[tuple(low)] = rise
        steeper[tuple(high)] = np.maximum(steeper[tuple(high)], rise)
        squared += steeper * steeper
    return np.asarray(gap / np.maximum(np.sqrt(squared), np.float32(STEEPEST)), np.float32)


def connected_pieces(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Numbers from 0 of the face-connected pieces of equal label, of the labels' shape (z, y, x).

    Runs along x are joined where they touch along y and z, so the graph is much smaller than the volume.
    """
    new = np.ones(labels.shape, np.bool_)
    new[..., 1:] = labels[..., 1:] != labels[..., :-1]
    run = (np.cumsum(new) - 1).reshape(labels.shape)
    count = int(run[-1, -1, -1]) + 1
    edges = []
    for low, high in (
        ((slice(None, -1),), (slice(1, None),)),
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ):
        same = labels[low] == labels[high]
        pairs = run[low][same] * count + run[high][same]
        edges.append(pairs[np.diff(pairs, prepend=-1) != 0])
    one, two = np.divmod(np.concatenate(edges), count)
    graph = scipy.sparse.coo_array((np.ones(len(one)), (one, two)), shape=(count, count))
    return np.asarray(scipy.sparse.csgraph.connected_components(graph, directed=False)[1][run], np.int64)


def without_splinters(labels: Ids, smallest: int) -> Ids:
    """The labels with pieces of fewer than `smallest` voxels given to the neighbour they share most faces with.

    Every voxel has a label above 0, and every remaining piece a number of its own.
    """
    pieces = connected_pieces(labels)
    while True:
        size = np.bincount(pieces.ravel())
        if len(size) == 1 or size.min() >= smallest:
            return np.asarray(pieces + 1, np.int32)
        pieces = merged_into_neighbours(pieces, size < smallest)


def merged_into_neighbours(pieces: npt.NDArray[np.int64], small: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Pieces after each small one has joined its closest neighbour, renumbered from 0."""
    count, keys = len(small), []
    for axis in range(3):
        one = np.moveaxis(pieces, axis, 0)[:-1].ravel()
        two = np.moveaxis(pieces, axis, 0)[1:].ravel()
        touching = (one != two) & (small[one] | small[two])
        one, two = one[touching], two[touching]
        keys += [one * count + two, two * count + one]
    pairs, faces = np.unique(np.concatenate(keys), return_counts=True)
    piece, other = np.divmod(pairs, count)
    of_small = small[piece]
    piece, other, faces = piece[of_small], other[of_small], faces[of_small]
    order = np.lexsort((faces, piece))
    last = order[np.flatnonzero(np.diff(piece[order], append=-1))]
    graph = scipy.sparse.coo_array((np.ones(len(last)), (piece[last], other[last])), shape=(count, count))
    return np.asarray(scipy.sparse.csgraph.connected_components(graph, directed=False)[1][pieces], np.int64)


def instances(dense: Ids, depth: Float, gap_nm: float, smallest: int) -> npt.NDArray[np.uint32]:
    """Connected neurites 1..n of a volume with the gap at their faces left 0; dense ids and depths (z, y, x)."""
    whole = without_splinters(dense, smallest)
    carved = np.where(depth < gap_nm / 2, 0, whole)
    pieces = connected_pieces(carved)
    size = np.bincount(pieces.ravel())
    kept = size >= smallest
    kept[pieces[carved == 0]] = False
    number = np.where(kept, np.cumsum(kept), 0)
    return np.asarray(number[pieces], np.uint32)
