"""Tomograms as the task sees them: a lazy volume with a voxel spacing per axis, checked against its label."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import data_error
from common.volumes.opening import open_volume
from common.volumes.volume import Volume
from motor_detection.intensity import measure_intensity, to_bytes
from motor_detection.labels import LabelledTomogram
from motor_detection.patches import ByteVolume

SPACING_DISAGREES = 0.05  # relative difference of header and label table that is worth a warning


@dataclasses.dataclass(frozen=True)
class Tomogram:
    """A volume [z, y, x] on disk and its voxel spacing in Å per axis."""

    tomo_id: str
    volume: Volume
    spacing_angstrom: tuple[float, float, float]


def open_tomogram(path: Path, label: LabelledTomogram | None, voxel_spacing_angstrom: float) -> Tomogram:
    """Open one tomogram; the spacing is the given one if above 0, else the label table's, else the header's.

    Raises a data error where no spacing is known, or the shape contradicts the label.
    """
    volume = open_volume(path, "zyx")
    if label is not None and volume.shape != label.shape:
        raise data_error(
            f"{path}: is {list(volume.shape)} voxels (z, y, x), the label table says {list(label.shape)}; "
            f"correct the table's shape of {label.tomo_id}, or replace the tomogram"
        )
    spacing = volume.spacing_angstrom
    if label is not None:
        spacing = (label.spacing_angstrom,) * 3
    if voxel_spacing_angstrom > 0:
        spacing = (voxel_spacing_angstrom,) * 3
    if spacing is None:
        raise data_error(f"{path}: holds no voxel spacing; give it in Å as data.voxel_spacing_angstrom=13.1")
    return Tomogram(label.tomo_id if label is not None else tomogram_name(path), volume, spacing)


def tomogram_name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def spacing_warnings(tomogram: Tomogram) -> Iterator[str]:
    """A header that contradicts the spacing in use is said, not hidden."""
    header = tomogram.volume.spacing_angstrom
    if header is not None:
        worst = max(abs(h / s - 1) for h, s in zip(header, tomogram.spacing_angstrom, strict=True))
        if worst > SPACING_DISAGREES:
            yield f"{tomogram.volume.path}: header says {header} Å per voxel (z, y, x), used is {tomogram.spacing_angstrom}"


def load_bytes(tomogram: Tomogram) -> ByteVolume:
    """The whole tomogram in memory as bytes, slab by slab, with its normalisation."""
    intensity = measure_intensity(tomogram.volume)
    depth, height, width = tomogram.volume.shape
    voxels = np.empty((depth, height, width), np.uint8)
    for z in range(0, depth, 32):
        slab = tomogram.volume.read((z, 0, 0), (min(32, depth - z), height, width))
        voxels[z : z + len(slab)] = to_bytes(slab, intensity, tomogram.volume.path)
    return ByteVolume(voxels, tomogram.spacing_angstrom, intensity.mean, intensity.deviation)
