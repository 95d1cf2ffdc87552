"""Height maps whose valleys are the objects: how much boundary is at each voxel, in exact integers.

Everything near a face of the given volume is continued by its outermost voxels. A block that is read with so
many more voxels on each side as smoothing and distances reach gives the heights of the whole volume to the bit.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from common.errors import config_error
from em_segmentation.decoding.links import FULL, STEPS, Link, Slices, Volume, link_affinities, shape_of, sides
from em_segmentation.regions import Triple

Heights = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
CACHED_VOXELS = 2**19  # of a slab that is worked on at once
LARGEST_HEIGHT = 2**28  # so that three more bits fit into 32


@dataclasses.dataclass(frozen=True)
class HeightMap:
    """heights [z, y, x]; one step of an 8-bit boundary probability is `scale` of them.

    walls [3, z, y, x], in such steps: a way from voxel w to w + 1 along z, y, x passes at least at this height. So a
    boundary without thickness, between two voxels, parts objects of any thinness. [0, z, y, x]: there are none.
    """

    heights: Heights
    scale: int
    walls: Volume

    def part(self, where: Slices) -> "HeightMap":
        """The map of some of the voxels."""
        walls = np.ascontiguousarray(self.walls[(slice(None), *where)])
        return HeightMap(np.ascontiguousarray(self.heights[where]), self.scale, walls)

    def wall_heights(self, axis: int, lower: Slices) -> Heights:
        """Least heights of the ways between voxels and their next ones along an axis, of the slices' shape."""
        if len(self.walls) == 0:
            return np.zeros(tuple(one.stop - one.start for one in lower), np.int32)
        heights: Heights = self.walls[axis][lower] * np.int32(self.scale)
        return heights


def without_walls(heights: Heights, scale: int) -> HeightMap:
    """A height map of nothing but heights."""
    return HeightMap(heights, scale, np.empty((0, *heights.shape), np.uint8))


def boundary_sum(volume: Volume, links: tuple[Link, ...]) -> HeightMap:
    """How much boundary is at each voxel: the sum of 255 - affinity of its links to direct neighbours.

    A voxel has two links per channel, one to each side; at a face of the volume the only one counts twice. So the sum
    does not depend on where affinities are stored. Of a boundary map it is the map itself.
    """
    direct = [link for link in links if link.is_direct]
    if not direct:
        raise config_error(
            "offsets: none joins direct neighbours in the plane (expected e.g. (0, 0, 1)): name the channels' offsets"
        )
    if direct[0].of_boundary:
        return without_walls(volume[0].astype(np.int32), 1)
    shape = shape_of(volume)
    summed = np.zeros(shape, np.int16 if 2 * FULL * len(direct) < 2**15 else np.int32)
    for link in direct:
        lower, upper = sides((0, 0, 0), shape, shape, link.offset)
        axis = link.offset.index(1)
        if shape[axis] == 1:
            continue
        weakness = np.subtract(FULL, link_affinities(volume, link, lower, upper), dtype=np.uint8)
        summed[lower] += weakness
        summed[upper] += weakness
        for end in (0, -1):
            face: list[slice | int] = [slice(None)] * 3
            face[axis] = end
            summed[tuple(face)] += weakness[tuple(face)]
    return without_walls(summed.astype(np.int32), 2 * len(direct))


def smoothed(map_: HeightMap, radius: Triple) -> HeightMap:
    """Heights under a binomial window of 2 * radius + 1 voxels per axis, not divided: [1, 4, 6, 4, 1] for radius 2."""
    scale = map_.scale * 4 ** sum(radius)
    largest = int(map_.heights.max(initial=0)) * 4 ** sum(radius)
    assert largest < LARGEST_HEIGHT, f"Heights up to {largest} are no exact numbers in 32 bits"
    result = np.empty_like(map_.heights)
    depth = max(1, CACHED_VOXELS // max(1, result[:1].size))
    for first in range(0, len(result), depth):
        last = min(first + depth, len(result))
        sections = np.arange(first - radius[0], last + radius[0]).clip(0, len(result) - 1)
        result[first:last] = _binomial(map_.heights[sections], radius)
    return HeightMap(result, scale, map_.walls)


def _binomial(heights: Heights, radius: Triple) -> Heights:
    """Sums of neighbours, again and again [z, y, x]; along z the margin is there already and is used up."""
    for axis, reach in enumerate(radius):
        if axis and reach:
            margin = [(0, 0), (0, 0), (0, 0)]
            margin[axis] = (reach, reach)
            heights = np.pad(heights, margin, "edge")
        for _ in range(2 * reach):
            lower, upper = sides((0, 0, 0), shape_of(heights), shape_of(heights), STEPS[axis])
            heights = heights[lower] + heights[upper]
    return heights


def foreground(summed: HeightMap, least: int) -> Mask:
    """Where the mean affinity of a voxel's links (255 - boundary) is at least `least`, 0..255; 0: everywhere."""
    mask: Mask = summed.heights <= (FULL - least) * summed.scale
    return mask


def distance_height(inside: Mask, reach: int, by_section: bool) -> HeightMap:
    """Reach squared minus the squared distance (voxels) to the nearest voxel that is not inside, at most reach squared.

    Capped, so that a halo of `reach` voxels is enough. by_section: distances within each section alone. One unit is one
    square voxel, scale 1.
    """
    if by_section:
        squared = np.stack([_squared_distance(section, reach) for section in inside])
    else:
        squared = _squared_distance(inside, reach)
    return without_walls(reach * reach - squared, 1)


def _squared_distance(inside: Mask, reach: int) -> Heights:
    """At most reach squared; all of it where nothing is outside."""
    if inside.all():
        return np.full(inside.shape, reach * reach, np.int32)
    distance = scipy.ndimage.distance_transform_edt(inside)
    return np.minimum(np.rint(distance * distance), reach * reach).astype(np.int32)
