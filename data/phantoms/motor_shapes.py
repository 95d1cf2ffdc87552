"""Analytic shapes of a frozen cell, drawn as protein-like density into a grid.

Lengths are in angstrom, positions are (z, y, x) from the centre of voxel (0, 0, 0). Density is in units of protein
above vitreous ice. Where shapes overlap the denser one wins, so a complex displaces the water and lipid around it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]  # [z, y, x]
Points = npt.NDArray[np.float64]  # (n, 3) or (3,): z, y, x in angstrom

EDGE = 5.0  # angstrom: scale of the sigmoid at a surface; 10 to 90 % within 22 angstrom
TABLE_STEP = 4.0  # angstrom: resolution of radial tables, a third of a voxel or finer


@dataclasses.dataclass(frozen=True)
class Grid:
    """A density map under construction and the spacing of its voxels."""

    density: Volume
    spacing_angstrom: float


@dataclasses.dataclass(frozen=True)
class Ring:
    """A solid of revolution about a membrane's normal: heights are measured outwards from the inner membrane."""

    inner: float
    outer: float
    low: float
    high: float
    density: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """A capsule-shaped cell; `radius` is that of the inner membrane."""

    start: tuple[float, float, float]  # one end of the capsule's axis
    axis: tuple[float, float, float]  # unit vector
    length: float
    radius: float
    periplasm: float  # inner to outer membrane
    wave_height: float
    wave_numbers: tuple[float, float, float, float]  # radian per angstrom
    wave_phases: tuple[float, float, float, float]


def smooth_step(depth: Volume) -> Volume:
    """1 well inside (depth >> 0), 0 well outside, 1/2 on the surface; depth in angstrom."""
    return np.asarray(0.5 + 0.5 * np.tanh(depth / np.float32(2 * EDGE)), np.float32)


def grid_axes(shape: tuple[int, ...], spacing_angstrom: float) -> tuple[Volume, Volume, Volume]:
    """Positions of all voxels as three arrays that broadcast: (z, 1, 1), (1, y, 1), (1, 1, x)."""
    z, y, x = (np.arange(n, dtype=np.float32) * np.float32(spacing_angstrom) for n in shape)
    return z[:, None, None], y[None, :, None], x[None, None, :]


def box_around(grid: Grid, centre: Points, reach: float) -> tuple[Volume, tuple[Volume, Volume, Volume]]:
    """The part of the map within `reach` of a position along each axis (a view, possibly empty) and its offsets."""
    spacing, slices, offsets = grid.spacing_angstrom, [], []
    for position, size in zip(centre.tolist(), grid.density.shape, strict=True):
        low = min(max(int(np.ceil((position - reach) / spacing)), 0), size)
        high = min(max(int(np.floor((position + reach) / spacing)) + 1, low), size)
        slices.append(slice(low, high))
        offsets.append((np.arange(low, high) * spacing - position).astype(np.float32))
    z, y, x = offsets
    return grid.density[tuple(slices)], (z[:, None, None], y[None, :, None], x[None, None, :])


def draw_ball(grid: Grid, centre: Points, radius: float, density: float) -> None:
    """A solid ball."""
    view, (z, y, x) = box_around(grid, centre, radius + 3 * EDGE)
    if view.size:
        np.maximum(view, density * smooth_step(radius - np.sqrt(z * z + y * y + x * x)), out=view)


