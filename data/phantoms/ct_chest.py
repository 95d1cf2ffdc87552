"""A chest in millimetres: what a patient is made of, what a study shows of it, and its Hounsfield units on a scanner's grid.

Patient coordinates z, y, x: up from the lungs' base, back and left from the middle of the body.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from data.phantoms.ct_settings import CtPhantom, Range

Floats = npt.NDArray[np.float64]
Units = npt.NDArray[np.float32]
AIR, FAT, MUSCLE, BLOOD, BONE = -1000.0, -100.0, 45.0, 50.0, 330.0
SHARPNESS_MM = 1.5  # over which surfaces fade
RIB_MM, RIB_WIDTH_MM = 28.0, 9.0  # from rib to rib, and of one
GENERATIONS = 5  # of branching vessels


@dataclasses.dataclass(frozen=True)
class Body:
    """What stays from study to study of a patient."""

    half_width: float
    half_depth: float
    lung_height: float
    fat: float
    vessel_scale: float
    heart: float  # size, about 1
    vessels: Floats  # (n, 7): ends z, y, x of a segment, and its radius


@dataclasses.dataclass(frozen=True)
class Lesion:
    """One thing that is found: a ball, a ball with a wall, or a ragged patch."""

    kind: int  # place in ct_settings.LABELS
    centre: tuple[float, float, float]
    radius: float
    units: float


def draw(limits: Range, rng: np.random.Generator) -> float:
    """A uniform draw."""
    return float(rng.uniform(*limits))


def draw_body(settings: CtPhantom, rng: np.random.Generator) -> Body:
    """A patient."""
    width, depth, height = (
        draw(getattr(settings, name), rng) for name in ("half_width_mm", "half_depth_mm", "lung_height_mm")
    )
    scale = draw(settings.vessel_scale, rng)
    vessels = np.concatenate([tree(side, width, depth, height, scale, rng) for side in (-1, 1)])
    return Body(width, depth, height, draw(settings.fat_mm, rng), scale, float(rng.uniform(0.85, 1.2)), vessels)


def tree(side: int, width: float, depth: float, height: float, scale: float, rng: np.random.Generator) -> Floats:
    """Segments (n, 7) of vessels that branch from a hilum into one lung."""
    hilum = np.array([0.5 * height, 0.0, side * 0.13 * width])
    found = []
    ends = []
    for _ in range(7):
        direction = rng.normal(0, 1, 3) * (1.0, 0.8, 0.4) + (0, 0, 0.8 * side)
        ends.append((hilum, direction / np.linalg.norm(direction), 5.0 * scale, 0.2 * height))
    for _ in range(GENERATIONS):
        following = []
        for place, direction, radius, length in ends:
            tip = place + direction * length
            found.append([*place, *tip, radius])
            for _ in range(2):
                turned = direction + 0.55 * rng.normal(0, 1, 3)
                following.append((tip, turned / np.linalg.norm(turned), 0.72 * radius, 0.8 * length))
        ends = following
    return np.array(found)


def lung_centre(body: Body, side: int) -> Floats:
    """The middle of one lung."""
    return np.array([0.5 * body.lung_height, -0.02 * body.half_depth, side * 0.47 * body.half_width])


def lungs_at(body: Body, z: Floats, y: Floats, x: Floats) -> Floats:
    """How far inside the lungs places are, mm, negative outside; about right near their surface."""
    found = np.full(np.broadcast_shapes(z.shape, y.shape, x.shape), -np.inf)
    for side in (-1, 1):
        centre = lung_centre(body, side)
        half = np.array([0.56 * body.lung_height, 0.70 * body.half_depth, 0.36 * body.half_width])
        v, u = (y - centre[1]) / half[1], (x - centre[2]) / half[2]
        radius = np.sqrt(((z - centre[0]) / half[0]) ** 2 + v**2 + u**2)
        dome = 0.2 * body.lung_height * (1 - v**2 - u**2)  # of the diaphragm
        found = np.maximum(found, np.minimum((1 - radius) * half.min(), z - dome))
    heart = np.array([0.33 * body.lung_height, -0.25 * body.half_depth, 0.14 * body.half_width])
    size = body.heart * np.array([0.24 * body.lung_height, 0.42 * body.half_depth, 0.34 * body.half_width])
    beat = np.sqrt(((z - heart[0]) / size[0]) ** 2 + ((y - heart[1]) / size[1]) ** 2 + ((x - heart[2]) / size[2]) ** 2)
    return np.asarray(np.minimum(found, (beat - 1) * size.min()), float)


def soft(distance: Floats) -> Floats:
    """0 outside, 1 inside, a slope of SHARPNESS_MM at distance 0."""
    return np.clip(distance / SHARPNESS_MM + 0.5, 0, 1)


def draw_lesions(
    settings: CtPhantom, body: Body, label: tuple[int, int, int], rng: np.random.Generator
) -> list[Lesion]:
    """What a study of a class shows."""
    counts = (rng.integers(1, 4), rng.integers(2, 7), rng.integers(6, 17))
    radii = (settings.consolidation_radius_mm, settings.nodule_radius_mm, settings.cyst_radius_mm)
    units = (settings.consolidation_hu, (0.0, 60.0), (-960.0, -930.0))
    found: list[Lesion] = []
    for kind, (there, count) in enumerate(zip(label, counts, strict=True)):
        for _ in range(int(count) if there else 0):
            radius = draw(radii[kind], rng)
            found.append(Lesion(kind, place_inside(body, min(radius, 12.0), rng), radius, draw(units[kind], rng)))
    return found


def place_inside(body: Body, margin: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A place that lies so far inside a lung."""
    for _ in range(2000):
        side = int(rng.integers(2)) * 2 - 1
        centre = lung_centre(body, side)
        half = (0.56 * body.lung_height, 0.70 * body.half_depth, 0.36 * body.half_width)
        z, y, x = (float(c + h * rng.uniform(-1, 1)) for c, h in zip(centre, half, strict=True))
        if lungs_at(body, np.array(z), np.array(y), np.array(x)) >= margin:
            return z, y, x
    z, y, x = (float(v) for v in lung_centre(body, 1))
    return z, y, x


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A scanner's grid: places of its voxels in the patient, and their spacing."""

    z: Floats  # (nz, ny, nx)
    y: Floats
    x: Floats
    spacing: tuple[float, float, float]


