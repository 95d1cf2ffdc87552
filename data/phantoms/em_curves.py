"""Neurites as bundles of smooth random curves in nm: drawn, pushed apart until they hardly overlap, and sampled."""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.spatial

from data.phantoms.em_settings import EMPhantom, Range

Points = npt.NDArray[np.float64]  # (n, 3): z, y, x in nm
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STEP = 60.0  # nm between the points of a curve while it is moved
MARGIN = 220.0  # nm around the block that is filled too, so that its faces cut through neurites
ROUNDS = 18  # of pushing apart
WIDE = 105.0  # nm: curves of larger radius look for neighbours further away
TIGHT = 0.92  # share of two radii below which curves push each other


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """Points along paths; a neurite is one path or several. Sorted by neurite, then by path, then along the path."""

    position: Points  # (n, 3) nm
    radius: Floats  # (n,) nm
    neurite: Ints  # (n,)
    path: Ints  # (n,)

    def of(self, chosen: npt.NDArray[np.bool_] | Ints) -> "Curves":
        """Some of the points, in their order."""
        return Curves(self.position[chosen], self.radius[chosen], self.neurite[chosen], self.path[chosen])


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """Curves under construction: one entry per path."""

    positions: list[Points]
    radii: list[Floats]
    neurites: list[int]
    parents: list[tuple[int, int]]  # path and point that the first point is tied to; (-1, -1): none

    def add(self, position: Points, radius: Floats, neurite: int, parent: tuple[int, int]) -> float:
        """Append a path; returns its volume in nm^3."""
        self.positions.append(position)
        self.radii.append(radius)
        self.neurites.append(neurite)
        self.parents.append(parent)
        return float(np.pi * (radius**2).sum() * STEP)


def draw_curves(settings: EMPhantom, extent: Points, rng: np.random.Generator) -> Curves:
    """Random neurites that fill a block of `extent` (3,) nm, evenly sampled and hardly overlapping."""
    draft = Draft([], [], [], [])
    size = extent + 2 * MARGIN
    volume = float(size.prod()) * settings.packing
    filled = 0.0
    while filled < settings.thick_share * volume:
        filled += add_thick(draft, settings, size, rng)
    filled = 0.0
    while filled < settings.sheet_share * volume:
        filled += add_sheet(draft, settings, size, rng)
    filled = 0.0
    while filled < (1 - settings.thick_share - settings.sheet_share) * volume:
        filled += add_thin(draft, settings, size, rng)
    path = np.repeat(np.arange(len(draft.radii)), [len(radius) for radius in draft.radii])
    curves = Curves(
        np.concatenate(draft.positions), np.concatenate(draft.radii), np.array(draft.neurites, np.int64)[path], path
    )
    moved = pushed_apart(curves, draft.parents)
    return sampled(dataclasses.replace(curves, position=moved - MARGIN))


def next_neurite(draft: Draft) -> int:
    """The first unused number."""
    return draft.neurites[-1] + 1 if draft.neurites else 0


def walk(start: Points, direction: Points, steps: int, persistence_nm: float, rng: np.random.Generator) -> Points:
    """A curve (steps, 3) from `start` that slowly forgets its direction (a worm-like chain)."""
    turns = rng.standard_normal((steps, 3)) * np.sqrt(STEP / persistence_nm)
    directions = direction + np.cumsum(turns, 0) - turns[0]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(start + STEP * (np.cumsum(directions, 0) - directions[0]), np.float64)


def across(
    start: Points, direction: Points, size: Points, settings: EMPhantom, rng: np.random.Generator
) -> tuple[Points, bool]:
    """A curve through `start` in both directions until it leaves the block or ends inside; and whether it ends."""
    steps = int(1.5 * np.linalg.norm(size) / STEP)
    halves = []
    for sign in (1.0, -1.0):
        half = walk(start, sign * direction, steps, settings.persistence_nm, rng)
        outside = np.flatnonzero(((half < 0) | (half > size)).any(1))
        halves.append(half[: outside[0]] if len(outside) else half)
    ends = bool(rng.random() < settings.ending_share)
    if ends:
        halves[1] = halves[1][: 2 + int(len(halves[1]) * rng.random() * 0.3)]
    return np.concatenate([halves[1][:0:-1], halves[0]]), ends


def unit_vector(rng: np.random.Generator) -> Points:
    """A random direction."""
    vector = rng.standard_normal(3)
    return np.asarray(vector / np.linalg.norm(vector), np.float64)


