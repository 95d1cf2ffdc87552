"""Boundaries without thickness: between two voxels, where neither of them is a boundary itself."""

import numpy as np

from em_segmentation.decoding.components import joined_faces, touched_voxels
from em_segmentation.decoding.links import FULL, STEPS, Link, Volume, link_affinities, shape_of, sides


def walls_between(volume: Volume, links: tuple[Link, ...], least: int) -> Volume:
    """255 - affinity of voxels and their next ones along z, y, x where it is below `least`, else 0; [3, z, y, x].

    Voxels all of whose links are that weak lie inside a boundary, which heights show well enough: no walls around them.
    Of several links along an axis the weakest counts. Nothing, [0, z, y, x], for least = 0 and for boundary maps.
    """
    shape = shape_of(volume)
    if least == 0 or any(link.of_boundary for link in links):
        return np.empty((0, *shape), np.uint8)
    walls = np.zeros((3, *shape), np.uint8)
    for link in links:
        lower, upper = sides((0, 0, 0), shape, shape, link.offset)
        affinity = link_affinities(volume, link, lower, upper)
        weakness = np.where(affinity < least, FULL - affinity, np.uint8(0))
        place = walls[link.offset.index(1)][lower]
        np.maximum(place, weakness, out=place)
    is_inside = touched_voxels(joined_faces(volume, links, least))
    for axis in range(3):
        lower, upper = sides((0, 0, 0), shape, shape, STEPS[axis])
        walls[axis][lower] *= is_inside[lower] & is_inside[upper]
    return walls
