"""Augmentation: an image and its points move together, exactly where that is possible."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.augment import Placement, add_noise, draw_affine, flip_points, place, turn_points, warp, warp_points

SHAPE = (24, 30, 38)  # no two axes alike
SQUARE = (20, 34, 34)  # of quarter turns
FLIPS = list(itertools.product((False, True), repeat=3))
NOTHING = np.zeros(3)


def grid(shape: tuple[int, ...]) -> Tensor:
    """Voxel indices (z, y, x, 3)."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"), -1)


def blob(shape: tuple[int, ...], point: Tensor, sigma: float) -> Tensor:
    """A Gaussian around a float voxel index, (1, z, y, x)."""
    return torch.exp(-(grid(shape) - point).square().sum(-1) / (2 * sigma**2))[None]


def centroid(image: Tensor) -> Tensor:
    """The centre of mass of (1, z, y, x), in voxels."""
    mass = image[0].double()
    return (mass[..., None] * grid(tuple(mass.shape)).double()).sum((0, 1, 2)) / mass.sum()


def near_centre(draw: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor((np.array(shape) - 1) / 2 + draw.uniform(-2.5, 2.5, 3), dtype=torch.float32)


def random_matrix(draw: np.random.Generator) -> np.ndarray:
    """Any affine map that is not too far from the identity: all axes mix."""
    return np.eye(3) + draw.uniform(-0.15, 0.15, (3, 3))


@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize("turns", [-1, 0, 1, 2, 3, 5])
def test_flips_and_turns_carry_every_voxel_with_its_index(flips: tuple[bool, bool, bool], turns: int) -> None:
    shape = (2, 3, 3) if turns else (2, 3, 5)
    image = torch.arange(float(np.prod(shape))).view(1, *shape)
    indices = grid(shape).view(-1, 3)
    moved, points = place(image, indices, Placement(flips, turns, None, NOTHING))
    assert moved.shape == image.shape
    z, y, x = points.long().unbind(1)
    assert torch.equal(moved[0, z, y, x], image.flatten())
    assert torch.equal(points, points.round())


def test_a_quarter_turn_goes_from_y_towards_x() -> None:
    """The first row becomes the first column, read upwards; as numpy's and torch's rot90."""
    image = torch.arange(9.0).view(1, 1, 3, 3)
    moved, points = place(image, torch.tensor([[0.0, 0.0, 2.0]]), Placement((False,) * 3, 1, None, NOTHING))
    assert moved[0, 0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
    assert points.tolist() == [[0, 0, 0]]


def test_points_between_voxels_flip_and_turn_about_the_middle() -> None:
    points = torch.tensor([[0.25, -0.5, 3.75]])
    assert flip_points(points, [0, 2], torch.Size((4, 5, 6))).tolist() == [[2.75, -0.5, 1.25]]
    assert turn_points(points, 1, 5).tolist() == [[0.25, 0.25, -0.5]]
    assert torch.equal(turn_points(points, 4, 5), points)


def test_a_quarter_turn_of_a_patch_that_is_not_square_is_refused() -> None:
    image = torch.zeros(1, 4, 5, 6)
    with pytest.raises(AssertionError, match="Expected y = x"):
        place(image, torch.zeros(0, 3), Placement((False,) * 3, 1, None, NOTHING))
    place(image, torch.zeros(0, 3), Placement((False,) * 3, 4, None, NOTHING))


@pytest.mark.parametrize("seed", range(12))
def test_a_warp_moves_a_blob_where_it_says_the_point_goes(seed: int) -> None:
    draw = np.random.default_rng(seed)
    point = near_centre(draw, SHAPE)
    placement = Placement((False,) * 3, 0, random_matrix(draw), draw.uniform(-2, 2, 3))
    moved, points = place(blob(SHAPE, point, 1.5), point[None], placement)
    assert (points[0] - point).norm() > 0.1, "it does move"
    assert (centroid(moved) - points[0]).norm() < 0.05


@pytest.mark.parametrize(("row", "column"), [(0, 1), (1, 0), (0, 2), (2, 0), (0, 0)])
def test_a_warp_that_touches_z_in_one_place_only_is_not_taken_for_one_that_does_not(row: int, column: int) -> None:
    matrix = np.eye(3)
    matrix[row, column] += 0.15
    point = torch.tensor([13.5, 12.0, 22.0])
    moved, points = place(blob(SHAPE, point, 1.5), point[None], Placement((False,) * 3, 0, matrix, NOTHING))
    assert (points[0] - point).norm() > 0.2
    assert (centroid(moved) - points[0]).norm() < 0.05


@pytest.mark.parametrize("seed", range(12))
def test_flips_turns_and_warp_in_one_move_a_blob_with_its_point(seed: int) -> None:
    draw = np.random.default_rng(100 + seed)
    point = near_centre(draw, SQUARE)
    matrix, shift = draw_affine(draw, 30.0, 0.1, np.array([1.0, 3.0, 3.0]))
    placement = Placement(tuple(draw.random(3) < 0.5), int(draw.integers(4)), matrix, shift)  # type: ignore[arg-type]
    moved, points = place(blob(SQUARE, point, 1.5), point[None], placement)
    assert (centroid(moved) - points[0]).norm() < 0.05


def test_each_planted_mistake_in_a_warp_would_be_seen() -> None:
    """Half a voxel of centre, a transposed matrix, x before z: each parts the point from its blob."""
    draw = np.random.default_rng(0)
    point, shift = torch.tensor([14.0, 11.5, 23.0]), np.array([1.0, 2.0, -2.0])
    matrix = random_matrix(draw)
    found = centroid(warp(blob(SHAPE, point, 1.5), matrix, shift))
    size = torch.Size(SHAPE)
    for wrong_matrix, wrong_shift, offset in (
        (matrix.T, shift, 0.0),
        (matrix[::-1, ::-1].copy(), shift, 0.0),
        (matrix, shift[::-1].copy(), 0.0),
        (np.linalg.inv(matrix), -shift, 0.0),
        (matrix, shift, 0.5),
    ):
        placed = warp_points(point[None], size, Placement((False,) * 3, 0, wrong_matrix, wrong_shift))[0] + offset
        assert (found - placed).norm() > 0.2


def test_a_known_rotation() -> None:
    """A quarter turn as an affine map is the quarter turn, and so are its points."""
    image, points = torch.randn(2, 5, 9, 9), torch.tensor([[1.0, 2.0, 7.5]])
    matrix = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # y -> x
    turned, turned_points = place(image, points, Placement((False,) * 3, 0, matrix, NOTHING))
    exact, exact_points = place(image, points, Placement((False,) * 3, 1, None, NOTHING))
    torch.testing.assert_close(turned, exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(turned_points, exact_points)


def test_the_identity_changes_nothing_and_a_whole_voxel_shift_rolls() -> None:
    image = torch.randn(2, 7, 8, 9)
    torch.testing.assert_close(warp(image, np.eye(3), NOTHING), image, atol=1e-5, rtol=0)
    moved = warp(image, np.eye(3), np.array([1.0, -2.0, 3.0]))
    torch.testing.assert_close(moved[:, 1:, :-2, 3:], image[:, :-1, 2:, :-3], atol=1e-5, rtol=0)
    assert torch.allclose(moved[:, 1:, :-2, :3], image[:, :-1, 2:, :1], atol=1e-5), "the border is repeated"


def test_a_warp_and_its_inverse_cancel() -> None:
    draw = np.random.default_rng(0)
    matrix, shift = random_matrix(draw), np.array([1.5, -1.0, 0.5])
    inverse = np.linalg.inv(matrix)
    image = blob(SHAPE, near_centre(draw, SHAPE), 3.0)
    moved = warp(image, matrix, shift)
    assert (moved - image).abs().max() > 0.3
    assert (warp(moved, inverse, -inverse @ shift) - image).abs().max() < 0.08, "but for twice interpolating"
    points = torch.randn(20, 3) * 10
    there = warp_points(points, torch.Size(SHAPE), Placement((False,) * 3, 0, matrix, shift))
    back = warp_points(there, torch.Size(SHAPE), Placement((False,) * 3, 0, inverse, -inverse @ shift))
    torch.testing.assert_close(back, points, atol=1e-4, rtol=0)


def test_a_single_slice_is_warped_in_its_plane() -> None:
    """A 2D image is a volume of one slice."""
    point = torch.tensor([0.0, 14.0, 20.5])
    matrix, shift = draw_affine(np.random.default_rng(1), 30.0, 0.1, np.array([0.0, 3.0, 3.0]))
    moved, points = place(blob((1, 30, 38), point, 1.5), point[None], Placement((False,) * 3, 0, matrix, shift))
    assert (centroid(moved) - points[0]).norm() < 0.05


def test_points_that_are_not_there_stay_so_and_disturb_no_other() -> None:
    draw = np.random.default_rng(0)
    points = torch.tensor([[3.0, 4.0, 5.0], [math.nan] * 3, [6.0, 7.0, 8.0]])
    placement = Placement((True, False, True), 3, random_matrix(draw), np.ones(3))
    image = torch.zeros(1, *SQUARE)
    moved = place(image, points, placement)[1]
    assert moved[1].isnan().all()
    torch.testing.assert_close(moved[[0, 2]], place(image, points[[0, 2]], placement)[1])
    assert place(image, torch.zeros(0, 3), placement)[1].shape == (0, 3)


def test_the_originals_are_left_as_they_are() -> None:
    image, points = torch.randn(1, *SQUARE), torch.rand(4, 3)
    before = image.clone(), points.clone()
    place(image, points, Placement((True, True, False), 1, np.eye(3) * 1.1, np.ones(3)))
    add_noise(image, 1.0, 0)
    assert torch.equal(image, before[0])
    assert torch.equal(points, before[1])


def test_drawn_maps_keep_within_their_limits_reach_them_and_leave_z_alone() -> None:
    draw = np.random.default_rng(0)
    drawn = [draw_affine(draw, 20.0, 0.2, np.array([9.0, 1.0, 5.0])) for _ in range(400)]
    planes, shifts = np.array([matrix[1:, 1:] for matrix, _ in drawn]), np.array([shift for _, shift in drawn])
    scales, angles = np.sqrt(np.linalg.det(planes)), np.degrees(np.arctan2(planes[:, 1, 0], planes[:, 0, 0]))
    for values, limit in ((scales - 1, 0.2), (angles, 20.0), (shifts[:, 1], 1.0), (shifts[:, 2], 5.0)):
        assert 0.95 * limit < values.max() <= limit
        assert -limit <= values.min() < -0.95 * limit
    np.testing.assert_allclose(planes @ planes.transpose(0, 2, 1), scales[:, None, None] ** 2 * np.eye(2), atol=1e-12)
    for matrix, shift in drawn:
        assert matrix[0].tolist() == matrix[:, 0].tolist() == [1, 0, 0]
        assert shift[0] == 0
    assert len({tuple(matrix.flatten()) for matrix, _ in drawn}) == 400


def test_a_warp_that_keeps_z_takes_the_short_way_to_the_same_image() -> None:
    """The least change of z leaves the short way; both agree but for that change."""
    matrix, shift = draw_affine(np.random.default_rng(3), 30.0, 0.2, np.array([0.0, 3.0, 3.0]))
    nearly = matrix + np.diag([1e-7, 0, 0])
    image = torch.randn(2, 5, 8, 9)
    torch.testing.assert_close(warp(image, matrix, shift), warp(image, nearly, shift), atol=1e-4, rtol=0)


def test_no_freedom_is_the_identity_and_equal_generators_draw_equal_maps() -> None:
    matrix, shift = draw_affine(np.random.default_rng(0), 0.0, 0.0, NOTHING)
    assert (matrix == np.eye(3)).all()
    assert (shift == 0).all()
    one, two = (draw_affine(np.random.default_rng(7), 15.0, 0.1, np.ones(3)) for _ in range(2))
    assert (one[0] == two[0]).all()
    assert (one[1] == two[1]).all()


def test_noise_is_a_function_of_its_seed_with_the_given_deviation() -> None:
    image, state = torch.full((1, 20, 30, 40), 5.0), torch.get_rng_state()
    one, same, other = (add_noise(image, 0.3, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    noise, more = (one - image).flatten(), (other - image).flatten()
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.corrcoef(torch.stack([noise, more]))[0, 1].abs() < 0.03
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not asked"
    assert torch.equal(add_noise(image, 0.0, 1), image)
    assert add_noise(image.half(), 0.3, 1).dtype == torch.float16
