"""What lies in the ice of one tomogram, drawn: cells, motors, and the clutter that looks like motors."""

import dataclasses

import numpy as np

from data.phantoms.motor_scene import Scene, envelope_sites, uniform, unit_vector
from data.phantoms.motor_settings import MotorPhantom
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
    smooth_step,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A place on a cell's inner membrane."""

    anchor: Points  # (3,) angstrom
    normal: Points  # (3,) outward unit vector
    owner: int  # which cell


def draw_scene(settings: MotorPhantom, scene: Scene, rng: np.random.Generator) -> Volume:
    """The density map of a scene on its simulated grid, in units of protein above ice."""
    grid = Grid(np.zeros(scene.grid_shape, np.float32), scene.spacing_angstrom)
    texture = rng.standard_normal(scene.grid_shape, dtype=np.float32) * np.float32(settings.texture)
    if rng.random() < settings.carbon_share:
        draw_carbon(grid, texture, rng)
    for cell in scene.cells:
        draw_cell(grid, cell, texture)
    decoys, arrays = envelope_decoys(settings, scene, rng)
    keep_off = np.concatenate([scene.anchors - 100 * scene.normals, *(site.anchor[None] for site in decoys)])
    draw_cytoplasm(settings, grid, scene, keep_off, rng)
    draw_decoys(settings, grid, scene, decoys, arrays, rng)
    for anchor, normal, owner in zip(scene.anchors, scene.normals, scene.motor_cells, strict=True):
        draw_motor(settings, grid, scene.cells[owner], anchor, normal, rng)
    draw_filaments(settings, grid, rng)
    draw_gold(settings, grid, scene, rng)
    return grid.density


def draw_motor(
    settings: MotorPhantom, grid: Grid, cell: Cell, anchor: Points, normal: Points, rng: np.random.Generator
) -> None:
    """A flagellar motor: C-ring, MS-ring, stators, export gate, rod, P- and L-ring, mostly hook and filament.

    Dimensions after Salmonella and their spread over species: Chen et al., EMBO J. 30 (2011) 2972.
    """
    s, d, outer = uniform(rng, settings.motor_scale), uniform(rng, settings.motor_density), cell.periplasm
    rings = [
        Ring(165 * s, 240 * s, -220, -60, 1.5 * d),  # C-ring
        Ring(0, 140 * s, -60, 40, 1.4 * d),  # MS-ring
        Ring(0, 90, -250, -170, 1.2 * d),  # export gate
        Ring(0, 65, 30, outer + 60, 1.5 * d),  # rod
        Ring(55, 145 * s, 0.55 * outer, 0.55 * outer + 60, 1.3 * d),  # P-ring
        Ring(55, 130 * s, outer - 25, outer + 40, 1.4 * d),  # L-ring
    ]
    if rng.random() < settings.stator_share:
        rings.append(Ring(190 * s, 265 * s, -35, 80, 1.1 * d))
    draw_rings(grid, anchor, normal, rings)
    if rng.random() < settings.hookless_share:
        return
    bend = np.cross(normal, unit_vector(rng, 1.0))
    hook = curved_path(anchor + (outer + 30) * normal, normal, bend, rng.uniform(0, 1 / 600), 550)
    draw_tube(grid, hook, 88, 1.0 * d)
    direction = (hook[-1] - hook[-2]) / np.linalg.norm(hook[-1] - hook[-2])
    filament = curved_path(hook[-1], direction, bend, rng.uniform(-1, 1) / 8000, rng.uniform(500, 5000))
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


def draw_cytoplasm(
    settings: MotorPhantom, grid: Grid, scene: Scene, keep_off: Points, rng: np.random.Generator
) -> None:
    """Ribosomes, granules and vesicles, clear of motors and decoys alike; vesicles also lie outside the cells.

    Were only motors kept clear, the empty surround would give them away.
    """
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    volume = float(size.prod()) / 1e12  # cubic micrometres
    for cell in scene.cells:
        scattered = rng.uniform(0, 1, (round(settings.ribosomes_per_cubic_micrometre * volume), 3)) * size
        for centre in inside(cell, keep_off, scattered, 170):
            for lobe in centre + rng.normal(0, 45, (4, 3)):
                draw_ball(grid, lobe, rng.uniform(55, 90), 1.5)
        granules = int(rng.integers(settings.granules[0], settings.granules[1] + 1))
        for centre in inside(cell, keep_off, rng.uniform(0, 1, (200, 3)) * size, 350)[:granules]:
            draw_ball(grid, centre, uniform(rng, settings.granule_radius_angstrom), rng.uniform(1.6, 2.6))
    for _ in range(int(rng.integers(settings.vesicles[0], settings.vesicles[1] + 1))):
        radii = rng.uniform(170, 420) * rng.uniform(0.8, 1.2, 3)
        room, points = float(radii.max()) + 100, rng.uniform(0, 1, (50, 3)) * size
        fits = (np.linalg.norm(points[:, None] - keep_off[None], axis=2) > room + 300).all(1)
        for cell in scene.cells:
            distance = distance_at(cell, points)
            fits &= (distance < -room) | (distance > cell.periplasm + room)
        if fits.any():
            draw_vesicle(grid, points[fits.argmax()], radii, 1.1)


