"""What lies inside neurites: mitochondria, and what can be taken for them or for membranes."""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.spatial

from data.phantoms.em_curves import Curves, between, unit_vector
from data.phantoms.em_grid import Box, Float, Grid, Points, Warp, box_shape, node_noise, refined
from data.phantoms.em_partition import Partition
from data.phantoms.em_settings import EMPhantom

Ints = npt.NDArray[np.int64]

MITOCHONDRION, SYNAPSE, LYSOSOME = 1, 2, 3  # semantic classes
CLEARANCE = 24.0  # nm between an organelle and the neurite's membrane
SMALLEST_NM3 = 2.5e6  # an organelle cut smaller by its neurite is left out
WARPED_NM = 180.0  # by which the distortion of space may lengthen an organelle
TRIES = 600  # places tried for mitochondria
RETICULUM_NM = 75.0  # correlation length of the noise whose level set the reticulum is


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """The fine grid as it is drawn: arrays change, one organelle after another."""

    grid: Grid
    warp: Warp
    curves: Curves
    partition: Partition
    grey: Float
    semantic: npt.NDArray[np.uint8]
    occupied: npt.NDArray[np.bool_]  # by an organelle
    waves: Float  # smooth noise at the nodes
    settings: EMPhantom

    def waves_at(self, points: Points) -> npt.NDArray[np.float64]:
        """The smooth noise at points (n, 3) nm."""
        index = points / (np.array(self.grid.steps) * np.array(self.grid.spacing))
        return np.asarray(scipy.ndimage.map_coordinates(self.waves, index.T, order=1, mode="nearest"), np.float64)

    def voxels(self, points: Points) -> tuple[Ints, Ints, Ints]:
        """The fine voxels nearest to points (n, 3) nm, clipped to the canvas."""
        index = np.clip(np.rint(points / self.grid.spacing).astype(np.int64), 0, np.array(self.grid.shape) - 1)
        return index[:, 0], index[:, 1], index[:, 2]