def draw_view(settings: CtPhantom, body: Body, rng: np.random.Generator) -> View:
    """The grid of one study: from below the lungs to above them, the patient a little turned and off the middle."""
    step, pixel = draw(settings.slice_mm, rng), draw(settings.pixel_mm, rng)
    low, high = -0.12 * body.lung_height - rng.uniform(0, 25), 1.1 * body.lung_height + rng.uniform(0, 30)
    number = max(8, round((high - low) / step))
    grid = np.stack(np.meshgrid(
        low + step * np.arange(number), *(pixel * (np.arange(n) - (n - 1) / 2) for n in settings.shape), indexing="ij",
    ), -1)  # fmt: skip
    angles = np.radians(rng.uniform(-1, 1, 3) * settings.turn_degrees)
    shift = rng.uniform(-1, 1, 3) * settings.shift_mm * (0, 1, 1)
    middle = np.array([0.5 * body.lung_height, 0, 0])
    placed = (grid - middle - shift) @ rotation(angles) + middle
    return View(placed[..., 0], placed[..., 1], placed[..., 2], (step, pixel, pixel))


def rotation(angles: Floats) -> Floats:
    """Turns about z, y, x, one after the other (3, 3)."""
    found = np.eye(3)
    for axis, angle in enumerate(angles):
        one, other = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        found = found @ turn
    return found


