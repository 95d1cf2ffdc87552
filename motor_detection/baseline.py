"""What simple methods reach: a Laplacian-of-Gaussian blob picker, and chance."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from common.metrics.detection import DetectionCurve, ScoredTomogram, best_threshold
from common.streams import random_for
from motor_detection.peaks import apart
from motor_detection.tomograms import Tomogram, load_bytes

Array = npt.NDArray[np.float64]
BINNED_SIGMA = 2.0  # binned voxels: a blob is looked for on the coarsest grid that still shows it
DARK, BRIGHT = 1, -1  # the sign of a Laplacian over a blob: particles are dark in most tomograms
Variant = tuple[float, int]  # sigma in angstrom, polarity


def blob_picks(
    tomogram: Tomogram, motors: Array, sigmas_angstrom: tuple[float, ...], min_distance_angstrom: float, max_picks: int
) -> dict[Variant, ScoredTomogram]:
    """The strongest blobs of one tomogram for every sigma and polarity, scored by the scale-normalised Laplacian.

    Lindeberg 1998: sigma^2 times the Laplacian of the Gaussian-smoothed volume, here in standard deviations of the grey
    values; its local maxima (dark blobs) and minima (bright blobs) at least min_distance apart.
    """
    volume = load_bytes(tomogram)
    spacing = np.array(tomogram.spacing_angstrom)
    picks = {}
    for sigma in sigmas_angstrom:
        binning = np.maximum(1, np.floor(sigma / (BINNED_SIGMA * spacing))).astype(int)
        binning = np.minimum(binning, volume.voxels.shape)  # a thin tomogram is one block thick
        binned = (bin_mean(volume.voxels, binning) - volume.mean) / volume.deviation
        sigma_voxels = sigma / (spacing * binning)
        response = scaled_laplacian(binned, sigma_voxels)
        for polarity in (DARK, BRIGHT):
            points, scores = strongest(polarity * response, binning, spacing, min_distance_angstrom, max_picks)
            picks[sigma, polarity] = ScoredTomogram(points, scores, motors, spacing)
    return picks


def bin_mean(voxels: npt.NDArray[np.uint8], binning: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The mean of blocks of voxels (z, y, x per axis); an incomplete last block is left out."""
    blocks = np.maximum(1, np.array(voxels.shape) // binning)
    cut = voxels[tuple(slice(0, n * b) for n, b in zip(blocks, binning, strict=True))]
    split = cut.reshape(blocks[0], binning[0], blocks[1], binning[1], blocks[2], binning[2])
    means: npt.NDArray[np.float32] = split.mean((1, 3, 5), dtype=np.float32)
    return means


def scaled_laplacian(volume: npt.NDArray[np.float32], sigma_voxels: Array) -> npt.NDArray[np.float32]:
    """The sum over axes of sigma^2 d^2/dx^2 of the smoothed volume: positive in the middle of a dark blob."""
    total = np.zeros_like(volume)
    for axis in range(3):
        order = [0, 0, 0]
        order[axis] = 2
        total += sigma_voxels[axis] ** 2 * scipy.ndimage.gaussian_filter(volume, sigma_voxels, order, mode="nearest")
    return total


def strongest(
    response: npt.NDArray[np.float32],
    binning: npt.NDArray[np.int64],
    spacing: Array,
    min_distance_angstrom: float,
    max_picks: int,
) -> tuple[Array, Array]:
    """Points (n, 3) in voxels of the unbinned volume and scores (n,) of the highest maxima, best first."""
    is_peak = (response == scipy.ndimage.maximum_filter(response, 3)) & (response > 0)
    cells = np.argwhere(is_peak)
    scores = response[is_peak].astype(np.float64)
    points = ((cells + 0.5) * binning - 0.5).astype(np.float64)
    kept = apart(points * spacing, scores, min_distance_angstrom, max_picks)
    return points[kept].reshape(-1, 3), scores[kept]


def best_variant(
    validation: list[dict[Variant, ScoredTomogram]], curve_of: Callable[[list[ScoredTomogram]], DetectionCurve]
) -> tuple[Variant, float]:
    """The sigma and polarity, and the threshold, with the highest F-beta on the validation tomograms."""
    found: dict[Variant, tuple[float, float]] = {}
    for variant in validation[0]:
        chosen = [picks[variant] for picks in validation]
        curve = curve_of(chosen)
        if len(curve.thresholds) > 0:
            best = best_threshold(curve, 0.0, float(curve.thresholds.max()) + 1.0)
            found[variant] = (best.f_beta, best.threshold)
    winner = max(found, key=lambda variant: found[variant][0])
    return winner, found[winner][1]


def random_picks(
    shapes: list[tuple[int, int, int]], like: list[ScoredTomogram], draw: int, seed: int, per_tomogram: int
) -> list[ScoredTomogram]:
    """Points drawn evenly over each volume, all of score 1: what answering without looking gives."""
    drawn = []
    for number, (shape, tomogram) in enumerate(zip(shapes, like, strict=True)):
        points = random_for("chance", seed, draw, number).uniform(-0.5, np.array(shape) - 0.5, (per_tomogram, 3))
        drawn.append(ScoredTomogram(points, np.ones(per_tomogram), tomogram.truths, tomogram.spacing_angstrom))
    return drawn


def middle_picks(shapes: list[tuple[int, int, int]], like: list[ScoredTomogram]) -> list[ScoredTomogram]:
    """The middle of each volume, of score 1."""
    return [
        ScoredTomogram((np.array([shape]) - 1) / 2, np.ones(1), tomogram.truths, tomogram.spacing_angstrom)
        for shape, tomogram in zip(shapes, like, strict=True)
    ]


def variant_in_words(variant: Variant) -> str:
    sigma, polarity = variant
    return f"{'dark' if polarity == DARK else 'bright'} blobs of sigma {sigma:g} Å"