def start_drawing(
    partition: Partition, curves: Curves, grid: Grid, warp: Warp, settings: EMPhantom, rng: np.random.Generator
) -> Drawing:
    """Cytoplasm only: a grey level per neurite, some dark, with finer or coarser contrast of its grain."""
    count = int(curves.neurite.max()) + 1
    level = rng.uniform(*settings.cytoplasm_grey, count).astype(np.float32)
    dark = rng.random(count) < settings.dark_neurite_share
    level[dark] = rng.uniform(*settings.dark_cytoplasm_grey, int(dark.sum()))
    noise = rng.standard_normal(grid.shape, dtype=np.float32)
    grain = scipy.ndimage.gaussian_filter(noise, [settings.texture_nm / size for size in grid.spacing], truncate=2.5)
    grain *= np.float32(settings.texture_grey) / grain.std()
    grain *= rng.uniform(0.6, 1.5, count).astype(np.float32)[partition.body]
    grey = level[partition.body] + grain
    semantic, occupied = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.bool_)
    return Drawing(grid, warp, curves, partition, grey, semantic, occupied, node_noise(grid, 70.0, rng), settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Organelle:
    """Voxels of a body inside one neurite."""

    box: Box
    inside: npt.NDArray[np.bool_]  # of the box's shape
    height: npt.NDArray[np.float64]  # nm below the organelle's surface (n,)
    point: Points  # (n, 3) nm
    planned: Points  # (n, 3) nm before the warp


def body_of_balls(drawing: Drawing, axis: Points, radius: npt.NDArray[np.float64], neurite: int) -> Organelle | None:
    """The union of balls about points of the plan (k, 3), as far as their neurite has room; None if that is too little."""
    middles = drawing.warp.from_plan(axis)
    reach = float(radius.max()) + WARPED_NM
    box = drawing.grid.box_around(middles.min(0) - reach, middles.max(0) + reach)
    depth = drawing.partition.depth[box]
    possible = (drawing.partition.body[box] == neurite) & (depth > CLEARANCE)
    point = drawing.grid.points(box)[possible]
    if len(point) * np.prod(drawing.grid.spacing) < SMALLEST_NM3:
        return None
    planned = drawing.warp.to_plan(point)
    height = (radius - scipy.spatial.distance.cdist(planned, axis)).max(1)
    height = np.minimum(height + 7 * drawing.waves_at(point), depth[possible] - CLEARANCE)
    inside = np.zeros(box_shape(box), np.bool_)
    inside[possible] = height > 0
    pieces, count = scipy.ndimage.label(inside)
    if count == 0:
        return None
    inside = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    if inside.sum() * np.prod(drawing.grid.spacing) < SMALLEST_NM3 or drawing.occupied[box][inside].any():
        return None
    kept = inside[possible]
    return Organelle(box, inside, height[kept], point[kept], planned[kept])


def paint(drawing: Drawing, organelle: Organelle, grey: npt.NDArray[np.float64], semantic: int) -> None:
    """Set an organelle's grey levels (n,) and class; its surroundings are closed to others."""
    drawing.grey[organelle.box][organelle.inside] = grey
    drawing.semantic[organelle.box][organelle.inside] = semantic
    drawing.occupied[organelle.box] |= scipy.ndimage.binary_dilation(organelle.inside, iterations=2)


def stretch(curves: Curves, middle: int, length_nm: float) -> slice:
    """The points of one path around `middle` over about `length_nm`, without gaps."""
    start = stop = middle
    for sign in (-1, 1):
        at, walked = middle, 0.0
        while walked < length_nm / 2 and 0 <= at + sign < len(curves.path):
            step = float(np.linalg.norm(curves.position[at + sign] - curves.position[at]))
            if curves.path[at + sign] != curves.path[at] or step > 150:
                break
            at, walked = at + sign, walked + step
        start, stop = min(start, at), max(stop, at)
    return slice(start, stop + 1)


def roomy_points(drawing: Drawing, depth_nm: float) -> Ints:
    """Points of the curves that lie on the canvas, in their own neurite and so deep in it."""
    curves = drawing.curves
    points = drawing.warp.from_plan(curves.position)
    on_canvas = ((points >= 0) & (points < drawing.grid.extent)).all(1)
    voxels = drawing.voxels(points)
    own = drawing.partition.body[voxels] == curves.neurite
    return np.flatnonzero(on_canvas & own & (drawing.partition.depth[voxels] > depth_nm))


def add_mitochondria(drawing: Drawing, rng: np.random.Generator) -> int:
    """Fill the settings' share of the canvas with mitochondria along their neurites; returns how many."""
    settings, curves = drawing.settings, drawing.curves
    places = roomy_points(drawing, settings.mitochondrion_radius_nm[0])
    target, filled, count = settings.mitochondria_share * drawing.grey.size, 0, 0
    for middle in rng.choice(places, TRIES).tolist() if len(places) and target else []:
        part = stretch(curves, middle, between(rng, settings.mitochondrion_length_nm))
        largest = between(rng, settings.mitochondrion_radius_nm)
        radius = np.minimum(largest, 0.75 * curves.radius[part] + 5)
        organelle = body_of_balls(drawing, curves.position[part], radius, int(curves.neurite[middle]))
        if organelle is None:
            continue
        paint(drawing, organelle, mitochondrion_grey(drawing, organelle, rng), MITOCHONDRION)
        filled, count = filled + len(organelle.height), count + 1
        if filled >= target:
            break
    return count


def mitochondrion_grey(drawing: Drawing, organelle: Organelle, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Grey levels (n,): two membranes, a dark matrix, and cristae as wavy lamellae through parts of it."""
    settings, height, planned = drawing.settings, organelle.height, organelle.planned
    matrix = between(rng, settings.matrix_grey)
    membranes = np.maximum(np.exp(-(((height - 4) / 6) ** 2)), 0.9 * np.exp(-(((height - 23) / 6) ** 2)))
    waves = drawing.waves_at(organelle.point)
    phase = (planned - planned.mean(0)) @ unit_vector(rng) * (2 * np.pi / between(rng, settings.cristae_period_nm))
    lamella = np.clip((np.cos(phase + 1.6 * waves) - 0.35) / 0.4, 0, 1)
    lamella *= np.clip(2 + 1.5 * np.roll(waves, len(waves) // 2), 0, 1) * (height > 26) * rng.uniform(0.35, 0.9)
    grain = settings.texture_grey * 0.6 * rng.standard_normal(len(height))
    dark = np.maximum(membranes, lamella)
    between_membranes = 18 * np.exp(-(((height - 13) / 6) ** 2))
    return np.asarray((matrix + grain + between_membranes) * (1 - dark) + settings.membrane_grey * dark, np.float64)


def add_lysosomes(drawing: Drawing, rng: np.random.Generator) -> int:
    """Dark round bodies without cristae, every third with small vesicles in a bright lumen; returns how many."""
    settings = drawing.settings
    places = roomy_points(drawing, 60.0)
    wanted = rng.poisson(settings.lysosomes_per_cubic_micrometre * drawing.grid.cubic_micrometres)
    count = 0
    for at in rng.choice(places, 4 * wanted).tolist() if len(places) else []:
        radius = np.array([between(rng, settings.lysosome_radius_nm)])
        organelle = body_of_balls(drawing, drawing.curves.position[[at]], radius, int(drawing.curves.neurite[at]))
        if organelle is None or count >= wanted:
            continue
        grain = rng.standard_normal(len(organelle.height))
        grey = between(rng, settings.lysosome_grey) + 7 * grain + 12 * drawing.waves_at(organelle.point)
        if rng.random() < 1 / 3:
            bubbles = vesicles_inside(organelle.point, rng)
            grey = np.where((organelle.height > 10) & ~bubbles, 148.0 + 6 * grain, grey)
        paint(drawing, organelle, np.asarray(grey, np.float64), LYSOSOME)
        count += 1
    return count


def vesicles_inside(point: Points, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which of the points (n, 3) nm lie in small balls that take up about a third of the space."""
    number = int(len(point) ** (1 / 3)) + 3
    distance, _ = scipy.spatial.cKDTree(rng.choice(point, min(number, len(point)))).query(point)
    return np.asarray(distance < 22, np.bool_)


def add_reticulum(drawing: Drawing, rng: np.random.Generator) -> None:
    """Membrane-like lines in the cytoplasm: a level set of smooth noise, only in some places."""
    level = refined_to(drawing.grid, node_noise(drawing.grid, RETICULUM_NM, rng))
    place = node_noise(drawing.grid, 110.0, rng)
    threshold = np.quantile(place, 1 - drawing.settings.reticulum_share)
    line = np.exp(-np.square(level * np.float32(RETICULUM_NM / 9)))
    line *= refined_to(drawing.grid, np.clip((place - np.float32(threshold)) * 4, 0, 0.85))
    line *= drawing.partition.depth > CLEARANCE
    drawing.grey[...] += (np.float32(drawing.settings.membrane_grey + 12) - drawing.grey) * line


def refined_to(grid: Grid, nodes: Float) -> Float:
    """Values at the nodes as values of the fine grid."""
    z, y, x = grid.shape
    return refined(nodes, grid.steps)[:z, :y, :x]


def stamp(
    drawing: Drawing,
    centres: Points,
    reach_nm: float,
    darkness: Callable[[npt.NDArray[np.float64], Ints], Float],
    to: float,
) -> None:
    """Darken the surroundings of points (n, 3) nm towards a grey level by darkness(distance nm, number of the point)."""
    spacing = np.array(drawing.grid.spacing)
    sides = [np.arange(-round(reach_nm / size), round(reach_nm / size) + 1) for size in spacing]
    offsets = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3)
    index = np.rint(centres / spacing).astype(np.int64)[:, None] + offsets  # (n, k, 3)
    valid = ((index >= 0) & (index < drawing.grid.shape)).all(-1)
    distance = np.linalg.norm(index * spacing - centres[:, None], axis=-1)[valid]
    number = np.broadcast_to(np.arange(len(centres))[:, None], valid.shape)[valid]
    flat = np.ravel_multi_index(tuple(index[valid].T), drawing.grid.shape)
    grey = drawing.grey.reshape(-1)
    share = np.asarray(darkness(distance, number), np.float32)
    np.minimum.at(grey, flat, grey[flat] * (1 - share) + np.float32(to) * share)


def add_microtubules(drawing: Drawing, rng: np.random.Generator) -> None:
    """Thin dark lines along neurites: dots where a section cuts them across, stripes where along."""
    curves, low_high = drawing.curves, drawing.settings.microtubules_per_neurite
    starts = np.flatnonzero((np.diff(curves.path, prepend=-1) != 0) | (np.diff(curves.neurite, prepend=-1) != 0))
    lines = []
    for start, stop in zip(starts, [*starts[1:], len(curves.path)], strict=True):
        position, radius = curves.position[start:stop], curves.radius[start:stop]
        count = int(rng.integers(low_high[0], low_high[1] + 1))
        if len(position) < 5 or radius.mean() < 45:
            continue
        length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(position, axis=0), axis=1))])
        at = np.arange(0, length[-1], 7.0)
        middle = np.stack([np.interp(at, length, position[:, axis]) for axis in range(3)], axis=1)
        for _ in range(count):
            aside = rng.uniform(-0.45, 0.45, 3)
            lines.append(middle + np.interp(at, length, radius)[:, None] * aside)
    if not lines:
        return
    points = drawing.warp.from_plan(np.concatenate(lines))
    points = points[((points >= 0) & (points < drawing.grid.extent)).all(1)]
    voxels = drawing.voxels(points)
    points = points[(drawing.partition.depth[voxels] > CLEARANCE) & ~drawing.occupied[voxels]]
    stamp(drawing, points, 16.0, lambda distance, _: np.asarray(0.5 * np.exp(-((distance / 9) ** 2)), np.float32), 80.0)
