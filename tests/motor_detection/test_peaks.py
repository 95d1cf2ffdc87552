"""Picks: positions finer than a cell, close pairs told apart, one pick per blob, distances in angstrom."""

import numpy as np
import pytest
import torch

from common.streams import random_for
from motor_detection.heatmap import render_heatmaps
from motor_detection.peaks import Peaks, find_peaks

SIGMA_ANGSTROM = 200.0
CUBE = (112, 112, 112)


def drawn(motors: np.ndarray, spacing: np.ndarray, size: tuple[int, int, int], stride: int, width: float) -> np.ndarray:
    """The heat map of some motors (n, 3); width is a factor on sigma."""
    sigma = torch.from_numpy(width * SIGMA_ANGSTROM / spacing)[None]
    return render_heatmaps(torch.from_numpy(motors)[None], sigma, size, stride)[0, 0].numpy()


def picked(heat: np.ndarray, stride: int, spacing: np.ndarray) -> Peaks:
    return find_peaks(heat, stride, spacing, SIGMA_ANGSTROM, 300.0, 0.02, 50)


def even(spacing_angstrom: float) -> np.ndarray:
    return np.full(3, spacing_angstrom)


def random_direction(random: np.random.Generator) -> np.ndarray:
    direction = random.normal(size=3)
    return direction / np.linalg.norm(direction)


@pytest.mark.parametrize(("spacing", "stride"), [(6.5, 16), (13.1, 2), (13.1, 16), (16.8, 4), (19.7, 8), (19.7, 16)])
def test_a_single_motor_is_found_once_and_far_finer_than_a_cell(spacing: float, stride: int) -> None:
    """Anywhere in a volume whose size the stride does not divide; every third motor lies within a cell of a face."""
    random = random_for("single peaks", stride, int(10 * spacing))
    size = (6 * stride + 1, 7 * stride, 8 * stride - 1)
    for draw in range(60):
        motor = random.uniform(-0.5, np.array(size) - 0.5, (1, 3))
        if draw % 3 == 0:
            axis = random.integers(3)
            near = random.uniform(-0.5, stride - 0.5)
            motor[0, axis] = near if random.random() < 0.5 else size[axis] - 1 - near
        peaks = picked(drawn(motor, even(spacing), size, stride, 1.0), stride, even(spacing))
        assert len(peaks.points) == 1, f"{motor} -> {peaks}"
        assert np.abs(peaks.points - motor).max() < 0.1 * stride, f"{motor} -> {peaks}"
        assert peaks.scores[0] > 0.95, "the score must not depend on where between cell centres a motor lies"


@pytest.mark.parametrize("corner", [0, 1, 2, 3, 4, 5, 6, 7])
def test_motors_in_the_corners_of_the_volume(corner: int) -> None:
    """Only 8 cells see a motor in a corner, and none beyond the faces may be taken for a measured 0."""
    ends = np.array([(-0.5, 111.5), (0.0, 111.0), (3.0, 108.0)])
    motor = np.array([[ends[axis, corner >> axis & 1] for axis in range(3)]])
    for spacing in (13.1, 19.7):
        peaks = picked(drawn(motor, even(spacing), CUBE, 16, 1.0), 16, even(spacing))
        assert len(peaks.points) == 1
        np.testing.assert_allclose(peaks.points, motor, atol=1.6)


@pytest.mark.parametrize("spacing", [13.1, 19.7])
def test_the_closest_real_pair_is_told_apart(spacing: float) -> None:
    """Two motors 432 angstrom apart, as in the BYU labels: at stride 16 that is 2.1 and 1.4 cells.

    In at least 95 of 100 random directions both are found, and nothing else, within 100 angstrom.
    """
    random = random_for("pairs", int(10 * spacing))
    found = 0
    for _ in range(100):
        half = random_direction(random) * 216 / spacing
        middle = random.uniform(40, 72, 3)
        pair = np.stack([middle - half, middle + half])
        peaks = picked(drawn(pair, even(spacing), CUBE, 16, 1.0), 16, even(spacing))
        distances = np.linalg.norm((peaks.points[:, None] - pair) * spacing, axis=2)
        found += len(peaks.points) == 2 and bool((distances.min(0) < 100).all())
    assert found >= 95


@pytest.mark.parametrize(("width", "from_faces"), [(1.2, 0), (1.6, 0), (2.5, 30), (3.5, 30)])
def test_a_wide_blob_is_one_pick(width: float, from_faces: int) -> None:
    """A network draws wider blobs where it is unsure; width alone is no second motor."""
    random = random_for("wide", int(10 * width))
    for _ in range(50):
        motor = random.uniform(from_faces, 111 - from_faces, (1, 3))
        peaks = picked(0.6 * drawn(motor, even(13.1), CUBE, 16, width), 16, even(13.1))
        assert len(peaks.points) == 1
        assert np.linalg.norm((peaks.points - motor) * 13.1) < SIGMA_ANGSTROM


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_a_plateau_is_one_pick_in_its_middle(stride: int) -> None:
    """A saturated map has flat tops, several cells wide at fine strides."""
    random = random_for("plateau", stride)
    for _ in range(20):
        motor = random.uniform(30, 82, (1, 3))
        flat = np.minimum(2 * drawn(motor, even(13.1), CUBE, stride, 1.0), 1)
        peaks = picked(flat, stride, even(13.1))
        assert len(peaks.points) == 1 and peaks.scores[0] == 1.0
        assert np.linalg.norm((peaks.points - motor) * 13.1) < 0.5 * SIGMA_ANGSTROM


