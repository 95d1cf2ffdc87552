"""From affinities to instances: perfect ones give the truth, both conventions the same, real predictions good figures."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from common.metrics.segmentation import adapted_rand, count_overlaps, without_truth
from common.streams import random_for
from em_segmentation.decoding.links import Volume, affinity_links, sides
from em_segmentation.decoding.pipeline import segment, segment_at
from em_segmentation.decoding.settings import Settings

OFFSETS = ((1, 0, 0), (0, -1, 0), (0, 0, 1), (4, 0, 0), (0, 4, 0), (0, 0, -4))
Ids = npt.NDArray[np.integer]


def cells(shape: tuple[int, int, int], count: int) -> Ids:
    """Voronoi cells of random points."""
    points = random_for("cells", count).uniform(0, shape, (count, 3))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid[..., None, :] - points, axis=-1)
    labels: Ids = distance.argmin(-1) + 1
    return labels


def affinities_of(labels: Ids, stored_at: str) -> Volume:
    """255 where two voxels have one id, 0 elsewhere."""
    volume = random_for("outside", 0).integers(0, 256, (len(OFFSETS), *labels.shape), dtype=np.uint8)  # never looked at
    for link in affinity_links(OFFSETS, stored_at):
        z, y, x = labels.shape
        lower, upper = sides((0, 0, 0), (z, y, x), (z, y, x), link.offset)
        volume[link.channel][upper if link.at_upper else lower] = (labels[lower] == labels[upper]) * 255
    return volume


def rand_error(truth: Ids, labels: Ids) -> float:
    return adapted_rand(without_truth(count_overlaps(truth, labels), 0)).error


@pytest.mark.parametrize(
    ("method", "neighbours"),
    [
        ("components", "volume"),
        ("components", "sections"),
        ("watershed", "volume"),
        ("watershed", "sections"),
        ("mutex", "volume"),
    ],
)
def test_perfect_affinities_give_the_truth(method: str, neighbours: str) -> None:
    truth = cells((8, 50, 50), 6)
    settings = Settings(method=method, neighbours=neighbours, offsets=OFFSETS, smoothing=(0, 0, 0), threshold=200)
    if method == "components" and neighbours == "sections":
        truth = truth + 6 * np.arange(8)[:, None, None]  # nothing joins sections
    labels = segment(affinities_of(truth, "source"), settings)
    assert rand_error(truth, labels) < (0.001 if method == "components" else 0.005)
    assert labels.dtype == np.uint8 and abs(int(labels.max()) - len(np.unique(truth))) <= 3


@pytest.mark.parametrize("method", ["components", "watershed", "mutex"])
def test_both_conventions_give_the_same_labels(method: str) -> None:
    truth = cells((9, 20, 21), 9)
    results = []
    for stored_at in ("source", "destination"):
        settings = Settings(method=method, offsets=OFFSETS, stored_at=stored_at, threshold=100)
        results.append(segment(affinities_of(truth, stored_at), settings))
    assert np.array_equal(*results) and results[0].max() > 3
    wrong = Settings(method=method, offsets=OFFSETS, stored_at="source", threshold=100)
    assert not np.array_equal(segment(affinities_of(truth, "destination"), wrong), results[0])


def test_foreground_leaves_background_and_small_objects_go() -> None:
    truth = cells((12, 24, 24), 6)
    inside = scipy.ndimage.distance_transform_edt(truth == 2) > 1.5
    volume = affinities_of(np.where(inside, 2, np.arange(truth.size).reshape(truth.shape) + 10), "source")
    labels = segment(volume, Settings(offsets=OFFSETS, foreground=128, smoothing=(0, 0, 0), min_size=2))
    assert labels.max() == 1 and not labels[~inside].any() and labels[inside].mean() > 0.7
    assert not segment(volume, Settings(offsets=OFFSETS, foreground=128, min_size=5000)).any()


def read(path: str, name: str) -> Any:
    """A data set of a real file, or skip."""
    if "PLAINSCOPE_REAL_DATA" not in os.environ:
        pytest.skip("PLAINSCOPE_REAL_DATA is not set")
    h5py = pytest.importorskip("h5py")
    with h5py.File(Path(os.environ["PLAINSCOPE_REAL_DATA"]) / "em" / path) as file:
        return file[name][:]


def test_real_boundary_probabilities_of_electron_microscopy() -> None:
    """Settings fixed beforehand for a net that is sure of itself; the block's own over-segmentation has 0.25."""
    folder = "gala_mini/tests/example-data"
    probability, truth = read(f"{folder}/train-p1.lzf.h5", "stack"), read(f"{folder}/train-gt.lzf.h5", "stack")
    boundary = np.rint(probability * 255).astype(np.uint8)[None]
    settings = Settings(input="boundary", smoothing=(1, 2, 2), min_depth=10)
    errors = [rand_error(truth, labels) for labels in segment_at(boundary, settings, (128, 60, 20))]
    assert errors[0] < 0.1 and errors[1] < 0.05 and errors[2] < 0.03, errors
    assert rand_error(truth, read(f"{folder}/train-ws.lzf.h5", "stack")) > 0.2


def test_cell_walls_under_a_confocal_microscope() -> None:
    raw, truth = (read("plantseg_confocal/sample_ovule.h5", name) for name in ("raw", "label"))
    low, high = np.percentile(raw, (5, 99.5))
    boundary = np.rint(((raw - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)[None]
    settings = Settings(input="boundary", smoothing=(1, 2, 2), threshold=160)
    assert rand_error(truth, segment(boundary, settings)) < 0.05
