"""Watershed and decoding of 256^3 voxels of cortex beside scikit-image's watershed on the same boundary map and seeds.

The boundary map is made from real labels: their boundaries, blurred, with noise. Both run in one process, theirs once
between three rounds of ours, of which the median counts. Run alone for figures:
python -m pytest -m slow tests/benchmarks/test_em_decoding.py -s
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from common.metrics.segmentation import adapted_rand, count_overlaps, label_boundaries, without_truth
from common.streams import random_for
from em_segmentation.decoding.agglomeration import MEAN, agglomerate
from em_segmentation.decoding.links import Volume, boundary_links
from em_segmentation.decoding.pipeline import heights_of, segment
from em_segmentation.decoding.region_graph import Ids, region_graph
from em_segmentation.decoding.settings import Settings
from em_segmentation.decoding.watershed import VOLUME_AXES, seeded_watershed, watershed

SETTINGS = Settings(input="boundary", min_depth=5, threshold=128)


@pytest.fixture(scope="module")
def truth() -> npt.NDArray[np.uint16]:
    if "PLAINSCOPE_REAL_DATA" not in os.environ:
        pytest.skip("PLAINSCOPE_REAL_DATA is not set")
    path = Path(os.environ["PLAINSCOPE_REAL_DATA"]) / "em/seunglab_labels/pinky40_labels_256.npz"
    with np.load(path) as file:
        labels: npt.NDArray[np.uint16] = file[file.files[0]]
    return labels


@pytest.fixture(scope="module")
def boundary(truth: npt.NDArray[np.uint16]) -> Volume:
    lines = scipy.ndimage.gaussian_filter(label_boundaries(truth).astype(np.float32), 1.0) * 1.3
    lines += random_for("boundary noise", 0).normal(0, 0.08, truth.shape).astype(np.float32)
    volume: Volume = np.rint(lines.clip(0, 1) * 255).astype(np.uint8)[None]
    return volume


def timed(work: Callable[[], npt.NDArray[np.integer]]) -> tuple[float, npt.NDArray[np.integer]]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def typical(rounds: list[list[tuple[float, npt.NDArray[np.integer]]]]) -> list[tuple[float, npt.NDArray[np.integer]]]:
    """Of the rounds of several works, the median of each work's seconds, and its result."""
    return [(statistics.median(seconds for seconds, _ in one), one[-1][1]) for one in zip(*rounds, strict=True)]


def rand_error(truth: npt.NDArray[np.uint16], fragments: Ids, boundary: Volume) -> float:
    """After the same agglomeration."""
    graph = region_graph(fragments, boundary, boundary_links(), 0)
    mapping = agglomerate(graph, int(fragments.max()), MEAN, (SETTINGS.threshold,))[0]
    return adapted_rand(without_truth(count_overlaps(truth, mapping[fragments]), 0)).error


@pytest.mark.slow
@pytest.mark.alone
def test_watershed_is_three_times_as_fast_as_scikit_image_and_no_worse(
    truth: npt.NDArray[np.uint16], boundary: Volume
) -> None:
    peer = pytest.importorskip("skimage.segmentation")
    height_map, mask = heights_of(boundary, SETTINGS)
    heights, depth = height_map.heights, SETTINGS.min_depth * height_map.scale
    fragments = watershed(height_map, mask, VOLUME_AXES, depth)
    seeds = floors_of(fragments, heights)
    works: list[Callable[[], npt.NDArray[np.integer]]] = [
        lambda: watershed(height_map, mask, VOLUME_AXES, depth),
        lambda: seeded_watershed(height_map, seeds, mask, VOLUME_AXES),
        lambda: segment(boundary, SETTINGS),
    ]
    before = [timed(work) for work in works]
    theirs, other = timed(lambda: peer.watershed(heights, seeds))
    after = [[timed(work) for work in works] for _ in range(2)]  # around the long one, so that a busy moment meets all
    (ours, own), (seeded, grown), (whole, _) = typical([before, *after])
    errors = [rand_error(truth, np.asarray(labels, np.int32), boundary) for labels in (own, grown, other)]
    print(f"\n{int(seeds.max())} seeds: watershed that finds them {ours:.2f} s, rand error {errors[0]:.4f}")
    print(f"with given seeds {seeded:.2f} s, {errors[1]:.4f}; scikit-image with seeds {theirs:.2f} s, {errors[2]:.4f}")
    print(f"the whole decoding with watershed, graph, agglomeration and labels {whole:.2f} s")
    assert theirs > whole
    assert theirs > 3 * ours and theirs > 3 * seeded
    assert errors[0] < errors[2] + 0.001 and errors[1] < errors[2] + 0.001


def floors_of(fragments: Ids, heights: npt.NDArray[np.int32]) -> Ids:
    """The lowest voxel of each fragment, with its label; 0 elsewhere."""
    order = np.argsort(heights.reshape(-1), kind="stable")[::-1]
    lowest = np.empty(int(fragments.max()) + 1, np.int64)
    lowest[fragments.reshape(-1)[order]] = order  # the last one written stays: the lowest
    seeds = np.zeros(heights.size, np.int32)
    seeds[lowest[1:]] = np.arange(1, len(lowest))
    return seeds.reshape(heights.shape)
