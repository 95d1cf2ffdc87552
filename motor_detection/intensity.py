"""Grey values: any volume as bytes, and the mean and deviation that normalise it, from a sample of its slices."""

import dataclasses
from pathlib import Path

import numpy as np

from common.errors import data_error
from common.volumes.volume import Volume

SAMPLED_SLICES = 24  # spread evenly over z: a few million voxels, read in well under a second
CLIPPED_PERCENT = 0.1  # of the voxels at either end when floats become bytes


@dataclasses.dataclass(frozen=True)
class Intensity:
    """value -> byte = (value - low) * 255 / (high - low); mean and deviation are in bytes."""

    low: float
    high: float
    mean: float
    deviation: float


def measure_intensity(volume: Volume) -> Intensity:
    """The intensity scale of a volume, from evenly spread slices; bytes keep their values.

    Raises a data error for a volume that is constant or not finite in the sample.
    """
    depth = volume.shape[0]
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, SAMPLED_SLICES)).round().astype(int))
    sample = np.concatenate([volume.read((int(z), 0, 0), (1, *volume.shape[1:])) for z in chosen])
    if not np.isfinite(sample).all():
        raise data_error(f"{volume.path}: holds NaN or infinite voxels; export the tomogram again")
    if sample.dtype == np.bool_:
        raise data_error(f"{volume.path}: holds true and false, no grey values; expected a tomogram")
    low, high = 0.0, 255.0
    if volume.dtype != np.uint8:
        low, high = (float(v) for v in np.percentile(sample, [CLIPPED_PERCENT, 100 - CLIPPED_PERCENT]))
    if sample.min() == sample.max() or low >= high:
        raise data_error(f"{volume.path}: all sampled voxels equal {sample.flat[0]}; expected a tomogram with contrast")
    scaled = _as_bytes(sample, low, high)
    return Intensity(low, high, float(scaled.mean(dtype=np.float64)), float(scaled.std(dtype=np.float64)))


def to_bytes(voxels: np.ndarray, intensity: Intensity, path: Path) -> np.ndarray:
    """Voxels of a volume on its intensity scale, uint8; a data error for NaN or infinite ones."""
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise data_error(f"{path}: holds NaN or infinite voxels between the sampled slices; export the tomogram again")
    return _as_bytes(voxels, intensity.low, intensity.high)


def _as_bytes(voxels: np.ndarray, low: float, high: float) -> np.ndarray:
    if voxels.dtype == np.uint8:
        return voxels
    scaled = (voxels.astype(np.float32) - low) * (255.0 / (high - low))
    scaled_bytes: np.ndarray = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return scaled_bytes