def test_a_flat_map_does_no_harm() -> None:
    for shape in [(1, 1, 1), (1, 4, 1), (5, 5, 5)]:
        peaks = picked(np.full(shape, 0.5, np.float32), 16, even(13.1))
        assert 1 <= len(peaks.points) <= 2
        assert ((peaks.points >= -0.5) & (peaks.points <= 16 * np.array(shape) - 0.5)).all()


@pytest.mark.parametrize("level", [0.0, 1e-6, 0.0199])
def test_a_map_below_the_least_score_is_empty(level: float) -> None:
    peaks = picked(np.full((4, 5, 6), level, np.float32), 16, even(13.1))
    assert peaks.points.shape == (0, 3) and peaks.scores.shape == (0,)


def five_motors() -> tuple[np.ndarray, np.ndarray]:
    """Motors 48 voxels or more apart, and a map where they differ in height."""
    motors = np.array([[20.0, 20, 20], [20, 90, 25], [90, 22, 60], [88, 88, 88], [55, 55, 100]])
    heights = (0.3, 0.9, 0.5, 0.1, 0.7)
    one_each = [h * drawn(m[None], even(19.7), CUBE, 16, 1.0) for h, m in zip(heights, motors, strict=True)]
    return motors, np.max(one_each, axis=0)


def test_scores_are_the_heights_and_come_in_falling_order() -> None:
    motors, heat = five_motors()
    peaks = picked(heat, 16, even(19.7))
    np.testing.assert_allclose(peaks.scores, [0.9, 0.7, 0.5, 0.3, 0.1], rtol=0.03)
    np.testing.assert_allclose(peaks.points, motors[[1, 4, 2, 0, 3]], atol=1.6)


def test_the_best_picks_are_kept_up_to_the_limit() -> None:
    _, heat = five_motors()
    everything = picked(heat, 16, even(19.7))
    for limit in (1, 2, 4):
        few = find_peaks(heat, 16, even(19.7), SIGMA_ANGSTROM, 300.0, 0.02, limit)
        np.testing.assert_array_equal(few.points, everything.points[:limit])
        np.testing.assert_array_equal(few.scores, everything.scores[:limit])


def test_picks_below_the_least_score_are_not_written() -> None:
    _, heat = five_motors()
    for least, kept in ((0.2, 4), (0.4, 3), (0.8, 1), (0.95, 0)):
        assert len(find_peaks(heat, 16, even(19.7), SIGMA_ANGSTROM, 300.0, least, 50).points) == kept


def test_the_distance_between_picks_is_measured_in_angstrom_on_every_axis() -> None:
    """Two motors 64 voxels apart: 640 angstrom along z, 1280 along y and x."""
    spacing = np.array([10.0, 20.0, 20.0])
    for axis, angstrom in enumerate((640.0, 1280.0, 1280.0)):
        pair = np.full((2, 3), 55.5)
        pair[1, axis] -= 32
        pair[0, axis] += 32
        heat = drawn(pair, spacing, CUBE, 8, 1.0)
        for limit, kept in ((angstrom - 20, 2), (angstrom + 20, 1)):
            peaks = find_peaks(heat, 8, spacing, SIGMA_ANGSTROM, limit, 0.02, 50)
            assert len(peaks.points) == kept, f"axis {axis}, at least {limit} angstrom apart"


def test_a_voxel_index_is_returned_in_z_y_x() -> None:
    motor = np.array([[9.0, 40.0, 100.0]])
    heat = drawn(motor, even(15.0), (32, 64, 128), 16, 1.0)
    np.testing.assert_allclose(picked(heat, 16, even(15.0)).points, motor, atol=0.5)


def test_the_score_does_not_depend_on_where_between_cell_centres_a_motor_lies() -> None:
    """In the middle between eight cells the highest cell is only half as high; the fitted peak is not."""
    centre, between = np.full((1, 3), 55.5), np.full((1, 3), 47.5)
    heats = [0.6 * drawn(motor, even(19.7), CUBE, 16, 1.0) for motor in (centre, between)]
    assert heats[1].max() < 0.65 * heats[0].max()
    scores = [picked(heat, 16, even(19.7)).scores for heat in heats]
    assert len(scores[0]) == len(scores[1]) == 1
    assert scores[1][0] == pytest.approx(scores[0][0], rel=0.05)


def test_noise_moves_a_pick_by_less_than_half_a_cell() -> None:
    """Noise of a twentieth of the peak, on a floor of false probability."""
    random = random_for("noisy peaks")
    for _ in range(40):
        motor = random.uniform(20, 90, (1, 3))
        heat = 0.5 * drawn(motor, even(13.1), CUBE, 16, 1.0)
        noisy = np.clip(heat + random.normal(0, 0.025, heat.shape), 0.001, 1).astype(np.float32)
        peaks = find_peaks(noisy, 16, even(13.1), SIGMA_ANGSTROM, 300.0, 0.25, 50)
        assert np.linalg.norm(peaks.points[0] - motor[0]) < 8
