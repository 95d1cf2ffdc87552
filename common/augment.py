"""Augmentation on the device in plain torch; points move along with their image, analytically.

Every sample's draw is a pure function of its own generator, so augmentation does not depend on workers or ranks.
Points are voxel indices z, y, x with voxel centres at integers.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Placement:
    """A drawn geometric change of one sample: flips per axis, quarter turns in the y-x plane, then an affine map."""

    flips: tuple[bool, bool, bool]
    quarter_turns: int
    matrix: np.ndarray | None  # (3, 3): voxel offsets from the centre, before -> after; None = no affine map
    shift: np.ndarray  # (3,) voxels


def draw_affine(
    random: np.random.Generator, rotation_degrees: float, scale: float, shift_voxels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A rotation within +-degrees, a scaling in 1 +- scale and a shift within +-voxels (3,), all in the y-x plane.

    z is left alone: sections and tomograms are blurred along it in a way that no in-plane map changes, and a warp
    that keeps z costs a fifth of one that does not.
    """
    angle = math.radians(random.uniform(-rotation_degrees, rotation_degrees))
    factor = random.uniform(1 - scale, 1 + scale)
    cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
    shift = random.uniform(-shift_voxels, shift_voxels) * np.array([0.0, 1.0, 1.0])
    return np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]]), shift


def place(image: Tensor, points: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Apply a placement to one image (C, z, y, x) and its points (N, 3); NaN points stay NaN.

    Flips and turns are exact; the affine map samples trilinearly and repeats the border. Quarter turns need y = x.
    """
    axes = [axis for axis, flip in enumerate(placement.flips) if flip]
    if axes:
        image, points = image.flip([axis + 1 for axis in axes]), flip_points(points, axes, image.shape[1:])
    if placement.quarter_turns % 4:
        assert image.shape[2] == image.shape[3], f"Expected y = x for a quarter turn, got {tuple(image.shape)}"
        image = image.rot90(placement.quarter_turns, (2, 3))
        points = turn_points(points, placement.quarter_turns % 4, image.shape[2])
    if placement.matrix is None:
        return image, points
    return warp(image, placement.matrix, placement.shift), warp_points(points, image.shape[1:], placement)


def flip_points(points: Tensor, axes: list[int], size: torch.Size) -> Tensor:
    """Points (N, 3) of an image flipped along some axes."""
    flipped = points.clone()
    for axis in axes:
        flipped[:, axis] = size[axis] - 1 - points[:, axis]
    return flipped


def turn_points(points: Tensor, turns: int, edge: int) -> Tensor:
    """Points (N, 3) of an image turned by torch.rot90 from y towards x: (y, x) -> (edge - 1 - x, y) per turn."""
    z, y, x = points.unbind(1)
    for _ in range(turns):
        y, x = edge - 1 - x, y
    return torch.stack([z, y, x], 1)


def warp(image: Tensor, matrix: np.ndarray, shift: np.ndarray) -> Tensor:
    """Resample (C, z, y, x) so that content at centre + d moves to centre + matrix d + shift (voxels)."""
    if shift[0] == 0 and np.array_equal(matrix[0], [1, 0, 0]) and np.array_equal(matrix[:, 0], [1, 0, 0]):
        channels, depth, height, width = image.shape
        slices = image.reshape(1, channels * depth, height, width)
        return _sample(slices, matrix[1:, 1:], shift[1:]).view_as(image)
    return _sample(image[None], matrix, shift)[0]


def _sample(image: Tensor, matrix: np.ndarray, shift: np.ndarray) -> Tensor:
    """warp for one batch (1, C, n...) of any dimension."""
    size = torch.tensor(image.shape[2:], device=image.device, dtype=torch.float32)
    inverse = torch.from_numpy(np.linalg.inv(matrix)).to(image.device, torch.float32)
    back = -inverse @ torch.from_numpy(shift).to(image.device, torch.float32)
    half = (size - 1) / 2
    # affine_grid works in x, y, z order with -1 and 1 at the centres of the outermost voxels (align_corners)
    scaled = inverse * half[None, :] / half[:, None]
    theta = torch.cat([scaled.flip(0, 1), (back / half).flip(0)[:, None]], 1)
    grid = torch.nn.functional.affine_grid(theta[None], list(image.shape), align_corners=True)
    return torch.nn.functional.grid_sample(image, grid, "bilinear", "border", align_corners=True)


def warp_points(points: Tensor, size: torch.Size, placement: Placement) -> Tensor:
    """Points (N, 3) under the affine part of a placement."""
    assert placement.matrix is not None
    centre = (torch.tensor(size, device=points.device, dtype=points.dtype) - 1) / 2
    matrix = torch.from_numpy(placement.matrix).to(points.device, points.dtype)
    return centre + (points - centre) @ matrix.T + torch.from_numpy(placement.shift).to(points.device, points.dtype)


def add_noise(image: Tensor, level: float, seed: int) -> Tensor:
    """Gaussian noise of a standard deviation, from a seed of its own."""
    generator = torch.Generator(image.device).manual_seed(seed)
    return image + level * torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
