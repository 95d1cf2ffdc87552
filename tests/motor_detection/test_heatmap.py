"""Heat maps: the formula in float64, the place of cell centres, and labels that stay where the motors are."""

import itertools
import math

import numpy as np
import pytest
import torch

from common.streams import random_for
from motor_detection.heatmap import cell_centres, render_heatmaps
from motor_detection.labels import LabelledTomogram
from motor_detection.patches import ByteVolume, PatchPlan, cut_patch

NO_MOTOR = [math.nan] * 3


def brute_force(
    motors: np.ndarray, sigma: np.ndarray, size: tuple[int, int, int], stride: int
) -> np.ndarray:  # (cells z, y, x)
    """The definition, one cell after the other, in float64."""
    cells = tuple(math.ceil(n / stride) for n in size)
    heat = np.zeros(cells)
    for index in itertools.product(*(range(n) for n in cells)):
        for motor in motors:
            squared = sum(
                (((i + 0.5) * stride - 0.5 - m) / s) ** 2 for i, m, s in zip(index, motor, sigma, strict=True)
            )
            heat[index] = max(heat[index], math.exp(-squared / 2))
    return heat


def rendered(motors: np.ndarray, sigma: np.ndarray, size: tuple[int, int, int], stride: int) -> np.ndarray:
    heat = render_heatmaps(torch.from_numpy(motors)[None], torch.from_numpy(sigma)[None], size, stride)
    assert heat.dtype == torch.float32
    return heat[0, 0].numpy()


def centroid_cells(heat: np.ndarray) -> np.ndarray:
    """Where a lone Gaussian stands, in cells: along each axis the parabola through the logarithms around its top."""
    top = np.array(np.unravel_index(heat.argmax(), heat.shape))
    place = []
    for axis in range(3):
        line = np.log(np.moveaxis(heat, axis, 0)[(slice(None), *np.delete(top, axis))].astype(np.float64))
        below, here, above = line[top[axis] - 1 : top[axis] + 2]
        place.append(top[axis] + (below - above) / (2 * (below - 2 * here + above)))
    return np.array(place)


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_equals_the_definition_in_float64(stride: int) -> None:
    """Several motors, also outside the patch; a sigma of its own per axis; sizes that the stride does not divide."""
    random = random_for("heat map formula", stride)
    size = (3 * stride + 1, 4 * stride, 5 * stride - 1)
    motors = random.uniform(-0.4, 1.4, (4, 3)) * size
    sigma = random.uniform(0.7, 1.5, 3) * stride
    np.testing.assert_allclose(
        rendered(motors, sigma, size, stride), brute_force(motors, sigma, size, stride), atol=2e-6
    )


def test_cell_centres_follow_the_half_voxel_rule() -> None:
    """A cell covers `stride` voxels; its centre is the middle of their indices: 0 ... 15 -> 7.5."""
    for stride in (1, 2, 16):
        voxels = np.arange(5 * stride).reshape(5, stride)
        np.testing.assert_array_equal(cell_centres(5, stride, torch.device("cpu")), voxels.mean(1))
    heat = rendered(np.array([[7.5, 23.5, 39.5]]), np.full(3, 10.0), (48, 48, 48), 16)
    assert heat[0, 1, 2] == 1.0 and (heat == 1.0).sum() == 1


def test_overlapping_motors_give_their_maximum_and_order_does_not_matter() -> None:
    first, second, sigma = np.array([[20.0, 20, 20]]), np.array([[30.0, 40, 25]]), np.full(3, 12.0)
    size = (64, 64, 64)
    both = rendered(np.concatenate([first, second]), sigma, size, 8)
    np.testing.assert_array_equal(both, np.maximum(rendered(first, sigma, size, 8), rendered(second, sigma, size, 8)))
    np.testing.assert_array_equal(both, rendered(np.concatenate([second, first]), sigma, size, 8))
    assert both.max() <= 1.0


def test_padding_with_nan_changes_nothing() -> None:
    motors = torch.tensor([[[10.0, 20, 30], NO_MOTOR, NO_MOTOR], [NO_MOTOR] * 3])
    heat = render_heatmaps(motors, torch.full((2, 3), 9.0), (32, 48, 64), 16)
    assert heat.shape == (2, 1, 2, 3, 4)
    alone = render_heatmaps(motors[:1, :1], torch.full((1, 3), 9.0), (32, 48, 64), 16)
    assert torch.equal(heat[:1], alone) and not heat[1].any()


def test_a_patch_without_a_place_for_motors_is_empty() -> None:
    heat = render_heatmaps(torch.zeros(2, 0, 3), torch.ones(2, 3), (32, 32, 32), 16)
    assert heat.shape == (2, 1, 2, 2, 2) and not heat.any()


def test_anisotropic_voxels_make_anisotropic_blobs() -> None:
    """The same distance in angstrom weighs the same on every axis."""
    spacing, stride, sigma_angstrom = np.array([20.0, 10.0, 5.0]), 4, 200.0
    cell = np.array([3, 7, 15])
    heat = rendered((cell[None] + 0.5) * stride - 0.5, sigma_angstrom / spacing, (32, 64, 128), stride)
    for axis, cells in enumerate((2, 4, 8)):  # 160 angstrom on each axis
        there = cell.copy()
        there[axis] += cells
        assert heat[tuple(there)] == pytest.approx(math.exp(-0.5 * (160 / 200) ** 2), rel=1e-5)


def test_known_defect_1_labels_are_not_shifted_by_the_remainder_of_the_patch_origin() -> None:
    """The original cropped a heat map at origin // 16 and lost the remainder: up to 15 voxels, 7.5 on average.

    Any origin of a patch must leave the blob on its motor, within a tenth of a cell; the old rule fails this by far.
    """
    random = random_for("alignment")
    spacing, sigma_angstrom, stride, size = 13.1, 200.0, 16, (96, 96, 96)
    sigma = np.full(3, sigma_angstrom / spacing)
    volume = ByteVolume(np.zeros((200, 200, 200), np.uint8), (spacing,) * 3, 0.0, 1.0)
    errors, old_errors = [], []
    for _ in range(50):
        motor = random.uniform(85, 105, 3)
        origin = random.integers(45, 61, 3)
        label = LabelledTomogram("tomo", (200, 200, 200), spacing, motor[None], 0)
        plan = PatchPlan("single", (int(origin[0]), int(origin[1]), int(origin[2])))
        in_patch = cut_patch(volume, plan, label, size)["motors"]
        truth = (motor - origin + 0.5) / stride - 0.5
        errors.append(np.abs(centroid_cells(rendered(in_patch, sigma, size, stride)) - truth).max())
        whole = rendered(motor[None], sigma, (208, 208, 208), stride)
        cropped = whole[tuple(slice(o // stride, o // stride + 6) for o in origin)]
        old_errors.append(np.abs(centroid_cells(cropped) - truth).max())
    assert max(errors) < 0.1
    assert max(old_errors) > 0.5, "the planted defect must show"