def inside(cell: Cell, keep_off: Points, points: Points, depth: float) -> Points:
    """Those of the points (n, 3) deeper than `depth` in the cytoplasm and 400 angstrom off every point to keep off."""
    gaps = np.linalg.norm(points[:, None] - keep_off[None], axis=2)
    fits = (distance_at(cell, points) < -depth) & (gaps > 400).all(1)
    return np.asarray(points[fits], np.float64)


def envelope_decoys(settings: MotorPhantom, scene: Scene, rng: np.random.Generator) -> tuple[list[Site], list[Site]]:
    """Where complexes that are no motors sit on the membranes, and where chemoreceptor arrays do."""
    if not scene.cells:
        return [], []
    anchors, normals, owners = envelope_sites(settings, scene, 100, rng)
    apart = (np.linalg.norm(anchors[:, None] - scene.anchors[None], axis=2) > 600).all(1)
    sites = [Site(*site) for site in zip(anchors[apart], normals[apart], owners[apart].tolist(), strict=True)]
    number = len(scene.cells) * int(rng.integers(settings.envelope_decoys[0], settings.envelope_decoys[1] + 1))
    arrays = [site for site in sites[number : number + len(scene.cells)] if rng.random() < settings.array_share]
    return sites[:number], arrays


def draw_decoys(
    settings: MotorPhantom, grid: Grid, scene: Scene, decoys: list[Site], arrays: list[Site], rng: np.random.Generator
) -> None:
    """Complexes at the membrane that lack a motor's rod and rings, and chemoreceptor arrays."""
    for site in decoys:
        outer, s, d = scene.cells[site.owner].periplasm, rng.uniform(0.8, 1.2), rng.uniform(1.0, 1.6)
        kinds = (
            [Ring(0, 210 * s, -220, -70, d)],  # a dense disc where a C-ring would be
            [Ring(0, 150 * s, 40, outer - 40, d)],  # a plug in the periplasm
            [Ring(0, 190 * s, outer + 30, outer + 170, d)],  # a cap on the outer membrane
            [Ring(0, 70, -120, outer + 120, d)],  # a rod through both membranes: pilus or secretion machine
            [Ring(0, 170 * s, -260, -40, d), Ring(0, 110 * s, -40, 100, d)],  # a knob on the inner membrane
        )
        draw_rings(grid, site.anchor, site.normal, kinds[int(rng.integers(len(kinds)))])
    for site in arrays:
        draw_array(grid, scene.cells[site.owner], site.anchor, site.normal, rng.uniform(300, 800))


def draw_filaments(settings: MotorPhantom, grid: Grid, rng: np.random.Generator) -> None:
    """Loose filaments that cross the field on slight arcs."""
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    for _ in range(int(rng.integers(settings.filaments[0], settings.filaments[1] + 1))):
        start, direction = rng.uniform(0, 1, 3) * size, unit_vector(rng, 0.3)
        length, radius = rng.uniform(1000, 4000), float(rng.choice([35.0, 60.0, 95.0]))
        path = curved_path(start, direction, unit_vector(rng, 1.0), rng.uniform(-1, 1) / 3000, length)
        draw_tube(grid, path, radius, rng.uniform(0.8, 1.1))


def draw_gold(settings: MotorPhantom, grid: Grid, scene: Scene, rng: np.random.Generator) -> None:
    """Fiducial beads of about 100 angstrom, outside the cells where there is room, never on a motor."""
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    number = int(rng.integers(settings.gold_beads[0], settings.gold_beads[1] + 1))
    points = rng.uniform(0.03, 0.97, (300, 3)) * size
    fits = (np.linalg.norm(points[:, None] - scene.anchors[None], axis=2) > 500).all(1)
    for cell in scene.cells:
        fits &= distance_at(cell, points) > cell.periplasm + 100
    for centre in points[fits][:number]:
        draw_ball(grid, centre, rng.uniform(42, 60), settings.gold_density)


def draw_carbon(grid: Grid, texture: Volume, rng: np.random.Generator) -> None:
    """The rim of the hole in the carbon film: grainy carbon beyond a wide circle in a layer 200 angstrom thick."""
    z, y, x = grid_axes(grid.density.shape, grid.spacing_angstrom)
    size = np.array(grid.density.shape) * grid.spacing_angstrom
    angle, radius = rng.uniform(0, 2 * np.pi), 6000.0
    away = radius - rng.uniform(0.25, 0.48) * float(size[1:].min())
    centre = (size[1] / 2 - away * np.sin(angle), size[2] / 2 - away * np.cos(angle))
    radii = np.sqrt((y - np.float32(centre[0])) ** 2 + (x - np.float32(centre[1])) ** 2)
    rim = smooth_step(np.asarray(radii - np.float32(radius), np.float32))
    layer = smooth_step(100 - np.abs(z - np.float32(rng.uniform(0.05, 0.95) * size[0])))
    np.maximum(grid.density, layer * rim * (0.9 + 2 * texture), out=grid.density)
