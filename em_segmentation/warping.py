"""Where the voxels of a patch move: flips and turns, exactly, and smooth warps in one resampling.

Volumes are (C, z, y, x). Images are interpolated and reflected at the faces; ids and masks take the nearest voxel, and
what comes from outside the patch is 0.
"""

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from common.augment import draw_affine
from em_segmentation.config import Augmentation
from em_segmentation.regions import Triple, VoxelSize

NEARLY_ISOTROPIC = 1.5  # sections at most so many times as thick as a pixel is wide are warped along z too


@dataclasses.dataclass(frozen=True)
class Orientation:
    """Axes in another order, then some of them flipped."""

    order: Triple  # axis of the volume that becomes z, y, x
    flips: tuple[bool, bool, bool]


@dataclasses.dataclass(frozen=True)
class Warp:
    """Where the voxels of a warped volume come from, as voxel indices of the unwarped one."""

    z: Tensor | None  # (z, y, x); None: every section stays in its place
    y: Tensor  # (z, y, x), or (1, y, x) where all sections are warped alike
    x: Tensor


def proper_rotations() -> list[Orientation]:
    """The 24 rotations of a cube onto itself, the identity first."""
    found = []
    for z, y, x in itertools.permutations(range(3)):
        parity = round(np.linalg.det(np.eye(3)[[z, y, x]]))
        for flips in itertools.product((False, True), repeat=3):
            if parity * (-1) ** sum(flips) == 1:
                found.append(Orientation((z, y, x), (flips[0], flips[1], flips[2])))
    return found


ROTATIONS = proper_rotations()
ROTATIONS_IN_PLANE = [rotation for rotation in ROTATIONS if rotation.order[0] == 0 and not rotation.flips[0]]


def draw_orientation(
    flip: np.random.Generator, chance: float, turn: np.random.Generator | None, all_axes: bool
) -> Orientation:
    """A turn other than none (None: no turn), in the y-x plane or over all axes, then every axis flipped by chance."""
    rotation = ROTATIONS[0]
    if turn is not None:
        rotations = ROTATIONS if all_axes else ROTATIONS_IN_PLANE
        rotation = rotations[int(turn.integers(1, len(rotations)))]
    z, y, x = (bool(u < chance) != turned for u, turned in zip(flip.random(3), rotation.flips, strict=True))
    return Orientation(rotation.order, (z, y, x))


def orient(volume: Tensor, orientation: Orientation) -> Tensor:
    """A volume in another orientation, exactly; an axis only takes the place of one as long."""
    turned = volume.permute(0, *(axis + 1 for axis in orientation.order))
    assert turned.shape == volume.shape, f"Expected equal edges to turn, got {tuple(volume.shape)}"
    axes = [axis + 1 for axis, flip in enumerate(orientation.flips) if flip]
    return (turned.flip(axes) if axes else turned).contiguous()


def draw_warp(
    affine: np.random.Generator | None,
    elastic: np.random.Generator | None,
    size: Triple,
    voxel_size_nm: VoxelSize,
    settings: Augmentation,
    device: torch.device,
) -> Warp:
    """A rotation and scaling in the y-x plane about the patch's centre, a smooth random displacement, or both (None: not).

    Both are drawn in nm, so that pixels that are not square are respected.
    """
    inverse = np.eye(2)
    if affine is not None:
        matrix = draw_affine(affine, settings.rotation_degrees, settings.scale, np.zeros(3))[0][1:, 1:]
        pixel = np.array(voxel_size_nm[1:])
        inverse = np.linalg.inv(matrix) * pixel / pixel[:, None]
    y, x = (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2 for n in size[1:])
    source_y = (inverse[0, 0] * y[:, None] + inverse[0, 1] * x + (size[1] - 1) / 2)[None]  # (1, y, x)
    source_x = (inverse[1, 0] * y[:, None] + inverse[1, 1] * x + (size[2] - 1) / 2)[None]
    if elastic is None:
        return Warp(None, source_y, source_x)
    moved = smooth_displacement(elastic, size, voxel_size_nm, settings, device)  # (2 or 3, z, y, x)
    source_z = None
    if len(moved) == 3:
        source_z = moved[0] + torch.arange(size[0], device=device, dtype=torch.float32)[:, None, None]
    return Warp(source_z, moved[-2] + source_y, moved[-1] + source_x)


