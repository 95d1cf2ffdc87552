"""Membranes at the faces between neurites, synapses on some of them, and vesicles."""

import numpy as np
import numpy.typing as npt
import scipy.spatial

from data.phantoms.em_curves import between
from data.phantoms.em_grid import Points, box_shape, node_noise
from data.phantoms.em_organelles import SYNAPSE, Drawing, refined_to, stamp

NEAR_NM = 320.0  # from a synapse: how far its vesicles lie


def add_membranes(drawing: Drawing, rng: np.random.Generator) -> None:
    """Dark lines on both sides of every face; in places they fade."""
    settings, depth = drawing.settings, drawing.partition.depth
    thickness = np.float32(between(rng, settings.membrane_nm))
    noise = refined_to(drawing.grid, node_noise(drawing.grid, 85.0, rng))
    threshold = np.quantile(noise[::5, ::5, ::5], settings.weak_share)
    contrast = np.clip((noise - np.float32(threshold)) * np.float32(2.5) + np.float32(0.5), 0, 1)
    contrast = np.float32(settings.weak_contrast) + np.float32(1 - settings.weak_contrast) * contrast
    cover = np.clip((thickness - depth) / np.float32(6) + np.float32(0.5), 0, 1) * contrast
    drawing.grey[...] += (np.float32(settings.membrane_grey) - drawing.grey) * cover


def add_synapses(drawing: Drawing, rng: np.random.Generator) -> int:
    """Densities behind faces and vesicles before them; returns how many synapses."""
    settings, partition = drawing.settings, drawing.partition
    wanted = rng.poisson(settings.synapses_per_cubic_micrometre * drawing.grid.cubic_micrometres)
    deep = np.bincount(partition.body.ravel(), partition.depth.ravel() > 60)  # room for vesicles
    faces = np.flatnonzero(partition.depth.ravel()[::7] < 6) * 7
    vesicles: list[Points] = []
    count = 0
    for face in rng.choice(faces, 20 * wanted).tolist() if len(faces) else []:
        before, after = int(partition.body.flat[face]), int(partition.neighbour.flat[face])
        if count >= wanted or deep[before] < 4000 or before == after:
            continue
        centre = np.array(np.unravel_index(face, drawing.grid.shape)) * np.array(drawing.grid.spacing)
        cloud = vesicle_cloud(drawing, centre, before, rng)
        if len(cloud) < settings.vesicles_per_synapse[0] or not add_density(drawing, centre, before, after, rng):
            continue
        vesicles.append(cloud)
        count += 1
    if vesicles:
        add_vesicles(drawing, np.concatenate(vesicles), 0.0, rng)
    return count


def add_density(drawing: Drawing, centre: Points, before: int, after: int, rng: np.random.Generator) -> bool:
    """The dark patch on the far side of one face, labelled; False where the face is too small or taken."""
    settings, partition = drawing.settings, drawing.partition
    radius = between(rng, settings.synapse_radius_nm)
    box = drawing.grid.box_around(centre - radius, centre + radius)
    body, neighbour, depth = partition.body[box], partition.neighbour[box], partition.depth[box]
    distance = np.linalg.norm(drawing.grid.points(box) - centre, axis=-1)
    disc = distance < radius
    behind = disc & (body == after) & (neighbour == before) & (depth < settings.synapse_depth_nm)
    at_face = disc & (depth < 12) & (body == after) & (neighbour == before)
    expected = np.pi * radius**2 * 12 / np.prod(drawing.grid.spacing)
    if at_face.sum() < 0.5 * expected or drawing.occupied[box][behind].any() or drawing.semantic[box][behind].any():
        return False
    active = disc & (body == before) & (neighbour == after) & (depth < 15)
    edge = np.clip((radius - distance) / 25, 0, 1)
    dark = np.where(behind, np.clip((settings.synapse_depth_nm - depth) / 12 + 0.3, 0, 0.95), 0) * edge
    dark = np.maximum(dark, np.where(active, 0.6, 0) * edge).astype(np.float32)
    drawing.grey[box] += (np.float32(settings.density_grey) - drawing.grey[box]) * dark
    drawing.semantic[box][behind & (edge > 0.3)] = SYNAPSE
    drawing.occupied[box] |= behind
    return True


def vesicle_cloud(drawing: Drawing, centre: Points, neurite: int, rng: np.random.Generator) -> Points:
    """Places of vesicles (n, 3) nm near a face inside one neurite, denser towards the face and not overlapping."""
    settings, partition = drawing.settings, drawing.partition
    box = drawing.grid.box_around(centre - NEAR_NM, centre + NEAR_NM)
    free = (partition.body[box] == neurite) & (partition.depth[box] > settings.vesicle_radius_nm[1] + 10)
    free &= ~drawing.occupied[box]
    index = np.flatnonzero(free)
    if len(index) < 2000:
        return np.empty((0, 3))
    chosen = rng.choice(index, 900)
    corner = np.array([part.start for part in box])
    points = (np.stack(np.unravel_index(chosen, box_shape(box)), axis=1) + corner) * np.array(drawing.grid.spacing)
    away = np.linalg.norm(points - centre, axis=1)
    points = points[rng.random(len(points)) < np.exp(-np.maximum(away - 70, 0) / 90)]
    return apart(points, 2.1 * settings.vesicle_radius_nm[1])[: int(rng.integers(*settings.vesicles_per_synapse)) + 1]


def apart(points: Points, distance_nm: float) -> Points:
    """The points (n, 3) that keep their distance from all kept before them."""
    kept = np.ones(len(points), np.bool_)
    if len(points) == 0:
        return points
    pairs = np.sort(scipy.spatial.cKDTree(points).query_pairs(distance_nm, output_type="ndarray"))
    for one, two in sorted(map(tuple, pairs.tolist())):
        if kept[one]:
            kept[two] = False
    return points[kept]


def add_loose_vesicles(drawing: Drawing, rng: np.random.Generator) -> None:
    """Single vesicles anywhere in the cytoplasm, half of them with a dense core."""
    grid, settings = drawing.grid, drawing.settings
    wanted = rng.poisson(settings.loose_vesicles_per_cubic_micrometre * grid.cubic_micrometres)
    points = rng.uniform(0, 1, (2 * wanted, 3)) * (grid.extent - grid.spacing)
    voxels = drawing.voxels(points)
    points = points[(drawing.partition.depth[voxels] > 36) & ~drawing.occupied[voxels]][:wanted]
    if len(points):
        add_vesicles(drawing, points, 0.5, rng)


def add_vesicles(drawing: Drawing, centres: Points, cored: float, rng: np.random.Generator) -> None:
    """Dark shells about points (n, 3) nm; a share is filled."""
    radius = rng.uniform(*drawing.settings.vesicle_radius_nm, len(centres))
    filled = rng.random(len(centres)) < cored
    radius = np.where(filled, 1.6 * radius, radius)

    def darkness(distance: npt.NDArray[np.float64], number: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        shell = np.exp(-(((distance - radius[number]) / 7) ** 2))
        core = np.where(filled[number], distance < 0.8 * radius[number], 0)
        return np.asarray(0.75 * np.maximum(shell, core), np.float32)

    stamp(drawing, centres, 1.6 * float(radius.max()), darkness, drawing.settings.membrane_grey)
