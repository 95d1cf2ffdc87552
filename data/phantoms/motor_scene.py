"""What lies in the ice of one tomogram: cells, motors, and the clutter that looks like motors."""

import dataclasses
import itertools

import numpy as np
import scipy.fft

from common.streams import random_for
from data.phantoms.motor_settings import MotorPhantom, Range
from data.phantoms.motor_shapes import (
    Cell,
    Grid,
    Points,
    Ring,
    Volume,
    distance_at,
    draw_array,
    draw_ball,
    draw_cell,
    draw_rings,
    draw_tube,
    draw_vesicle,
    grid_axes,
    onto_membrane,
    smooth_step,
)

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
    random = random_for("motor scene", settings.seed, index)
    spacing = settings.spacings_angstrom[index % len(settings.spacings_angstrom)]
    shape = varied_shape(settings, random)
    z, y, x = (scipy.fft.next_fast_len(n + 2 * GUARD, real=True) for n in shape)
    empty = Scene(shape, (z, y, x), spacing, (), np.zeros((0, 3)), np.zeros((0, 3)), ())
    count = number_of_motors(settings, index, random)
    if count == 0 and random.random() < settings.no_cell_share:
        return empty
    for attempt in itertools.count():  # a cell may offer no room for so many motors: try others, then fewer motors
        scene = dataclasses.replace(empty, cells=draw_cells(settings, empty, random))
        scene = place_motors(settings, scene, count, random)
        if len(scene.anchors) >= max(count - attempt // CELLS_TRIED, min(count, 1)):
            return scene
    raise AssertionError("unreachable")


def varied_shape(settings: MotorPhantom, random: np.random.Generator) -> tuple[int, int, int]:
    """The tomogram's shape: jittered, with three different even lengths."""
    factors = random.uniform(1 - settings.shape_jitter, 1 + settings.shape_jitter, 3)
    z, y, x = (2 * round(n * f / 2) for n, f in zip(settings.shape, factors.tolist(), strict=True))
    y += 2 * (y == z)
    while x in (z, y):
        x += 2
    return z, y, x


def number_of_motors(settings: MotorPhantom, index: int, random: np.random.Generator) -> int:
    """How many motors tomogram `index` holds: shares follow the golden ratio, so every stretch of indices has them."""
    offset = float(random_for("motor shares", settings.seed).random())
    if (offset + index * 0.6180339887498949) % 1 < settings.motor_free_share:
        return 0
    if random.random() >= settings.several_motors_share:
        return 1
    return int(random.choice([2, 3, 4], p=[0.6, 0.2, 0.2]))


def uniform(random: np.random.Generator, values: Range) -> float:
    """One draw between the lowest and highest value."""
    return float(random.uniform(*values))


def unit_vector(random: np.random.Generator, steepest: float) -> Points:
    """A random direction whose z component is at most `steepest` in size."""
    z, angle = random.uniform(-steepest, steepest), random.uniform(0, 2 * np.pi)
    return np.array([z, np.sqrt(1 - z * z) * np.sin(angle), np.sqrt(1 - z * z) * np.cos(angle)])


def draw_cells(settings: MotorPhantom, scene: Scene, random: np.random.Generator) -> tuple[Cell, ...]:
    """One or two cells whose envelopes pass through the tomogram without touching each other."""
    size = np.array(scene.grid_shape) * scene.spacing_angstrom
    cells = [random_cell(settings, size, random)]
    probes = random.uniform(0, 1, (4000, 3)) * size
    if random.random() < settings.second_cell_share:
        for _ in range(20):
            second = random_cell(settings, size, random)
            clearance = np.maximum(distance_at(cells[0], probes), distance_at(second, probes))
            if clearance.min() > 350:
                return cells[0], second
    return (cells[0],)


def random_cell(settings: MotorPhantom, size: Points, random: np.random.Generator) -> Cell:
    """A capsule whose envelope passes through the field, shown at its flank or at its pole."""
    normal = unit_vector(random, 0.5)
    anchor = size * random.uniform((0.25, 0.08, 0.08), (0.75, 0.92, 0.92))
    radius = uniform(random, settings.cell_radius_angstrom)
    at_pole = random.random() < 0.6
    sideways = np.cross(normal, unit_vector(random, 0.3))
    sideways /= np.linalg.norm(sideways)
    axis = -normal + random.uniform(-0.7, 0.7) * sideways if at_pole else sideways
    axis /= np.linalg.norm(axis)
    length = random.uniform(4000, 9000)
    start = anchor - normal * radius - (0 if at_pole else length / 2) * axis
    k1, k2, k3, k4 = (2 * np.pi / random.uniform(1500, 4500, 4)).tolist()
    p1, p2, p3, p4 = random.uniform(0, 2 * np.pi, 4).tolist()
    return Cell(
        start=(float(start[0]), float(start[1]), float(start[2])),
        axis=(float(axis[0]), float(axis[1]), float(axis[2])),
        length=float(length),
        radius=radius,
        periplasm=uniform(random, settings.periplasm_angstrom),
        wave_height=uniform(random, settings.undulation_angstrom),
        wave_numbers=(k1, k2, k3, k4),
        wave_phases=(p1, p2, p3, p4),
    )


def envelope_sites(settings: MotorPhantom, scene: Scene, number: int, random: np.random.Generator) -> list[Points]:
    """Random places on the inner membranes well inside the tomogram: anchors, normals (n, 3) and cells (n,)."""
    low = np.array(scene.margins) * scene.spacing_angstrom + settings.motor_margin_angstrom
    high = low + (np.array(scene.shape) - 1) * scene.spacing_angstrom - 2 * settings.motor_margin_angstrom
    anchors, normals, owners = [], [], []
    for owner, cell in enumerate(scene.cells):
        points, directions = onto_membrane(cell, random.uniform(low, high, (number, 3)))
        clicks = points + CLICK_HEIGHT * directions
        fits = np.all((clicks > low) & (clicks < high), 1) & (np.abs(directions[:, 0]) < settings.steepest_normal)
        fits &= np.abs(distance_at(cell, points)) < 2
        anchors.append(points[fits])
        normals.append(directions[fits])
        owners.append(np.full(int(fits.sum()), owner))
    order = random.permutation(sum(len(a) for a in anchors))
    return [np.concatenate(column)[order] for column in (anchors, normals, owners)]


def place_motors(settings: MotorPhantom, scene: Scene, count: int, random: np.random.Generator) -> Scene:
    """Put up to `count` motors on the envelopes, some as close pairs; fewer where there is no room."""
    if count == 0:
        return scene
    anchors, normals, owners = envelope_sites(settings, scene, 200, random)
    close_pair = count > 1 and random.random() < settings.close_pair_share
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


def draw_scene(settings: MotorPhantom, scene: Scene, random: np.random.Generator) -> Volume:
    """The density map of a scene on its simulated grid, in units of protein above ice."""
    grid = Grid(np.zeros(scene.grid_shape, np.float32), scene.spacing_angstrom)
    texture = random.standard_normal(scene.grid_shape, dtype=np.float32) * np.float32(settings.texture)
    if random.random() < settings.carbon_share:
        draw_carbon(grid, texture, random)
    for cell in scene.cells:
        draw_cell(grid, cell, texture)
    draw_cytoplasm(settings, grid, scene, random)
    draw_envelope_decoys(settings, grid, scene, random)
    for anchor, normal, owner in zip(scene.anchors, scene.normals, scene.motor_cells, strict=True):
        draw_motor(settings, grid, scene.cells[owner], anchor, normal, random)
    draw_filaments(settings, grid, random)
    draw_gold(settings, grid, scene, random)
    return grid.density


def draw_motor(
    settings: MotorPhantom, grid: Grid, cell: Cell, anchor: Points, normal: Points, random: np.random.Generator
) -> None:
    """A flagellar motor: C-ring, MS-ring, stators, export gate, rod, P- and L-ring, mostly hook and filament.

    Dimensions after Salmonella and their spread over species: Chen et al., EMBO J. 30 (2011) 2972.
    """
    s, d, outer = uniform(random, settings.motor_scale), uniform(random, settings.motor_density), cell.periplasm
    rings = [
        Ring(165 * s, 240 * s, -220, -60, 1.5 * d),  # C-ring
        Ring(0, 140 * s, -60, 40, 1.4 * d),  # MS-ring
        Ring(0, 90, -250, -170, 1.2 * d),  # export gate
        Ring(0, 65, 30, outer + 60, 1.5 * d),  # rod
        Ring(55, 145 * s, 0.55 * outer, 0.55 * outer + 60, 1.3 * d),  # P-ring
        Ring(55, 130 * s, outer - 25, outer + 40, 1.4 * d),  # L-ring
    ]
    if random.random() < settings.stator_share:
        rings.append(Ring(190 * s, 265 * s, -35, 80, 1.1 * d))
    draw_rings(grid, anchor, normal, rings)
    if random.random() < settings.hookless_share:
        return
    bend = np.cross(normal, unit_vector(random, 1.0))
    hook = curved_path(anchor + (outer + 30) * normal, normal, bend, random.uniform(0, 1 / 600), 550)
    draw_tube(grid, hook, 88, 1.0 * d)
    direction = (hook[-1] - hook[-2]) / np.linalg.norm(hook[-1] - hook[-2])
    filament = curved_path(hook[-1], direction, bend, random.uniform(-1, 1) / 8000, random.uniform(500, 5000))
    draw_tube(grid, filament, 95, 0.9 * d)


def curved_path(start: Points, direction: Points, bend: Points, curvature: float, length: float) -> Points:
    """An arc (n, 3) of steps of 70 angstrom that leaves `start` along `direction` and turns towards `bend`."""
    bend = bend - direction * float(np.dot(bend, direction))
    bend = bend / max(float(np.linalg.norm(bend)), 1e-6)
    along = np.arange(0, length + 70, 70.0)[:, None]
    if abs(curvature) < 1e-6:
        return np.asarray(start + along * direction)
    turned = along * curvature
    return np.asarray(start + (np.sin(turned) * direction + (1 - np.cos(turned)) * bend) / curvature)


def draw_cytoplasm(settings: MotorPhantom, grid: Grid, scene: Scene, random: np.random.Generator) -> None:
    """Ribosomes, granules and vesicles, clear of the motors; vesicles also lie outside the cells."""
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    volume = float(size.prod()) / 1e12  # cubic micrometres
    keep_off = scene.anchors - 100 * scene.normals
    for cell in scene.cells:
        for centre in inside(cell, keep_off, random.uniform(0, 1, (settings_count(settings, volume), 3)) * size, 170):
            for lobe in centre + random.normal(0, 45, (4, 3)):
                draw_ball(grid, lobe, random.uniform(55, 90), 1.5)
        granules = int(random.integers(settings.granules[0], settings.granules[1] + 1))
        for centre in inside(cell, keep_off, random.uniform(0, 1, (200, 3)) * size, 350)[:granules]:
            draw_ball(grid, centre, uniform(random, settings.granule_radius_angstrom), random.uniform(1.6, 2.6))
    for _ in range(int(random.integers(settings.vesicles[0], settings.vesicles[1] + 1))):
        radii = random.uniform(170, 420) * random.uniform(0.8, 1.2, 3)
        draw_vesicle(grid, random.uniform(0, 1, 3) * size, radii, 1.1)


def settings_count(settings: MotorPhantom, volume: float) -> int:
    """Ribosomes to scatter over a volume in cubic micrometres; those that fall outside the cytoplasm are dropped."""
    return round(settings.ribosomes_per_cubic_micrometre * volume)


def inside(cell: Cell, keep_off: Points, points: Points, depth: float) -> Points:
    """Those of the points (n, 3) that lie deeper than `depth` in the cytoplasm and 450 angstrom from any motor."""
    gaps = np.linalg.norm(points[:, None] - keep_off[None], axis=2)
    fits = (distance_at(cell, points) < -depth) & (gaps > 400).all(1)
    return np.asarray(points[fits], np.float64)


def draw_envelope_decoys(settings: MotorPhantom, grid: Grid, scene: Scene, random: np.random.Generator) -> None:
    """Complexes at the membrane that lack a motor's rod and rings, and chemoreceptor arrays."""
    if not scene.cells:
        return
    anchors, normals, owners = envelope_sites(settings, scene, 100, random)
    apart = (np.linalg.norm(anchors[:, None] - scene.anchors[None], axis=2) > 600).all(1)
    sites = list(zip(anchors[apart], normals[apart], owners[apart].tolist(), strict=True))
    number = len(scene.cells) * int(random.integers(settings.envelope_decoys[0], settings.envelope_decoys[1] + 1))
    for anchor, normal, owner in sites[:number]:
        outer, s, d = scene.cells[owner].periplasm, random.uniform(0.8, 1.2), random.uniform(1.0, 1.6)
        kinds = (
            [Ring(0, 210 * s, -220, -70, d)],  # a dense disc where a C-ring would be
            [Ring(0, 150 * s, 40, outer - 40, d)],  # a plug in the periplasm
            [Ring(0, 190 * s, outer + 30, outer + 170, d)],  # a cap on the outer membrane
            [Ring(0, 70, -120, outer + 120, d)],  # a rod through both membranes: pilus or secretion machine
            [Ring(0, 170 * s, -260, -40, d), Ring(0, 110 * s, -40, 100, d)],  # a knob on the inner membrane
        )
        draw_rings(grid, anchor, normal, kinds[int(random.integers(len(kinds)))])
    for anchor, normal, owner in sites[number : number + len(scene.cells)]:
        if random.random() < settings.array_share:
            draw_array(grid, scene.cells[owner], anchor, normal, random.uniform(300, 800))


def draw_filaments(settings: MotorPhantom, grid: Grid, random: np.random.Generator) -> None:
    """Loose filaments that cross the field on slight arcs."""
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    for _ in range(int(random.integers(settings.filaments[0], settings.filaments[1] + 1))):
        start, direction = random.uniform(0, 1, 3) * size, unit_vector(random, 0.3)
        length, radius = random.uniform(1000, 4000), float(random.choice([35.0, 60.0, 95.0]))
        path = curved_path(start, direction, unit_vector(random, 1.0), random.uniform(-1, 1) / 3000, length)
        draw_tube(grid, path, radius, random.uniform(0.8, 1.1))


def draw_gold(settings: MotorPhantom, grid: Grid, scene: Scene, random: np.random.Generator) -> None:
    """Fiducial beads of about 100 angstrom, outside the cells where there is room, never on a motor."""
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    number = int(random.integers(settings.gold_beads[0], settings.gold_beads[1] + 1))
    points = random.uniform(0.03, 0.97, (300, 3)) * size
    fits = (np.linalg.norm(points[:, None] - scene.anchors[None], axis=2) > 500).all(1)
    for cell in scene.cells:
        fits &= distance_at(cell, points) > cell.periplasm + 100
    for centre in points[fits][:number]:
        draw_ball(grid, centre, random.uniform(42, 60), settings.gold_density)


def draw_carbon(grid: Grid, texture: Volume, random: np.random.Generator) -> None:
    """The rim of the hole in the carbon film: grainy carbon beyond a wide circle in a layer 200 angstrom thick."""
    z, y, x = grid_axes(grid.density.shape, grid.spacing_angstrom)
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    angle, radius = random.uniform(0, 2 * np.pi), 6000.0
    away = radius - random.uniform(0.25, 0.48) * float(size[1:].min())
    centre = (size[1] / 2 - away * np.sin(angle), size[2] / 2 - away * np.cos(angle))
    radii = np.sqrt((y - np.float32(centre[0])) ** 2 + (x - np.float32(centre[1])) ** 2)
    rim = smooth_step(np.asarray(radii - np.float32(radius), np.float32))
    layer = smooth_step(100 - np.abs(z - np.float32(random.uniform(0.05, 0.95) * size[0])))
    np.maximum(grid.density, layer * rim * (0.9 + 2 * texture), out=grid.density)
