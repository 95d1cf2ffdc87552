"""The microscope: sections averaged over their thickness, point spread, noise, and sections that went wrong."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from data.phantoms.em_grid import Float, Grid
from data.phantoms.em_settings import FAULTS, EMPhantom

BLACK = 4.0  # grey level of a section that is missing


@dataclasses.dataclass(frozen=True, eq=False)
class Faults:
    """What happens to each section."""

    names: list[str]  # "" for a sound section
    shift: npt.NDArray[np.int64]  # (sections, 2) voxels y, x; 0 where not shifted


def draw_faults(settings: EMPhantom, rng: np.random.Generator) -> Faults:
    """Which sections go wrong, and how."""
    shares = [getattr(settings, f"{fault}_share") for fault in FAULTS]
    sections = settings.shape[0]
    kind = np.searchsorted(np.cumsum(shares), rng.random(sections), side="right")
    names = [[*FAULTS, ""][number] for number in kind.tolist()]
    size = rng.integers(
        min(settings.largest_shift_voxels, 1), settings.largest_shift_voxels + 1, (sections, 2)
    ) * rng.choice([-1, 1], (sections, 2))
    return Faults(names, np.where(np.array(names)[:, None] == "shifted", size, 0))


def cropped(canvas: npt.NDArray[Any], faults: Faults, settings: EMPhantom) -> npt.NDArray[Any]:
    """The volume's part of a canvas of sections (z, y, x): sections slide over each other where they are shifted."""
    margin = settings.largest_shift_voxels
    _, height, width = settings.shape
    return np.stack(
        [
            section[margin + dy : margin + dy + height, margin + dx : margin + dx + width]
            for section, (dy, dx) in zip(canvas, faults.shift.tolist(), strict=True)
        ]
    )


def take_image(
    grey: Float, grid: Grid, faults: Faults, settings: EMPhantom, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]]]:
    """Image fine planes (z * planes, y, x) as sections uint8 (z, y, x); and one record per section."""
    sections = grey.reshape(-1, grid.planes, *grey.shape[1:]).mean(1)  # (z, y, x)
    spread = [0, *(settings.point_spread_nm / size for size in grid.spacing[1:])]
    image = scipy.ndimage.gaussian_filter(sections, spread, truncate=3.0)
    contrast = 1 + settings.contrast_share * rng.standard_normal(len(image))
    brightness = settings.brightness_grey * rng.standard_normal(len(image))
    middle = image.mean()
    image = (image - middle) * contrast[:, None, None].astype(np.float32) + middle
    image += brightness[:, None, None].astype(np.float32)
    image += np.float32(settings.shading_grey) * slow(image.shape, 0.35, rng)
    image += np.float32(settings.curtain_grey) * curtains(image.shape, rng)
    image = cropped(image, faults, settings)
    image += noise(image.shape, settings, rng)
    records = []
    for number, name in enumerate(faults.names):
        record = {"section": number, "fault": name, "contrast": round(float(contrast[number]), 4)}
        record["brightness"] = round(float(brightness[number]), 3)
        spoil(image, number, name, faults, record, rng)
        records.append(record)
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8), records


def noise(shape: tuple[int, ...], settings: EMPhantom, rng: np.random.Generator) -> Float:
    """White and correlated noise in grey levels."""
    white = rng.standard_normal(shape, dtype=np.float32)
    correlated = scipy.ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (0, 0.8, 0.8))
    correlated *= np.float32(settings.correlated_noise_grey) / correlated.std()
    return np.asarray(np.float32(settings.white_noise_grey) * white + correlated, np.float32)


def slow(shape: tuple[int, ...], share: float, rng: np.random.Generator) -> Float:
    """Noise of deviation 1 in every section that changes over a share of the field and slowly between sections."""
    coarse = rng.standard_normal((shape[0] // 8 + 4, 8, 8), dtype=np.float32)
    coarse = scipy.ndimage.gaussian_filter(coarse, (1, 8 * share / 2, 8 * share / 2), mode="nearest")
    factors = [n / (m - 1) for n, m in zip(shape, coarse.shape, strict=True)]
    index = np.meshgrid(*[np.arange(n) / f for n, f in zip(shape, factors, strict=True)], indexing="ij", sparse=True)
    full = scipy.ndimage.map_coordinates(coarse, np.broadcast_arrays(*index), order=1)
    return np.asarray((full - full.mean()) / full.std(), np.float32)


def curtains(shape: tuple[int, ...], rng: np.random.Generator) -> Float:
    """Stripes along y of deviation 1 that change over a few sections (z, 1, x)."""
    stripes = scipy.ndimage.gaussian_filter(rng.standard_normal((shape[0], shape[2]), dtype=np.float32), (3, 0.8))
    return np.asarray(stripes / stripes.std(), np.float32)[:, None]


def spoil(
    image: Float, number: int, name: str, faults: Faults, record: dict[str, Any], rng: np.random.Generator
) -> None:
    """Do to one section of the image (z, y, x) what its fault says, and note it exactly."""
    section = image[number]
    if name == "shifted":
        record["shift_voxels_yx"] = faults.shift[number].tolist()
    elif name == "missing":
        copied = bool(number and rng.random() < 0.5)
        record["shows"] = f"section {number - 1}" if copied else "black"
        section[...] = image[number - 1] if copied else BLACK + rng.standard_normal(section.shape, dtype=np.float32)
    elif name == "blurred":
        sigma = float(rng.uniform(1.5, 2.5))
        section[...] = scipy.ndimage.gaussian_filter(section, sigma)
        section += rng.standard_normal(section.shape, dtype=np.float32) * np.float32(5)
        record["sigma_voxels"] = round(sigma, 3)
    elif name in ("folded", "scratched"):
        distance, record["angle_degrees"], record["offset_voxels"] = from_line(section.shape, rng)
        width = float(rng.uniform(2.5, 5)) if name == "folded" else float(rng.uniform(0.7, 1.4))
        record["width_voxels"] = round(width, 3)
        target = 30.0 if name == "folded" else 225.0
        cover = np.exp(-((distance / width) ** 2))
        section += (np.float32(target) - section) * np.asarray(0.9 * cover, np.float32)
    elif name == "charged":
        middle, width = float(rng.uniform(0, len(section))), float(rng.uniform(8, 25))
        record["y_voxels"], record["width_voxels"] = round(middle, 2), round(width, 2)
        band = np.exp(-(((np.arange(len(section)) - middle) / width) ** 2))
        section += np.asarray(60 * band, np.float32)[:, None]


def from_line(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Float, float, float]:
    """Distance in voxels from a slightly bent random line, the line's angle in degrees and offset from the middle."""
    y, x = np.meshgrid(*[np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in shape], indexing="ij")
    angle, offset = float(rng.uniform(0, np.pi)), float(rng.uniform(-0.35, 0.35) * min(shape))
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    bend = 3 * np.sin(along / 25 + rng.uniform(0, 6))
    return np.asarray(across - offset + bend, np.float32), round(float(np.degrees(angle)), 3), round(offset, 3)
