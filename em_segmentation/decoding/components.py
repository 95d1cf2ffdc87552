"""Connected components of voxels joined by strong affinities."""

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

from em_segmentation.decoding.heights import Mask
from em_segmentation.decoding.links import STEPS, Link, Volume, link_affinities, shape_of, sides
from em_segmentation.decoding.region_graph import Ids


def affinity_components(volume: Volume, links: tuple[Link, ...], threshold: int) -> Ids:
    """Components [z, y, x] 1..n of voxels joined by direct affinities >= threshold, in the order of their first voxels.

    0: voxels that nothing is joined to.
    """
    joined = joined_faces(volume, links, threshold)
    return components_of_faces(joined, touched_voxels(joined))


def joined_faces(volume: Volume, links: tuple[Link, ...], threshold: int) -> npt.NDArray[np.bool_]:
    """Whether voxel w is joined to w + 1 along z, y, x by any direct link, [3, z, y, x]; False at the last voxels."""
    shape = shape_of(volume)
    joined = np.zeros((3, *shape), np.bool_)
    for link in links:
        assert link.is_direct, f"Expected links of direct neighbours, got {link.offset}"
        lower, upper = sides((0, 0, 0), shape, shape, link.offset)
        joined[link.offset.index(1)][lower] |= link_affinities(volume, link, lower, upper) >= threshold
    return joined


def touched_voxels(joined: npt.NDArray[np.bool_]) -> Mask:
    """Voxels [z, y, x] with at least one joined face."""
    touched: Mask = joined[0] | joined[1] | joined[2]
    for axis in range(3):
        lower, upper = sides((0, 0, 0), shape_of(joined), shape_of(joined), STEPS[axis])
        touched[upper] |= joined[axis][lower]
    return touched


def components_of_faces(joined: npt.NDArray[np.bool_], numbered: Mask) -> Ids:
    """Components [z, y, x] 1..n of voxels across joined faces [3, z, y, x]; 0 where not numbered.

    Voxels joined along x are runs, numbered by a running sum; runs that touch along y and z are joined as a graph.
    """
    shape = shape_of(joined)
    assert numbered.size < 2**31, f"Expected fewer than 2^31 voxels at once, got {numbered.size}"
    starts = np.ones(shape, np.bool_)
    starts[:, :, 1:] = ~joined[2][:, :, :-1]
    runs: Ids = np.cumsum(starts.reshape(-1), dtype=np.int32).reshape(shape) - np.int32(1)
    count = int(runs[-1, -1, -1]) + 1 if runs.size else 0
    ends = [np.empty((2, 0), np.int32)]
    for axis in (0, 1):
        lower, upper = sides((0, 0, 0), shape, shape, STEPS[axis])
        met = np.flatnonzero(joined[axis][lower])
        pairs = np.stack([runs[lower].reshape(-1)[met], runs[upper].reshape(-1)[met]])
        is_new = np.ones(pairs.shape[1], np.bool_)
        is_new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
        ends.append(pairs[:, is_new])
    low, high = np.concatenate(ends, 1)
    graph = scipy.sparse.coo_array((np.ones(len(low), np.int8), (low, high)), shape=(count, count))
    _, group = scipy.sparse.csgraph.connected_components(graph, directed=False)
    labels = np.where(numbered, np.take(group, runs), -1)
    return _numbered_by_first(labels)


def _numbered_by_first(groups: Ids) -> Ids:
    """Groups (-1 for none) numbered 1..n; scipy numbers them in the order of their first runs, gaps are closed."""
    is_used = np.zeros(int(groups.max(initial=-1)) + 2, np.bool_)
    is_used[groups] = True  # -1 marks the last one
    is_used[-1] = False
    number = np.cumsum(is_used, dtype=np.int32)
    number[-1] = 0
    return np.take(number, groups, mode="wrap")
