"""The plan of one simulated tomogram: its shape, its cells, and where their motors sit."""

import dataclasses
import itertools

import numpy as np
import scipy.fft

from common.streams import random_for
from data.phantoms.motor_settings import MotorPhantom, Range
from data.phantoms.motor_shapes import Cell, Points, distance_at, onto_membrane

CELLS_TRIED = 20  # cells drawn before a tomogram is content with one motor fewer
GUARD = 6  # voxels simulated beyond every face, so that the Fourier transform's seam lies outside the tomogram
CLICK_HEIGHT = -60.0  # angstrom from the inner membrane: where an annotator clicks, between MS-ring and C-ring


@dataclasses.dataclass(frozen=True)
class Scene:
    """The plan of one tomogram; positions in angstrom from the first voxel of the simulated grid."""

    shape: tuple[int, int, int]  # of the tomogram
    grid_shape: tuple[int, int, int]  # simulated: the tomogram lies in the middle
    spacing_angstrom: float
    cells: tuple[Cell, ...]
    anchors: Points  # (n, 3): motors' axes at the inner membrane
    normals: Points  # (n, 3): outward unit vectors
    motor_cells: tuple[int, ...]  # which cell carries each motor

    @property
    def margins(self) -> tuple[int, int, int]:
        """Voxels of the grid before the tomogram's first voxel, along z, y, x."""
        z, y, x = ((large - small) // 2 for large, small in zip(self.grid_shape, self.shape, strict=True))
        return z, y, x

    @property
    def motors(self) -> Points:
        """Centres of the motors in voxels of the tomogram (n, 3): z, y, x."""
        centres = self.anchors + CLICK_HEIGHT * self.normals
        return np.asarray(centres / self.spacing_angstrom - np.array(self.margins), np.float64)


def plan_scene(settings: MotorPhantom, index: int) -> Scene:
    """Draw one tomogram's shape, cells and motors; a function of (settings, index) and cheap."""
    rng = random_for("motor scene", settings.seed, index)
    spacing = settings.spacings_angstrom[index % len(settings.spacings_angstrom)]
    shape = varied_shape(settings, rng)
    z, y, x = (scipy.fft.next_fast_len(n + 2 * GUARD, real=True) for n in shape)
    empty = Scene(shape, (z, y, x), spacing, (), np.zeros((0, 3)), np.zeros((0, 3)), ())
    count = number_of_motors(settings, index, rng)
    if count == 0 and rng.random() < settings.no_cell_share:
        return empty
    for attempt in itertools.count():  # a cell may offer no room for so many motors: try others, then fewer motors
        scene = dataclasses.replace(empty, cells=draw_cells(settings, empty, rng))
        scene = place_motors(settings, scene, count, rng)
        if len(scene.anchors) >= max(count - attempt // CELLS_TRIED, min(count, 1)):
            return scene
    raise AssertionError("unreachable")


def varied_shape(settings: MotorPhantom, rng: np.random.Generator) -> tuple[int, int, int]:
    """The tomogram's shape: jittered, with three different even lengths."""
    factors = rng.uniform(1 - settings.shape_jitter, 1 + settings.shape_jitter, 3)
    z, y, x = (2 * round(n * f / 2) for n, f in zip(settings.shape, factors.tolist(), strict=True))
    y += 2 * (y == z)
    while x in (z, y):
        x += 2
    return z, y, x


def number_of_motors(settings: MotorPhantom, index: int, rng: np.random.Generator) -> int:
    """How many motors tomogram `index` holds: shares follow the golden ratio, so every stretch of indices has them."""
    offset = float(random_for("motor shares", settings.seed).random())
    if (offset + index * 0.6180339887498949) % 1 < settings.motor_free_share:
        return 0
    if rng.random() >= settings.several_motors_share:
        return 1
    return int(rng.choice([2, 3, 4], p=[0.6, 0.2, 0.2]))


def uniform(rng: np.random.Generator, values: Range) -> float:
    """One draw between the lowest and highest value."""
    return float(rng.uniform(*values))


def unit_vector(rng: np.random.Generator, steepest: float) -> Points:
    """A random direction whose z component is at most `steepest` in size."""
    z, angle = rng.uniform(-steepest, steepest), rng.uniform(0, 2 * np.pi)
    return np.array([z, np.sqrt(1 - z * z) * np.sin(angle), np.sqrt(1 - z * z) * np.cos(angle)])


def draw_cells(settings: MotorPhantom, scene: Scene, rng: np.random.Generator) -> tuple[Cell, ...]:
    """One or two cells whose envelopes pass through the tomogram without touching each other."""
    size = np.array(scene.grid_shape) * scene.spacing_angstrom
    cells = [random_cell(settings, size, rng)]
    probes = rng.uniform(0, 1, (4000, 3)) * size
    if rng.random() < settings.second_cell_share:
        for _ in range(20):
            second = random_cell(settings, size, rng)
            clearance = np.maximum(distance_at(cells[0], probes), distance_at(second, probes))
            if clearance.min() > 350:
                return cells[0], second
    return (cells[0],)


def random_cell(settings: MotorPhantom, size: Points, rng: np.random.Generator) -> Cell:
    """A capsule whose envelope passes through the field, shown at its flank or at its pole."""
    normal = unit_vector(rng, 0.5)
    anchor = size * rng.uniform((0.25, 0.08, 0.08), (0.75, 0.92, 0.92))
    radius = uniform(rng, settings.cell_radius_angstrom)
    at_pole = rng.random() < 0.6
    sideways = np.cross(normal, unit_vector(rng, 0.3))
    sideways /= np.linalg.norm(sideways)
    axis = -normal + rng.uniform(-0.7, 0.7) * sideways if at_pole else sideways
    axis /= np.linalg.norm(axis)
    length = rng.uniform(4000, 9000)
    start = anchor - normal * radius - (0 if at_pole else length / 2) * axis
    k1, k2, k3, k4 = (2 * np.pi / rng.uniform(2500, 6000, 4)).tolist()
    p1, p2, p3, p4 = rng.uniform(0, 2 * np.pi, 4).tolist()
    return Cell(
        start=(float(start[0]), float(start[1]), float(start[2])),
        axis=(float(axis[0]), float(axis[1]), float(axis[2])),
        length=float(length),
        radius=radius,
        periplasm=uniform(rng, settings.periplasm_angstrom),
        wave_height=uniform(rng, settings.undulation_angstrom),
        wave_numbers=(k1, k2, k3, k4),
        wave_phases=(p1, p2, p3, p4),
    )


def envelope_sites(settings: MotorPhantom, scene: Scene, number: int, rng: np.random.Generator) -> list[Points]:
    """Random places on the inner membranes well inside the tomogram: anchors, normals (n, 3) and cells (n,)."""
    low = np.array(scene.margins) * scene.spacing_angstrom + settings.motor_margin_angstrom
    high = low + (np.array(scene.shape) - 1) * scene.spacing_angstrom - 2 * settings.motor_margin_angstrom
    anchors, normals, owners = [], [], []
    for owner, cell in enumerate(scene.cells):
        points, directions = onto_membrane(cell, rng.uniform(low, high, (number, 3)))
        clicks = points + CLICK_HEIGHT * directions
        fits = np.all((clicks > low) & (clicks < high), 1) & (np.abs(directions[:, 0]) < settings.steepest_normal)
        fits &= np.abs(distance_at(cell, points)) < 2
        anchors.append(points[fits])
        normals.append(directions[fits])
        owners.append(np.full(int(fits.sum()), owner))
    order = rng.permutation(sum(len(a) for a in anchors))
    return [np.concatenate(column)[order] for column in (anchors, normals, owners)]


def place_motors(settings: MotorPhantom, scene: Scene, count: int, rng: np.random.Generator) -> Scene:
    """Put up to `count` motors on the envelopes, some as close pairs; fewer where there is no room."""
    if count == 0:
        return scene
    anchors, normals, owners = envelope_sites(settings, scene, 200, rng)
    close_pair = count > 1 and rng.random() < settings.close_pair_share
    chosen: list[int] = []
    for _ in range(count if len(anchors) else 0):
        gaps = np.linalg.norm(anchors[:, None] - anchors[chosen][None], axis=2)  # (sites, chosen)
        free = (gaps > 1.1 * settings.closest_motors_angstrom).all(1)
        if close_pair and len(chosen) == 1:
            free &= gaps[:, 0] < 950
        if not free.any():
            break
        chosen.append(int(free.argmax()))
    return dataclasses.replace(
        scene, anchors=anchors[chosen], normals=normals[chosen], motor_cells=tuple(owners[chosen].tolist())
    )