def smooth_displacement(
    random: np.random.Generator, size: Triple, voxel_size_nm: VoxelSize, settings: Augmentation, device: torch.device
) -> Tensor:
    """Displacements along y and x, or z, y and x where voxels are nearly isotropic, in voxels: (2 or 3, z, y, x).

    Cubic B-splines between random knots; every voxel's displacement has the standard deviation of the settings, before
    the patch's mean is taken off: a shift of everything changes no shape, and would push annotated voxels out.
    """
    isotropic = max(voxel_size_nm) <= NEARLY_ISOTROPIC * min(voxel_size_nm) and size[0] > 1
    along = voxel_size_nm if isotropic else voxel_size_nm[1:]
    weights = []
    for n, edge in zip(size, voxel_size_nm, strict=True):
        weights.append(spline_weights(n, max(settings.elastic_spacing_nm / edge, 1.0)))
    knots = random.standard_normal((len(along), *(weight.shape[1] for weight in weights)))
    knots *= settings.elastic_amplitude_nm / np.array(along)[:, None, None, None]
    knots = np.einsum("zk,ckyx->czyx", weights[0], knots)
    over_y, over_x, field = (torch.from_numpy(a.astype(np.float32)).to(device) for a in (*weights[1:], knots))
    field = over_y @ field @ over_x.T
    return field - field.mean((1, 2, 3), keepdim=True)


def spline_weights(n: int, spacing: float) -> np.ndarray:
    """Weights (n, knots) of cubic B-splines whose knots lie `spacing` voxels apart; the squares of a row sum to 1."""
    distance = np.abs(np.arange(n)[:, None] / spacing - np.arange(-1, int((n - 1) / spacing) + 3))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    normalised: np.ndarray = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    return normalised


def warp_image(image: Tensor, warp: Warp) -> Tensor:
    """A float image (C, z, y, x) sampled (bi-, tri-)linearly."""
    channels, depth, height, width = image.shape
    # grid_sample wants x, y, z, with -1 and 1 at the centres of the outermost voxels
    axes = [(warp.x, width), (warp.y, height)] + ([] if warp.z is None else [(warp.z, depth)])
    grid = torch.stack([source * (2 / max(n - 1, 1)) - 1 for source, n in axes], -1)
    if warp.z is not None:
        return _sample(image[None], grid[None])[0]
    if len(grid) == 1:
        return _sample(image.reshape(1, channels * depth, height, width), grid).view_as(image)
    return _sample(image.transpose(0, 1), grid).transpose(0, 1)


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return torch.nn.functional.grid_sample(image, grid, "bilinear", "reflection", align_corners=True)


def nearest_voxels(warp: Warp, size: Triple) -> tuple[Tensor, Tensor]:
    """Index of the voxel that is nearest to every source, and whether it lies in the patch: int64 and bool.

    Shape (S, voxels): indices within a section (S = z, or 1 for all alike), or within the volume (S = 1).
    """
    depth, height, width = size
    assert height * width <= 2**24, f"Expected sections whose indices float32 holds exactly, got {height} x {width}"
    (y, y_inside), (x, x_inside) = nearest_in(warp.y, height), nearest_in(warp.x, width)
    index, inside = (y * width + x).long(), y_inside & x_inside
    if warp.z is None:
        return index.flatten(1), inside.flatten(1)
    z, z_inside = nearest_in(warp.z, depth)
    return (index + z.long() * (height * width)).view(1, -1), (inside & z_inside).view(1, -1)


def nearest_in(source: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The whole numbers of 0 .. n - 1 nearest to float indices, as floats, and whether none is nearer outside."""
    nearest = source.round()
    kept = nearest.clamp(0, n - 1)
    return kept, kept == nearest


def take_nearest(volume: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """A volume (C, z, y, x) of ids or of a mask, at nearest_voxels; 0 where they lie outside."""
    folded = volume.reshape(len(volume), -1, index.shape[1])  # (C, z or 1, voxels)
    taken = folded.gather(2, index.expand(folded.shape))
    return (taken * inside).view_as(volume)
