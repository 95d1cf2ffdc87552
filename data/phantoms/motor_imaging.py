"""The electron microscope: contrast transfer, missing wedge, shot noise and the 8-bit grey scale of a tomogram."""

import dataclasses

import numpy as np
import scipy.fft

from data.phantoms.motor_settings import MotorPhantom
from data.phantoms.motor_shapes import Volume

WAVELENGTH = 0.019687  # angstrom, electrons at 300 kV
INTERACTION = 6.526e-4  # radian per volt and angstrom, at 300 kV


@dataclasses.dataclass(frozen=True)
class Exposure:
    """How one tomogram was taken."""

    spacing_angstrom: float
    defocus_micrometre: float
    b_factor_angstrom2: float
    dose_electrons_per_angstrom2: float


def frequencies(shape: tuple[int, ...], spacing_angstrom: float) -> tuple[Volume, Volume, Volume]:
    """Frequencies in 1/angstrom of a real-to-complex transform, broadcasting as (kz, 1, 1), (1, ky, 1), (1, 1, kx)."""
    z, y, x = shape
    kz, ky = (np.fft.fftfreq(n, spacing_angstrom).astype(np.float32) for n in (z, y))
    kx = np.fft.rfftfreq(x, spacing_angstrom).astype(np.float32)
    return kz[:, None, None], ky[None, :, None], kx[None, None, :]


def wedge(shape: tuple[int, ...], tilt_limit_degrees: float) -> Volume:
    """1 where a tilt series about the y axis has measured, 0 in the missing wedge around kz; (kz, 1, kx).

    Projections at tilt t fill the plane kz = kx tan(t); beyond the limit nothing is known. One bin of taper outside.
    """
    kz, _, kx = frequencies(shape, 1.0)
    beyond = np.abs(kz) - np.tan(np.radians(tilt_limit_degrees)) * kx
    return np.asarray(np.clip(1 - beyond * shape[0], 0, 1), np.float32)


def roll_off(shape: tuple[int, ...]) -> Volume:
    """The reconstruction's radial filter: 1 up to 0.35 cycles per voxel, then a Gaussian of 0.05; (kz, ky, kx).

    The values are IMOD's defaults for weighted back-projection: Kremer et al., J. Struct. Biol. 116 (1996) 71.
    """
    kz, ky, kx = frequencies(shape, 1.0)
    beyond = np.maximum(np.sqrt((kz * kz + ky * ky) + kx * kx) - np.float32(0.35), 0)
    return np.asarray(np.exp(-0.5 * (beyond / np.float32(0.05)) ** 2), np.float32)


def contrast_transfer(shape: tuple[int, ...], exposure: Exposure, settings: MotorPhantom) -> Volume:
    """Contrast transfer function times the envelope exp(-B k^2 / 4), positive at low frequency; (kz, ky, kx).

    Phases are not flipped: most deposited cellular tomograms are plain weighted back-projections, so fringes around
    gold and membranes belong to the picture. Frank, Three-Dimensional Electron Microscopy (2006), section 2.3.
    """
    kz, ky, kx = frequencies(shape, exposure.spacing_angstrom)
    squared = (kz * kz + ky * ky) + kx * kx
    defocus, aberration = exposure.defocus_micrometre * 1e4, settings.spherical_aberration_mm * 1e7
    phase = squared * np.float32(np.pi * WAVELENGTH * defocus)
    phase -= squared * squared * np.float32(0.5 * np.pi * WAVELENGTH**3 * aberration)
    phase += np.float32(np.arcsin(settings.amplitude_contrast))
    return np.asarray(np.sin(phase) * np.exp(squared * np.float32(-exposure.b_factor_angstrom2 / 4)), np.float32)


def shot_noise(exposure: Exposure, settings: MotorPhantom) -> float:
    """Standard deviation of one voxel's shot noise, in units of the density of protein.

    A voxel of protein changes the intensity by twice its phase shift, INTERACTION * potential * spacing; counting
    electrons blurs it by 1/sqrt(dose * spacing^2). A reconstruction needs the dose of one projection of equal
    resolution: Hegerl and Hoppe, Z. Naturforsch. 31a (1976) 1717.
    """
    spacing = exposure.spacing_angstrom
    electrons = exposure.dose_electrons_per_angstrom2 * spacing**2 * settings.quantum_efficiency
    return float(1 / np.sqrt(electrons) / (2 * INTERACTION * settings.protein_potential_volt * spacing))


def take_tomogram(
    density: Volume, exposure: Exposure, settings: MotorPhantom, rng: np.random.Generator
) -> tuple[Volume, Volume]:
    """Image a density map; returns signal and noise, both dense = positive and of the map's shape.

    The shot noise passes the same missing wedge as the signal but not the lens; the detector's noise is white.
    """
    shape = density.shape
    seen = wedge(shape, settings.tilt_limit_degrees) * roll_off(shape)
    deviation = shot_noise(exposure, settings)
    noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
    transfer = contrast_transfer(shape, exposure, settings)
    signal = scipy.fft.irfftn(scipy.fft.rfftn(density) * (transfer * seen), shape)
    noise = scipy.fft.irfftn(scipy.fft.rfftn(noise) * seen, shape)
    noise += rng.standard_normal(shape, dtype=np.float32) * np.float32(settings.detector_noise * deviation)
    return signal, noise


def to_grey_levels(image: Volume, settings: MotorPhantom, rng: np.random.Generator) -> np.ndarray:
    """Add the slow ramp of the ice's thickness, clip both tails and map to uint8 with dense = dark."""
    sample = image.ravel()[::7]
    slopes = rng.uniform(-1, 1, 2) * settings.intensity_ramp * float(sample.std())
    _, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape)
    image = image + (np.float32(slopes[0]) * y[:, None] + np.float32(slopes[1]) * x[None, :])
    low, high = np.percentile(image.ravel()[::7], (settings.clipped_percent, 100 - settings.clipped_percent))
    scaled = (np.float32(high) - image) * np.float32(255 / (high - low))
    return np.asarray(np.clip(scaled + 0.5, 0, 255), np.uint8)
