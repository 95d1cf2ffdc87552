"""The canvas in nm: a fine grid of thin planes for drawing, a coarse grid of nodes for smooth functions between them."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from data.phantoms.em_settings import EMPhantom

Float = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]  # (n, 3): z, y, x in nm
Box = tuple[slice, slice, slice]

NODE_NM = 24.0  # distance between nodes, about
PLANE_NM = 8.0  # thickness of the planes that a section is averaged over, about


@dataclasses.dataclass(frozen=True)
class Grid:
    """Voxel [i, j, k] of the fine grid lies at (i, j, k) * spacing nm; node [i, j, k] at (i, j, k) * steps * spacing."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]  # nm
    steps: tuple[int, int, int]  # fine voxels between two nodes
    planes: int  # fine planes per section

    @property
    def nodes(self) -> tuple[int, int, int]:
        """Shape of the node grid, which reaches one step beyond the fine grid."""
        z, y, x = ((n - 1) // step + 2 for n, step in zip(self.shape, self.steps, strict=True))
        return z, y, x

    @property
    def extent(self) -> Points:
        """Size in nm (3,)."""
        return np.asarray(np.array(self.shape) * np.array(self.spacing), np.float64)

    @property
    def cubic_micrometres(self) -> float:
        """Volume of the canvas."""
        return float(self.extent.prod() / 1e9)

    def node_points(self, box: Box) -> Points:
        """Positions of a box of nodes (z, y, x, 3) nm."""
        axes = [
            np.arange(part.start, part.stop) * (step * size)
            for part, step, size in zip(box, self.steps, self.spacing, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    def blocks(self, cells: tuple[int, int, int]) -> Iterator[Box]:
        """Boxes of so many cells between nodes; they share their border nodes and cover the node grid."""
        z, y, x = self.nodes
        return self.blocks_of((slice(0, z), slice(0, y), slice(0, x)), cells)

    def blocks_of(self, region: Box, cells: tuple[int, int, int]) -> Iterator[Box]:
        """The same within a box of nodes."""
        parts = [
            [slice(start, min(start + length + 1, part.stop)) for start in range(part.start, part.stop - 1, length)]
            for part, length in zip(region, cells, strict=True)
        ]
        yield from itertools.product(parts[0], parts[1], parts[2])

    def fine_box(self, nodes: Box) -> Box:
        """The fine voxels between a box of nodes, its last nodes excluded."""
        z, y, x = (
            slice(part.start * step, min((part.stop - 1) * step, n))
            for part, step, n in zip(nodes, self.steps, self.shape, strict=True)
        )
        return z, y, x

    def box_around(self, low: Points, high: Points) -> Box:
        """The fine voxels between two corners in nm, clipped to the canvas; never inverted."""
        starts = np.clip(np.floor(low / self.spacing), 0, self.shape).astype(int)
        stops = np.clip(np.ceil(high / self.spacing) + 1, starts, self.shape).astype(int)
        z, y, x = (slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))
        return z, y, x

    def points(self, box: Box) -> Points:
        """Positions of a box of fine voxels (z, y, x, 3) nm."""
        axes = [np.arange(part.start, part.stop) * size for part, size in zip(box, self.spacing, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def box_shape(box: Box) -> tuple[int, int, int]:
    """Lengths of a box."""
    z, y, x = (part.stop - part.start for part in box)
    return z, y, x


def canvas(settings: EMPhantom) -> Grid:
    """The grid of one volume, in the plane larger by the largest shift on every side."""
    depth, *plane = settings.voxel_size_nm
    planes = max(1, 2 * round((depth / PLANE_NM - 1) / 2) + 1)  # odd: one lies in the section's middle
    margin = 2 * settings.largest_shift_voxels
    spacing = (depth / planes, plane[0], plane[1])
    z, y, x = (max(1, round(NODE_NM / size)) for size in spacing)
    shape = (settings.shape[0] * planes, settings.shape[1] + margin, settings.shape[2] + margin)
    return Grid(shape, spacing, (z, y, x), planes)


def refined(nodes: npt.NDArray[np.floating], steps: tuple[int, int, int]) -> Float:
    """Linear interpolation of values at nodes (..., z, y, x) to the fine voxels before the last nodes."""
    values = np.asarray(nodes, np.float32)
    for axis, step in zip((-1, -2, -3), steps[::-1], strict=True):  # the largest arrays last, in whole planes
        low = values[along(axis, slice(None, -1))]
        rise = values[along(axis, slice(1, None))] - low
        shape = list(values.shape)
        shape[axis] = step * rise.shape[axis]
        values = np.empty(shape, np.float32)
        for part in range(step):
            np.multiply(rise, np.float32(part / step), out=values[along(axis, slice(part, None, step))])
            values[along(axis, slice(part, None, step))] += low
    return values


def along(axis: int, part: slice) -> tuple[Any, ...]:
    """The index of a part of an axis -1, -2 or -3, and all of the others."""
    return (..., part, *[slice(None)] * (-axis - 1))


def smooth_noise(
    shape: tuple[int, ...], spacing: tuple[float, ...], length_nm: float, rng: np.random.Generator
) -> Float:
    """Gaussian noise of mean 0 and deviation 1 that is smooth over `length_nm`.

    Scaled by the filter's known gain, not by what was drawn: a small canvas holds few correlation lengths.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    sigma = [length_nm / size for size in spacing]
    noise = scipy.ndimage.gaussian_filter(noise, sigma, mode="wrap", truncate=3.0)
    gain = np.prod([1 / np.sqrt(2 * np.sqrt(np.pi) * each) for each in sigma])
    return np.asarray(noise / np.float32(gain), np.float32)


def node_noise(grid: Grid, length_nm: float, rng: np.random.Generator) -> Float:
    """Smooth noise at the nodes."""
    spacing = tuple(step * size for step, size in zip(grid.steps, grid.spacing, strict=True))
    return smooth_noise(grid.nodes, spacing, length_nm, rng)


@dataclasses.dataclass(frozen=True, eq=False)
class Warp:
    """The smooth distortion of space: what is drawn at p in the plan appears where to_plan is p."""

    grid: Grid
    shift: Float  # (3, nodes z, y, x) nm

    def nodes_to_plan(self, box: Box) -> Points:
        """Plan positions of a box of nodes (z, y, x, 3) nm."""
        return np.asarray(self.grid.node_points(box) + np.moveaxis(self.shift[:, *box], 0, -1), np.float64)

    def to_plan(self, points: Points) -> Points:
        """Plan positions of points (n, 3) nm."""
        steps = np.array(self.grid.steps) * np.array(self.grid.spacing)
        index = (points / steps).T
        moved = [scipy.ndimage.map_coordinates(part, index, order=1, mode="nearest") for part in self.shift]
        return np.asarray(points + np.stack(moved, axis=-1), np.float64)

    def from_plan(self, planned: Points) -> Points:
        """Points (n, 3) nm whose plan positions are given, by damped fixed-point iteration."""
        points = planned
        for _ in range(8):
            points = points + 0.75 * (planned - self.to_plan(points))
        return points


def draw_warp(grid: Grid, settings: EMPhantom, rng: np.random.Generator) -> Warp:
    """A random distortion of the settings' amplitudes and lengths."""
    shift = np.zeros((3, *grid.nodes), np.float32)
    for amplitude, length in zip(settings.warp_nm, settings.warp_length_nm, strict=True):
        for axis in range(3):
            shift[axis] += np.float32(amplitude) * node_noise(grid, length, rng)
    return Warp(grid, shift)