def uneven(mean: float, count: int, spread: float, rng: np.random.Generator) -> Floats:
    """Radii (count,) about a mean that vary smoothly by `spread` and taper."""
    knots = rng.standard_normal(count // 6 + 3)
    smooth = np.interp(np.arange(count) / 6.0, np.arange(len(knots)), knots)
    taper = np.linspace(1, rng.uniform(0.65, 1.0), count)[:: int(rng.choice([-1, 1]))]
    return np.asarray(mean * np.exp(spread * smooth) * taper, np.float64)


def add_thick(draft: Draft, settings: EMPhantom, size: Points, rng: np.random.Generator) -> float:
    """A dendrite with spines, perhaps forked; returns its volume in nm^3."""
    neurite, trunk = next_neurite(draft), len(draft.radii)
    line, _ = across(rng.uniform(0, size), unit_vector(rng), size, settings, rng)
    radius = np.clip(uneven(rng.uniform(*settings.thick_radius_nm), len(line), 0.18, rng), 100, 500)
    volume = draft.add(line, radius, neurite, (-1, -1))
    if len(line) < 6:
        return volume
    if rng.random() < settings.branch_share:
        at = int(rng.integers(2, len(line) - 2))
        twig = walk(line[at], unit_vector(rng), int(size.max() / STEP), settings.persistence_nm, rng)
        outside = np.flatnonzero(((twig < 0) | (twig > size)).any(1))
        twig = twig[: outside[0]] if len(outside) else twig
        volume += draft.add(
            twig, np.clip(uneven(0.6 * radius[at], len(twig), 0.15, rng), 80, 500), neurite, (trunk, at)
        )
    for _ in range(int(rng.poisson(settings.spines_per_micrometre * len(line) * STEP / 1000))):
        at = int(rng.integers(1, len(line) - 1))
        count = int(np.ceil(radius[at] / STEP)) + int(rng.integers(4, 9))
        spine = walk(line[at], unit_vector(rng), count, 500.0, rng)
        shape = np.full(count, rng.uniform(42, 58))
        shape[-2:] = rng.uniform(90, 160)
        volume += draft.add(spine, shape, neurite, (trunk, at))
    return volume


def add_thin(draft: Draft, settings: EMPhantom, size: Points, rng: np.random.Generator) -> float:
    """One thin neurite or a bundle side by side; returns the volume in nm^3."""
    count = int(rng.integers(3, 8)) if rng.random() < settings.bundle_share / 3 else 1
    start, direction, volume = rng.uniform(0, size), unit_vector(rng), 0.0
    for _ in range(count):
        beside = np.clip(start + (count > 1) * rng.normal(0, 170, 3), 0, size)
        line, _ = across(beside, direction, size, settings, rng)
        radius = uneven(rng.uniform(*settings.thin_radius_nm), len(line), 0.22, rng)
        for _ in range(int(rng.poisson(settings.swellings_per_micrometre * len(line) * STEP / 1000))):
            along = (np.arange(len(line)) - rng.uniform(0, len(line))) * STEP / rng.uniform(120, 260)
            radius = radius * (1 + rng.uniform(0.5, 1.5) * np.exp(-(along**2)))
        volume += draft.add(line, np.clip(radius, 45, 300), next_neurite(draft), (-1, -1))
    return volume


def add_sheet(draft: Draft, settings: EMPhantom, size: Points, rng: np.random.Generator) -> float:
    """A glial sheet: parallel curves, each starting along a curve across them; returns its volume in nm^3."""
    neurite, direction = next_neurite(draft), unit_vector(rng)
    sideways = np.cross(direction, unit_vector(rng))
    sideways /= np.linalg.norm(sideways)
    edge = walk(rng.uniform(0, size), sideways, int(rng.integers(10, 26)), settings.persistence_nm, rng)
    steps = int(rng.integers(10, 30))
    row = walk(np.zeros(3), direction, steps, settings.persistence_nm, rng)
    volume = 0.0
    for start in edge:
        line = start + row
        inside = ((line >= 0) & (line <= size)).all(1)
        if inside.sum() > 2:
            line = line[inside]
            volume += draft.add(line, np.full(len(line), settings.sheet_radius_nm), neurite, (-1, -1))
    return volume


def pushed_apart(curves: Curves, parents: list[tuple[int, int]]) -> Points:
    """Positions (n, 3) after curves of different neurites have pushed each other aside, staying smooth."""
    position, path = curves.position.copy(), curves.path
    number = np.arange(len(path))
    before = np.where(np.diff(path, prepend=-1) == 0, number - 1, number)
    after = np.where(np.diff(path, append=-1) == 0, number + 1, number)
    first = np.searchsorted(path, np.arange(len(parents)))
    tied = np.array([at for at, (parent, _) in zip(first, parents, strict=True) if parent >= 0], np.int64)
    anchor = np.array([first[parent] + point for parent, point in parents if parent >= 0], np.int64)
    for _ in range(ROUNDS):
        push = pushes(position, curves.radius, curves.neurite)
        for _ in range(3):  # neighbours along a path move together
            push = 0.5 * push + 0.25 * (push[before] + push[after])
        position += push
        position += 0.15 * (0.5 * (position[before] + position[after]) - position) * ((before != after)[:, None])
        position[tied] = position[anchor]
    return position


def pushes(position: Points, radius: Floats, neurite: Ints) -> Points:
    """Displacements (n, 3) that take overlapping points of different neurites apart, the thinner one more."""
    one, two = close_pairs(position, radius)
    apart = neurite[one] != neurite[two]
    one, two = one[apart], two[apart]
    places = np.ascontiguousarray(position.T)  # axis by axis: several times faster than rows of three
    between = [along[one] - along[two] for along in places]
    distance = np.sqrt(between[0] ** 2 + between[1] ** 2 + between[2] ** 2) + 1e-3
    both = radius[one] + radius[two]
    overlap = TIGHT * both - distance
    kept = np.flatnonzero(overlap > 0)
    one, two, both = one[kept], two[kept], both[kept]
    share, strength = radius[two] / both, overlap[kept] / distance[kept]
    total = np.empty_like(position)
    for axis in range(3):
        force = between[axis][kept] * strength
        total[:, axis] = np.bincount(one, force * share, len(position))
        total[:, axis] -= np.bincount(two, force * (1 - share), len(position))
    touching = np.bincount(one, minlength=len(position)) + np.bincount(two, minlength=len(position))
    return np.asarray(total / np.maximum(0.45 * touching, 1)[:, None], np.float64)


def close_pairs(position: Points, radius: Floats) -> tuple[Ints, Ints]:
    """Pairs of points nearer than their radii together, each once (and some that are further apart)."""
    wide = np.flatnonzero(radius > WIDE)
    thin = np.flatnonzero(radius <= WIDE)
    thin_tree = scipy.spatial.cKDTree(position[thin])
    pairs = [thin[thin_tree.query_pairs(2 * WIDE * TIGHT, output_type="ndarray")].T]
    if len(wide):
        wide_tree, largest = scipy.spatial.cKDTree(position[wide]), float(radius.max())
        pairs.append(wide[wide_tree.query_pairs(2 * largest * TIGHT, output_type="ndarray")].T)
        mixed = wide_tree.sparse_distance_matrix(thin_tree, (largest + WIDE) * TIGHT, output_type="ndarray")
        pairs.append(np.stack([wide[mixed["i"]], thin[mixed["j"]]]))
    one, two = np.concatenate(pairs, axis=1)
    return one, two


def sampled(curves: Curves) -> Curves:
    """The curves with points so dense that a chain of balls looks like a tube."""
    parts: list[Curves] = []
    starts = np.flatnonzero(np.diff(curves.path, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(curves.path)], strict=True):
        line, radius = curves.position[start:stop], curves.radius[start:stop]
        length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        spacing = np.clip(0.65 * radius.min(), 42, 110)
        at = np.linspace(0, length[-1], int(length[-1] / spacing) + 2)
        position = np.stack([np.interp(at, length, line[:, axis]) for axis in range(3)], axis=1)
        same = np.full(len(at), curves.neurite[start]), np.full(len(at), curves.path[start])
        parts.append(Curves(position, np.interp(at, length, radius), *same))
    return Curves(
        np.concatenate([part.position for part in parts]),
        np.concatenate([part.radius for part in parts]),
        np.concatenate([part.neurite for part in parts]),
        np.concatenate([part.path for part in parts]),
    )


def between(rng: np.random.Generator, values: Range) -> float:
    """One draw between the lowest and highest value."""
    return float(rng.uniform(*values))