def render(settings: CtPhantom, body: Body, lesions: list[Lesion], view: View, rng: np.random.Generator) -> Units:
    """Hounsfield units (z, y, x) of a study."""
    z, y, x = view.z, view.y, view.x
    radius = (np.abs(x / body.half_width) ** 2.4 + np.abs(y / body.half_depth) ** 2.4) ** (1 / 2.4)
    skin = (1 - radius) * min(body.half_width, body.half_depth)  # mm below it
    units = AIR + (FAT - AIR) * soft(skin)
    units += (MUSCLE - FAT) * soft(skin - body.fat)
    rib = RIB_WIDTH_MM / 2 - np.abs((z + 0.35 * y) % RIB_MM - RIB_MM / 2)
    shell = 4.0 - np.abs(skin - body.fat - 8.0)
    spine = 17.0 - np.hypot(y - 0.66 * body.half_depth, x)
    units += (BONE - MUSCLE) * np.maximum(soft(np.minimum(rib, shell)), soft(spine) * np.where(z % 26 < 20, 1.0, 0.35))
    inside = lungs_at(body, z, y, x)
    lung = soft(inside)
    air = draw(settings.lung_hu, rng) + 0.25 * y  # what lies at the back is denser
    units += (air - units) * lung
    pipe = 8.0 - np.hypot(y + 0.1 * body.half_depth, x)
    units += (AIR - units) * soft(np.minimum(pipe, z - 0.6 * body.lung_height)) * soft(skin - 20)
    units = units.astype(np.float64)
    stamp_vessels(units, body, view, lung)
    for lesion in lesions:
        put(units, lesion, view, lung, rng)
    blurred = scipy.ndimage.gaussian_filter(units, [draw(settings.blur_mm, rng) / s for s in view.spacing])
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal(units.shape), (0.3, 0.7, 0.7))
    blurred += noise * (draw(settings.noise_hu, rng) / noise.std())
    return np.clip(blurred, -1024, 3000).astype(np.float32)


def stamp_vessels(units: Floats, body: Body, view: View, lung: Floats) -> None:
    """Blood along all segments inside the lungs, ball by ball; thin ones fill voxels in part."""
    starts, ends, radii = body.vessels[:, :3], body.vessels[:, 3:6], body.vessels[:, 6]
    for start, end, radius in zip(starts, ends, radii, strict=True):
        count = max(2, int(np.linalg.norm(end - start) / max(1.5, radius)))
        for share in np.linspace(0, 1, count):
            box, distance = near(view, start + share * (end - start), radius + 2)
            if distance is not None:
                cover = (
                    np.clip(radius + 0.5 - distance, 0, 1)
                    * min(1.0, (radius / (0.5 * view.spacing[1])) ** 2)
                    * lung[box]
                )
                units[box] = np.maximum(units[box], units[box] + (BLOOD - units[box]) * cover)


Box = tuple[slice, slice, slice]


def near(view: View, centre: Floats, reach: float) -> tuple[Box, Floats | None]:
    """The box of voxels within a reach of a place, and their distances; None where there is none."""
    origin = np.array([view.z[0, 0, 0], view.y[0, 0, 0], view.x[0, 0, 0]])
    axes = np.stack([
        np.array([grid[tuple(1 if k == axis else 0 for k in range(3))] for grid in (view.z, view.y, view.x)]) - origin
        for axis in range(3)
    ], 1)  # fmt: skip
    index = np.linalg.solve(axes, centre - origin)
    spread = reach / np.array(view.spacing) + 1
    low, high = np.floor(index - spread).astype(int), np.ceil(index + spread).astype(int) + 1
    ends = [(max(0, a), min(n, b)) for a, b, n in zip(low, high, view.z.shape, strict=True)]
    box = (slice(*ends[0]), slice(*ends[1]), slice(*ends[2]))
    if any(a >= b for a, b in ends):
        return box, None
    parts = (grid[box] - c for grid, c in zip((view.z, view.y, view.x), centre, strict=True))
    return box, np.sqrt(sum(part**2 for part in parts))


def put(units: Floats, lesion: Lesion, view: View, lung: Floats, rng: np.random.Generator) -> None:
    """One lesion into a study."""
    box, distance = near(view, np.array(lesion.centre), 1.6 * lesion.radius + 4)
    if distance is None:
        return
    if lesion.kind == 0:  # ragged: the surface follows smooth noise, and some air stays in it
        noise = scipy.ndimage.gaussian_filter(rng.standard_normal(distance.shape), [9 / s for s in view.spacing])
        noise /= noise.std() + 1e-9
        fine = scipy.ndimage.gaussian_filter(rng.standard_normal(distance.shape), [3 / s for s in view.spacing])
        cover = soft(lesion.radius * (1 + 0.28 * noise) - distance) * lung[box]
        units[box] += (lesion.units + 60 * fine / (fine.std() + 1e-9) - units[box]) * cover
    elif lesion.kind == 1:
        units[box] += (lesion.units - units[box]) * soft(lesion.radius - distance) * lung[box]
    else:
        wall = soft(lesion.radius + 2.0 - distance) * lung[box]
        units[box] = np.maximum(units[box], units[box] + (-350 - units[box]) * wall)
        units[box] += (lesion.units - units[box]) * soft(lesion.radius - distance) * lung[box]
