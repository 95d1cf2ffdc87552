"""Adapted Rand error and variation of information of 256^3 voxels of cortex beside scikit-image's, on the same labels.

Both run in one process, alternating, the best of four rounds each. Run alone for figures:
python -m pytest -m slow tests/benchmarks/test_em_measures.py -s
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from common.metrics.segmentation import adapted_rand, count_overlaps, variation_of_information, without_truth

Ids = npt.NDArray[np.integer]
ROUNDS = 4


@pytest.fixture(scope="module")
def truth() -> Ids:
    if "PLAINSCOPE_REAL_DATA" not in os.environ:
        pytest.skip("PLAINSCOPE_REAL_DATA is not set")
    path = Path(os.environ["PLAINSCOPE_REAL_DATA"]) / "em/seunglab_labels/pinky40_labels_256.npz"
    with np.load(path) as file:
        labels: Ids = file[file.files[0]]
    return labels


def pieces_of(truth: Ids) -> Ids:
    """Every object cut by a grid of 64^3 cells and grown over its borders: splits and merges as a segmentation has."""
    grid = np.stack(np.meshgrid(*(np.arange(n) // 64 for n in truth.shape), indexing="ij"))
    ids = truth.astype(np.int64) * 64 + np.ravel_multi_index(tuple(grid), (4, 4, 4))
    return np.asarray(scipy.ndimage.maximum_filter(np.where(truth > 0, ids, 0), 3), np.int64)


def ours(truth: Ids, found: Ids) -> tuple[float, ...]:
    table = without_truth(count_overlaps(truth, found), 0)
    information = variation_of_information(table)
    return adapted_rand(table).error, information.split, information.merge


@pytest.mark.slow
@pytest.mark.alone
def test_measures_are_ten_times_as_fast_as_scikit_image_and_equal(truth: Ids) -> None:
    metrics = pytest.importorskip("skimage.metrics")

    def theirs(truth: Ids, found: Ids) -> tuple[float, ...]:
        split, merge = metrics.variation_of_information(truth, found, ignore_labels=(0,))
        return metrics.adapted_rand_error(truth, found, ignore_labels=(0,))[0], split, merge

    found, seconds, values = pieces_of(truth), {}, {}
    works: dict[str, Callable[[Ids, Ids], tuple[float, ...]]] = {"ours": ours, "scikit-image": theirs}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            values[name] = work(truth, found)
            took = time.perf_counter() - began
            seconds[name] = min(seconds[name], took) if name in seconds else took
    ratio = seconds["scikit-image"] / seconds["ours"]
    print(f"\nadapted Rand error + VOI of {truth.shape}: ours {seconds['ours']:.2f} s, "
          f"scikit-image {seconds['scikit-image']:.2f} s ({ratio:.1f} x), values {values['ours']}")  # fmt: skip
    assert values["ours"] == pytest.approx(values["scikit-image"], abs=1e-9)
    assert ratio >= 10
