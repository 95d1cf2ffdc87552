"""Components of affinities, and what cleaning does to labels."""

import numpy as np
import numpy.typing as npt
import pytest

from common.streams import random_for
from em_segmentation.decoding.cleaning import (
    label_sizes,
    small_joined,
    smallest_dtype,
    without_small,
)
from em_segmentation.decoding.components import affinity_components
from em_segmentation.decoding.holes import filled_holes
from em_segmentation.decoding.links import affinity_links
from em_segmentation.decoding.region_graph import RegionGraph
from tests.em_segmentation.test_decoding_watershed import same_partition

OFFSETS = ((0, 0, -1), (1, 0, 0), (0, 1, 0))


def in_order_of_appearance(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Ids 1..n in the order of each label's first voxel; 0 stays 0."""
    numbers = {0: 0}
    flat = [numbers.setdefault(label, len(numbers)) for label in labels.reshape(-1).tolist()]
    return np.array(flat).reshape(labels.shape)


@pytest.mark.parametrize("stored_at", ["source", "destination"])
@pytest.mark.parametrize("threshold", [60, 170, 215, 255])
def test_affinity_components_equal_spreading_a_label_until_nothing_changes(stored_at: str, threshold: int) -> None:
    volume = random_for("components", threshold).integers(0, 256, (3, 5, 6, 7), dtype=np.uint8)
    labels = affinity_components(volume, affinity_links(OFFSETS, stored_at), threshold)
    spread = np.arange(1, 211).reshape(5, 6, 7)
    joined = []
    for c, offset in enumerate(OFFSETS):
        step = np.array(offset) if stored_at == "source" else -np.array(offset)
        for cell in np.ndindex(5, 6, 7):
            other = tuple((np.array(cell) + step).tolist())
            if all(0 <= a < n for a, n in zip(other, (5, 6, 7), strict=True)) and volume[(c, *cell)] >= threshold:
                joined.append((cell, other))
    for _ in range(60):
        for a, b in joined:
            spread[a] = spread[b] = min(spread[a], spread[b])
    touched = np.zeros((5, 6, 7), np.bool_)
    for a, b in joined:
        touched[a] = touched[b] = True
    assert same_partition(labels, np.where(touched, spread, 0))
    assert np.array_equal(labels, in_order_of_appearance(labels))


def test_everything_and_nothing_joined() -> None:
    links = affinity_links(OFFSETS, "source")
    assert (affinity_components(np.full((3, 2, 3, 4), 255, np.uint8), links, 255) == 1).all()
    assert not affinity_components(np.zeros((3, 2, 3, 4), np.uint8), links, 1).any()
    assert affinity_components(np.zeros((3, 0, 3, 4), np.uint8), links, 1).shape == (0, 3, 4)


def test_the_narrowest_type_that_holds_the_ids() -> None:
    assert [smallest_dtype(n).itemsize for n in (255, 256, 65535, 65536, 2**32)] == [1, 2, 2, 4, 8]


def test_small_objects_are_removed_or_joined_to_the_closest_neighbour() -> None:
    labels = np.array([[[1, 1, 1, 2, 3, 3, 3, 0, 4]]], np.int32)
    sizes = label_sizes(labels, 4)
    assert sizes.tolist() == [1, 3, 1, 3, 1]
    assert without_small(sizes, 2).tolist() == [0, 1, 0, 3, 0]
    none = np.empty((2, 0), np.int64)
    u, v = np.array([1, 2], np.int32), np.array([2, 3], np.int32)
    graph = RegionGraph(u, v, np.array([1, 1]), np.array([100, 101]), none)
    assert small_joined(sizes, graph, 2).tolist() == [0, 1, 2, 2, 4]
    assert small_joined(sizes, graph, 5).tolist() == [0, 1, 1, 1, 4]  # a group that is still too small goes on


def test_holes_are_filled_where_one_object_encloses_them() -> None:
    labels = np.zeros((5, 5, 11), np.int32)
    labels[:, :, :5], labels[:, :, 6:] = 1, 2
    labels[2, 2, 2] = 0  # inside of 1
    labels[2, 2, 8:10] = 0  # inside of 2, and
    labels[2, 2, 9] = 3  # not over an object that shares the hole
    filled = filled_holes(labels)
    assert filled[2, 2, 2] == 1 and filled[2, 2, 8] == 0 and filled[2, 2, 9] == 3
    assert (filled[:, :, 5] == 0).all() and (filled != labels).sum() == 1
    labels[2, 2, 9] = 2
    assert filled_holes(labels)[2, 2, 8] == 2
    assert filled_holes(labels[2:3])[0, 2, 8] == 2  # a section by itself has no faces along z
    labels[3:, 2, 8] = 0
    assert filled_holes(labels)[2, 2, 8] == 0  # open towards a face of the volume
