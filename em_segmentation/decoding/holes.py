"""Holes in objects, filled: in a volume, or block by block with the same result.

A hole is a face-connected piece of background that touches no face of the volume and one single object; along an axis of
one voxel a volume has no faces, so a section by itself has holes too.
"""

import dataclasses
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from em_segmentation.decoding.agglomeration import groups_of_pairs
from em_segmentation.decoding.block_grid import Box
from em_segmentation.decoding.links import STEPS, shape_of, sides
from em_segmentation.decoding.region_graph import Counts, Ids
from em_segmentation.regions import Triple

AnyIds = npt.NDArray[np.integer]
Kind = TypeVar("Kind", bound=np.integer)


@dataclasses.dataclass(frozen=True, eq=False)
class Contacts:
    """What pieces of background touch, by their numbers 1..n in the whole volume."""

    outside: Counts  # (k,): pieces at a face of the volume
    joined: Counts  # (k, 2): pieces that touch each other, in different blocks
    around: Counts  # (k, 2): piece and object


def background_pieces(labels: AnyIds) -> Ids:
    """Face-connected pieces of background [z, y, x] 1..n, 0 in objects."""
    pieces, _ = scipy.ndimage.label(labels == 0)
    numbered: Ids = pieces.astype(np.int32, copy=False)
    return numbered


def background_contacts(labels: AnyIds, pieces: AnyIds, box: Box, near: Box, shape: Triple) -> Contacts:
    """The contacts of a block's voxels with those one above along z, y, x; labels and pieces [z, y, x] are those of near.

    near: the block widened by one voxel above, cut at the faces of the volume, whose shape this is.
    """
    outside, joined, around = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    for axis in range(3):
        ends = [
            plane for plane, at_face in ((0, near.start[axis] == 0), (-1, near.stop[axis] == shape[axis])) if at_face
        ]
        outside += [np.unique(np.take(pieces, end, axis)) for end in ends if shape[axis] > 1]
        lower, upper = sides((0, 0, 0), box.size, near.size, STEPS[axis])
        one, other = pieces[lower], pieces[upper]
        joined.append(distinct_pairs(one, other, (one > 0) & (other > 0) & (one != other)))
        around.append(distinct_pairs(one, labels[upper], (one > 0) & (other == 0)))
        around.append(distinct_pairs(other, labels[lower], (other > 0) & (one == 0)))
    return Contacts(np.concatenate(outside), np.concatenate(joined), np.concatenate(around))


def distinct_pairs(first: AnyIds, second: AnyIds, chosen: npt.NDArray[np.bool_]) -> Counts:
    """The different pairs (k, 2) at chosen voxels."""
    return np.unique(np.stack([first[chosen], second[chosen]], 1).astype(np.int64), axis=0)


def owners(contacts: Contacts, num_pieces: int) -> Ids:
    """The object that encloses each piece of background, 0 where none or several do (num_pieces + 1,)."""
    group = groups_of_pairs(contacts.joined, num_pieces + 1)
    least, greatest = np.full(num_pieces + 1, np.iinfo(np.int64).max), np.zeros(num_pieces + 1, np.int64)
    np.minimum.at(least, group[contacts.around[:, 0]], contacts.around[:, 1])
    np.maximum.at(greatest, group[contacts.around[:, 0]], contacts.around[:, 1])
    is_hole = least == greatest
    is_hole[group[contacts.outside]] = False
    is_hole[0] = False
    return np.where(is_hole, greatest, 0)[group].astype(np.int32)


def with_owners(labels: npt.NDArray[Kind], pieces: AnyIds, owner: AnyIds) -> npt.NDArray[Kind]:
    """Labels [z, y, x] with pieces of background given to their owners (num_pieces + 1,), where they have one."""
    filled: npt.NDArray[Kind] = labels + np.take(owner, pieces).astype(labels.dtype)  # background is 0
    return filled


def filled_holes(labels: npt.NDArray[Kind]) -> npt.NDArray[Kind]:
    """Labels [z, y, x] of a whole volume with the holes in objects filled."""
    pieces, shape = background_pieces(labels), shape_of(labels)
    whole = Box((0, 0, 0), shape)
    contacts = background_contacts(labels, pieces, whole, whole, shape)
    return with_owners(labels, pieces, owners(contacts, int(pieces.max(initial=0))))
