"""From predicted affinities, or a boundary map, to instances: a volume that fits into memory.

Fragments come from a watershed of the boundary's height; they are merged by the affinities across their contacts.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from common.errors import config_error
from em_segmentation.decoding.agglomeration import agglomerate
from em_segmentation.decoding.cleaning import (
    Compact,
    first_voxels,
    label_sizes,
    numbered_by_appearance,
    small_joined,
    without_small,
)
from em_segmentation.decoding.components import affinity_components
from em_segmentation.decoding.heights import (
    HeightMap,
    Mask,
    boundary_sum,
    distance_height,
    foreground,
    smoothed,
)
from em_segmentation.decoding.holes import filled_holes
from em_segmentation.decoding.links import Volume
from em_segmentation.decoding.mutex import mutex_watershed
from em_segmentation.decoding.region_graph import Ids, RegionGraph, empty_graph, region_graph, relabelled_graph
from em_segmentation.decoding.settings import Settings
from em_segmentation.decoding.walls import walls_between
from em_segmentation.decoding.watershed import watershed


def segment(volume: Volume, settings: Settings) -> Compact:
    """Instances [z, y, x], 0 = background, numbered by first appearance, of affinities [c, z, y, x] uint8.

    Raises a config error where the volume is not what the settings speak of.
    """
    return segment_at(volume, settings, (settings.threshold,))[0]


def segment_at(volume: Volume, settings: Settings, thresholds: tuple[int, ...]) -> list[Compact]:
    """The same for several thresholds, descending; after a watershed at hardly more than the cost of one."""
    check_input(volume.shape[0], volume.dtype, settings)
    if settings.method == "components":
        return [_filled(_components(volume, settings, threshold), settings) for threshold in thresholds]
    fragments = fragments_of(volume, settings)
    sizes = label_sizes(fragments, int(fragments.max(initial=0)))
    attractive = region_graph(fragments, volume, settings.direct_links, settings.graph_bins)
    repulsive = empty_graph(0)
    if settings.method == "mutex":
        repulsive = region_graph(fragments, volume, settings.repulsive_links, 0)
    mappings = objects_of_fragments(attractive, repulsive, sizes, settings, thresholds)
    firsts = first_voxels(fragments, len(sizes) - 1)
    labels = (np.take(numbered_by_appearance(mapping, firsts)[0], fragments) for mapping in mappings)
    return [_filled(one, settings) for one in labels]


def check_input(num_channels: int, dtype: np.dtype[np.generic], settings: Settings) -> None:
    """Raise a config error where a volume has not the channels, or the type, that the settings speak of."""
    expected = 1 if settings.input == "boundary" else len(settings.offsets)
    if num_channels != expected:
        raise config_error(
            f"decoding: the volume has {num_channels} channels (expected {expected}): correct input or offsets"
        )
    if dtype != np.uint8:
        raise config_error(f"decoding: the volume holds {dtype} (expected uint8, probability * 255): round it first")


def fragments_of(volume: Volume, settings: Settings) -> Ids:
    """The watershed's fragments [z, y, x] 1..n."""
    height_map, mask = heights_of(volume, settings)
    return watershed(height_map, mask, settings.axes, settings.min_depth * height_map.scale)


def heights_of(volume: Volume, settings: Settings) -> tuple[HeightMap, Mask]:
    """What is flooded, and where."""
    summed = boundary_sum(volume, settings.flooded_links)
    mask = foreground(summed, settings.foreground)
    if settings.height == "distance":
        inside = foreground(summed, settings.distance_threshold)
        summed = distance_height(inside, settings.distance_reach, settings.neighbours == "sections")
        return smoothed(summed, settings.smoothing), mask
    walls = walls_between(volume, settings.flooded_links, settings.wall)
    return dataclasses.replace(smoothed(summed, settings.smoothing), walls=walls), mask


def objects_of_fragments(
    attractive: RegionGraph,
    repulsive: RegionGraph,
    sizes: npt.NDArray[np.int64],
    settings: Settings,
    thresholds: tuple[int, ...],
) -> list[Ids]:
    """Per threshold the mapping fragment -> object (num_fragments + 1,), small objects dealt with; sizes in voxels."""
    num_fragments = len(sizes) - 1
    if settings.method == "mutex":
        mappings = [mutex_watershed(attractive, repulsive, num_fragments)] * len(thresholds)
    else:
        mappings = agglomerate(attractive, num_fragments, settings.percent, thresholds)
    return [cleaned_mapping(mapping, sizes, attractive, settings) for mapping in mappings]


def cleaned_mapping(mapping: Ids, sizes: npt.NDArray[np.int64], graph: RegionGraph, settings: Settings) -> Ids:
    """The mapping fragment -> object after small objects were removed or joined."""
    if settings.min_size <= 1:
        return mapping
    object_sizes = np.bincount(mapping, sizes.astype(np.float64), len(mapping)).astype(np.int64)
    if settings.small == "remove":
        return without_small(object_sizes, settings.min_size)[mapping]
    return small_joined(object_sizes, relabelled_graph(graph, mapping), settings.min_size)[mapping]


def _filled(labels: Compact, settings: Settings) -> Compact:
    return filled_holes(labels) if settings.fill_holes else labels


def _components(volume: Volume, settings: Settings, threshold: int) -> Compact:
    """Components of strong affinities, small ones removed."""
    labels = affinity_components(volume, settings.flooded_links, threshold)
    sizes = label_sizes(labels, int(labels.max(initial=0)))
    ids, _ = numbered_by_appearance(without_small(sizes, settings.min_size), first_voxels(labels, len(sizes) - 1))
    return np.take(ids, labels)
