"""Heat map to picks: peaks by physical distance, positions finer than a cell, neighbours told apart.

A target is the maximum of Gaussians of known width, so around a motor m the logarithm of the map is a paraboloid of
known curvature: log h(x) = a - |x - m|^2 / 2 sigma^2. That is linear in 1, x and |x|^2, and a weighted linear fit over
the cells that belong to one motor gives its position, its peak value and its width, also at a face of the volume and
beside a neighbour.
"""

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt
import scipy.ndimage

Array = npt.NDArray[np.float64]
NEIGHBOURS = np.array([offset for offset in itertools.product((-1, 0, 1), repeat=3) if any(offset)])
PADDING = 2  # empty cells around a map, so that every peak has neighbours
FLOOR = 1e-4  # probabilities below it say nothing in a logarithm
SHOULDER = 0.25  # of the peak: what a neighbour must rise above its mirror images to be a motor of its own
ROUNDS = 3  # of dealing cells to picks and fitting each anew
FARTHEST = 0.75  # cells that a fitted position may leave its cell's centre
SHARPNESS = (
    0.2,
    1.2,
)  # fitted (sigma / blob width)^2: a network's blob is wider where it is unsure, hardly ever narrower
PRIOR_WEIGHT = 0.02  # of sharpness 1, against a cell's worth of evidence
REACH = 1.8  # cells around a peak that take part in its fit


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Positions (n, 3) as float voxel index z, y, x, and scores (n,) in [0, 1], best first."""

    points: Array
    scores: Array


def find_peaks(
    heat: npt.NDArray[np.float32],
    stride: int,
    spacing_angstrom: Array,
    sigma_angstrom: float,
    min_distance_angstrom: float,
    min_score: float,
    max_picks: int,
) -> Peaks:
    """Picks of one heat map of probabilities (z, y, x cells), at most max_picks, at least min_distance apart.

    Two motors closer than a blob is wide need not have two maxima: a shoulder that no single Gaussian of the known
    width explains, on one side of a peak only, is a pick too. Scores are the fitted peak values, so that they do not
    depend on where between cell centres a motor lies.
    """
    width = sigma_angstrom / (np.asarray(spacing_angstrom, np.float64) * stride)  # sigma in cells, per axis
    padded = np.pad(heat.astype(np.float64), PADDING)
    maxima = _local_maxima(padded, min_score)[: 4 * max_picks]
    shoulders = [s for maximum in maxima if (s := _shoulder(padded, maximum, maxima, width)) is not None]
    cells = np.array([*maxima, *shoulders], np.int64).reshape(-1, 3)
    positions, scores = _fit(padded, cells, width)
    inside = np.clip(positions - PADDING, -0.5, np.array(heat.shape) - 0.5)  # without the padding
    points = (inside + 0.5) * stride - 0.5
    high = np.flatnonzero(scores >= min_score)
    kept = high[apart(points[high] * spacing_angstrom, scores[high], min_distance_angstrom, max_picks)]
    return Peaks(points[kept], scores[kept])


def _local_maxima(padded: Array, min_score: float) -> list[npt.NDArray[np.int64]]:
    """Cells not below any of their 26 neighbours, highest first; of a plateau the cell in its middle."""
    is_peak = (padded >= min_score) & (padded == scipy.ndimage.maximum_filter(padded, 3))
    plateaus, number = scipy.ndimage.label(is_peak, np.ones((3, 3, 3)))
    if number == 0:
        return []
    members = np.argwhere(is_peak)
    owner = plateaus[is_peak] - 1
    centres = np.array(scipy.ndimage.center_of_mass(is_peak, plateaus, range(1, number + 1)))
    from_centre = ((members - centres[owner]) ** 2).sum(1)
    order = np.lexsort((from_centre, owner))
    cells: npt.NDArray[np.int64] = members[order[np.unique(owner[order], return_index=True)[1]]]
    return list(cells[np.argsort(-padded[tuple(cells.T)], kind="stable")])


def _shoulder(
    padded: Array, peak: npt.NDArray[np.int64], maxima: list[npt.NDArray[np.int64]], width: Array
) -> npt.NDArray[np.int64] | None:
    """The neighbour of a peak that belongs to a second motor, or None.

    A first motor is placed by the lower neighbour on each axis, which a second one disturbs least. What then rises
    most above its Gaussian must do so by more than the median of all neighbours: a blob that is merely wide does not.
    """
    height = padded[tuple(peak)]
    last = np.array(padded.shape) - PADDING - 1
    around = NEIGHBOURS[((peak + NEIGHBOURS >= PADDING) & (peak + NEIGHBOURS <= last)).all(1)]  # inside the map
    if len(around) == 0:
        return None
    offset = np.zeros(3)
    for axis in range(3):
        beside = around[np.abs(around).sum(1) == np.abs(around[:, axis])]  # two, or one at a face of the map
        if len(beside) == 0:
            continue
        values = padded[tuple((peak + beside).T)]
        drop = np.log(height / max(values.min(), FLOOR))
        away = float(np.clip(width[axis] ** 2 * drop - 0.5, -0.5, 0.5))  # from the lower neighbour
        offset[axis] = -beside[values.argmin(), axis] * away
    amplitude = height * np.exp((offset**2 / (2 * width**2)).sum())
    expected = amplitude * np.exp(-((around - offset) ** 2 / (2 * width**2)).sum(1))
    excess = padded[tuple((peak + around).T)] - expected
    best = int(np.argmax(excess))
    second: npt.NDArray[np.int64] = peak + around[best]
    near_other = any((np.abs(second - other).max() <= 1) and (other != peak).any() for other in maxima)
    if near_other or excess[best] - np.median(excess) < SHOULDER * height:
        return None
    return second


def _fit(padded: Array, cells: npt.NDArray[np.int64], width: Array) -> tuple[Array, Array]:
    """Positions (n, 3) in cells of the padded map and peak values (n,) of the picks that start at some cells."""
    positions, scores = cells.astype(np.float64), padded[tuple(cells.T)]
    offsets = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for _ in range(ROUNDS if len(cells) else 0):
        fitted = [
            _fit_one(padded, start, positions, scores, number, offsets, width) for number, start in enumerate(cells)
        ]
        positions, scores = np.array([p for p, _ in fitted]), np.array([s for _, s in fitted])
    return positions, scores


def _fit_one(
    padded: Array, start: npt.NDArray[np.int64], positions: Array, scores: Array, number: int,
    offsets: npt.NDArray[np.int64], width: Array,
) -> tuple[Array, float]:  # fmt: skip
    """Weighted log-linear fit over the cells around `start` that pick `number` explains better than any other pick."""
    around = start + offsets
    values = padded[tuple(around.T)]
    near = np.flatnonzero((np.abs(positions - start) <= 4).all(1))
    claims = scores[near] * np.exp(-((around[:, None] - positions[near]) ** 2 / (2 * width**2)).sum(2))
    mine = (near[claims.argmax(1)] == number) & (values > FLOOR) & (np.linalg.norm(offsets, axis=1) < REACH)
    if mine.sum() < 6:
        return start.astype(np.float64), float(padded[tuple(start)])
    x, h = offsets[mine].astype(np.float64), values[mine]
    design = np.concatenate([np.ones((len(x), 1)), x / width**2, -0.5 * (x**2 / width**2).sum(1, keepdims=True)], 1)
    weighted = design * (h**2)[:, None]
    prior = np.diag([0.0, 0.0, 0.0, 0.0, PRIOR_WEIGHT * (h**2).sum()])
    right = weighted.T @ np.log(h) + prior @ np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    solution = np.linalg.solve(weighted.T @ design + prior + 1e-9 * np.eye(5), right)
    sharpness = float(np.clip(solution[4], *SHARPNESS))
    offset = np.clip(solution[1:4] / sharpness, -FARTHEST, FARTHEST)
    height = padded[tuple(start)] * np.exp(sharpness * (offset**2 / (2 * width**2)).sum())
    return start + offset, float(np.clip(height, 0.0, 1.0))


def apart(points_angstrom: Array, scores: Array, min_distance_angstrom: float, max_picks: int) -> list[int]:
    """Indices of at most max_picks picks, best first, without those closer than the distance to a better one.

    points_angstrom (n, 3), scores (n,).
    """
    kept: list[int] = []
    for number in np.argsort(-scores, kind="stable"):
        if len(kept) == max_picks:
            break
        distances = np.linalg.norm(points_angstrom[kept] - points_angstrom[number], axis=1)
        if (distances >= min_distance_angstrom).all():
            kept.append(int(number))
    return kept