def draw_vesicle(grid: Grid, centre: Points, radii: Points, density: float) -> None:
    """A closed lipid bilayer about 45 angstrom thick around an ellipsoid of water; radii along z, y, x."""
    view, (z, y, x) = box_around(grid, centre, float(radii.max()) + 50)
    if view.size:
        a, b, c = (np.float32(radius) for radius in radii)
        stretched = np.sqrt((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2)
        distance = (stretched - 1) * np.float32(radii.mean())
        np.maximum(view, density * smooth_step(22 - np.abs(distance)), out=view)


def draw_tube(grid: Grid, path: Points, radius: float, density: float) -> None:
    """A rod of constant radius along a polyline (n, 3)."""
    for begin, end in zip(path[:-1], path[1:], strict=True):
        length = float(np.linalg.norm(end - begin))
        view, (z, y, x) = box_around(grid, (begin + end) / 2, length / 2 + radius + 3 * EDGE)
        if not view.size:
            continue
        along_z, along_y, along_x = ((end - begin) / length).tolist()
        along = z * along_z + y * along_y + x * along_x
        beyond = along - np.clip(along, -length / 2, length / 2)
        squared = z * z + y * y + x * x - along * along + beyond * beyond
        np.maximum(view, density * smooth_step(radius - np.sqrt(np.maximum(squared, 0))), out=view)


def draw_rings(grid: Grid, anchor: Points, normal: Points, rings: Sequence[Ring]) -> None:
    """Solids of revolution about `normal` through `anchor` at height 0, from one table over (height, radius)."""
    widest = max(ring.outer for ring in rings) + 4 * EDGE
    lowest, highest = min(ring.low for ring in rings) - 4 * EDGE, max(ring.high for ring in rings) + 4 * EDGE
    heights = np.arange(lowest, highest + TABLE_STEP, TABLE_STEP, dtype=np.float32)[:, None]
    radii = np.arange(0, widest + TABLE_STEP, TABLE_STEP, dtype=np.float32)[None, :]
    table = np.zeros((heights.size, radii.size), np.float32)
    for ring in rings:
        solid = smooth_step(heights - ring.low) * smooth_step(ring.high - heights)
        annulus = (
            smooth_step(radii - ring.inner) * smooth_step(ring.outer - radii)
            if ring.inner > 0
            else smooth_step(ring.outer - radii)
        )
        np.maximum(table, ring.density * solid * annulus, out=table)
    view, (z, y, x) = box_around(grid, anchor, float(np.hypot(widest, max(-lowest, highest))))
    if not view.size:
        return
    height = z * normal[0].item() + y * normal[1].item() + x * normal[2].item()
    radius = np.sqrt(np.maximum(z * z + y * y + x * x - height * height, 0))
    row, column = ((height - lowest) / TABLE_STEP + 0.5).astype(np.int32), (radius / TABLE_STEP + 0.5).astype(np.int32)
    inside = (row >= 0) & (row < heights.size) & (column < radii.size)
    view[inside] = np.maximum(view[inside], table[row[inside], column[inside]])


def signed_distance(cell: Cell, z: Volume, y: Volume, x: Volume) -> Volume:
    """Distance from the inner membrane, negative in the cytoplasm; arguments are positions that broadcast."""
    z, y, x = z - cell.start[0], y - cell.start[1], x - cell.start[2]
    along = z * cell.axis[0] + y * cell.axis[1] + x * cell.axis[2]
    nearest = np.clip(along, 0, cell.length)
    squared = (z * z + y * y + x * x) - nearest * (2 * along - nearest)
    k, phase = cell.wave_numbers, cell.wave_phases
    wave = np.sin(k[0] * z + phase[0]) * np.sin(k[1] * x + phase[1])
    wave = wave + np.sin(k[2] * y + phase[2]) * np.sin(k[3] * x + phase[3])
    return np.asarray(np.sqrt(np.maximum(squared, 0)) - (cell.radius + cell.wave_height * wave))


def distance_at(cell: Cell, points: Points) -> Points:
    """Signed distances (n,) of points (n, 3) from the inner membrane."""
    return np.asarray(signed_distance(cell, points[:, 0], points[:, 1], points[:, 2]), np.float64)  # type: ignore[arg-type]


def onto_membrane(cell: Cell, points: Points) -> tuple[Points, Points]:
    """Move points (n, 3) along the gradient onto the inner membrane; returns them and the outward normals."""
    step = 5.0  # angstrom, for the central difference
    for _ in range(4):
        sides = [distance_at(cell, points + s * step * e) for e in np.eye(3) for s in (1, -1)]
        normals = np.stack([sides[2 * i] - sides[2 * i + 1] for i in range(3)], 1)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        points = points - normals * distance_at(cell, points)[:, None]
    return points, normals


def envelope_profile(cell: Cell, spacing_angstrom: float, distances: Volume) -> Volume:
    """Density across the envelope: cytoplasm, inner membrane, periplasm with peptidoglycan, outer membrane, ice.

    Leaflets lie 17 angstrom to either side of a membrane's middle; the profile is averaged over a voxel's width.
    """
    width = np.hypot(8.0, spacing_angstrom / 3)

    def layer(position: float, height: float, sigma: float) -> Volume:
        return np.asarray(height * np.exp(-0.5 * ((distances - position) / sigma) ** 2), np.float32)

    outer = cell.periplasm
    cytoplasm = 0.3 * smooth_step(-distances)
    periplasm = 0.15 * smooth_step(distances) * smooth_step(outer - distances)
    leaflets = layer(-17, 1.0, width) + layer(17, 1.0, width) + layer(outer - 17, 1.0, width)
    leaflets += layer(outer + 17, 1.25, width)  # lipopolysaccharide thickens the outermost leaflet
    return np.asarray(cytoplasm + periplasm + leaflets + layer(0.65 * outer, 0.3, 22.0), np.float32)


def draw_cell(grid: Grid, cell: Cell, texture: Volume) -> None:
    """Fill the map with a cell's envelope and its crowded cytoplasm; `texture` is noise of the map's shape."""
    distance = signed_distance(cell, *grid_axes(grid.density.shape, grid.spacing_angstrom))
    reach = cell.periplasm + 100
    bins = np.arange(-100, reach, TABLE_STEP / 2, dtype=np.float32)
    table = envelope_profile(cell, grid.spacing_angstrom, bins)
    row = np.clip((distance + 100) * np.float32(2 / TABLE_STEP), 0, bins.size - 1).astype(np.int32)
    crowded = np.asarray(smooth_step(-bins - 25), np.float32)
    np.maximum(grid.density, table[row] + crowded[row] * texture, out=grid.density)


def draw_array(grid: Grid, cell: Cell, anchor: Points, normal: Points, radius: float) -> None:
    """A chemoreceptor array: receptors on a 120 angstrom lattice from the inner membrane to a base plate 250 below."""
    view, (z, y, x) = box_around(grid, anchor, radius + 320)
    if not view.size:
        return
    height = signed_distance(cell, z + anchor[0].item(), y + anchor[1].item(), x + anchor[2].item())
    along = z * normal[0].item() + y * normal[1].item() + x * normal[2].item()
    lateral = np.sqrt(np.maximum(z * z + y * y + x * x - along * along, 0))
    first = np.cross(normal, np.eye(3)[int(np.abs(normal).argmin())])
    first /= np.linalg.norm(first)
    second = np.cross(normal, first)
    pillars = np.ones_like(along)
    for direction in (first, 0.5 * first + np.sqrt(0.75) * second, -0.5 * first + np.sqrt(0.75) * second):
        a, b, c = (2 * np.pi / 104 * direction).tolist()  # rows of a hexagonal lattice with 120 angstrom between points
        pillars += np.cos(a * z + b * y + c * x)
    plate = smooth_step(25 - np.abs(height + 250))
    receptors = smooth_step(height + 250) * smooth_step(-height) * np.clip(pillars, 0, 3) / 3
    np.maximum(view, smooth_step(radius - lateral) * np.maximum(plate, 0.7 * receptors), out=view)
