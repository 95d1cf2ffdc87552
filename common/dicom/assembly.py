"""A series as a volume of Hounsfield units on an even grid."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from common.dicom.headers import Header
from common.dicom.pixels import stored_values
from common.dicom.series import Finding, Series, base_step, normal_of, places_mm, shifts_mm
from common.scans import AIR_HU, Floats, Scan, affine_of

Values = npt.NDArray[Any]  # int16 or float32
REGRIDDED = ("missing_slices", "uneven_steps", "tilt", "shifted_slices")  # findings that need another grid
OUTSIDE = -32768  # what pixels outside the field of view hold until the scale is known
FEW = 4096  # voxels below which a histogram says nothing
SAMPLED = 10**6  # voxels that are looked at
SHIFT = 1024  # Hounsfield units by which scales are mistaken
AIR, TISSUE = (-1080, -920), (-160, 140)  # Hounsfield units of air; of fat, water and muscle
ENOUGH = 0.02  # of all voxels


def assemble(series: Series) -> tuple[Scan, list[Finding]]:
    """The volume of a series that is not refused, and what its numbers tell beside its headers.

    int16 where every slope and intercept is whole, else float32; padding and everything below is AIR_HU. Raises a data error
    where pixels are damaged.
    """
    assert series.status != "refused", f"Expected a series that is a volume, got {series.words}"
    headers = series.headers
    values: Values = np.stack([hounsfield(header) for header in headers])
    shift, findings = scale_of(values)
    kind = values.dtype.type
    values = np.maximum(values - kind(shift) if shift else values, kind(AIR_HU))
    first, place = headers[0], places_mm(headers)
    assert first.position_mm is not None and first.pixel_spacing_mm is not None
    spacing, origin = np.array(first.pixel_spacing_mm), np.array(first.position_mm)
    if any(finding.code in REGRIDDED for finding in series.findings):
        step = base_step(np.diff(place))
        values, corner = regridded(values, place, step, shifts_mm(headers) / spacing)
        origin = (
            origin + corner[0] * spacing[0] * np.array(first.along_y) + corner[1] * spacing[1] * np.array(first.along_x)
        )
    else:
        step = float((place[-1] - place[0]) / (len(place) - 1))
    directions = np.stack([normal_of(first), np.array(first.along_y), np.array(first.along_x)], 1)
    return Scan(values, affine_of(origin, directions, np.array([step, *spacing]))), findings


def hounsfield(header: Header) -> Values:
    """Hounsfield units (y, x) as slope and intercept say, padding OUTSIDE."""
    stored = stored_values(header)
    slope = 1.0 if header.slope is None else header.slope
    intercept = 0.0 if header.intercept is None else header.intercept
    units: Values
    if slope.is_integer() and intercept.is_integer():
        units = np.clip(stored * int(slope) + int(intercept), OUTSIDE + 1, 32767).astype(np.int16)
    else:
        units = (stored * np.float64(slope) + intercept).astype(np.float32)
    if header.padding is not None:
        units[stored == header.padding] = OUTSIDE
    return units


def scale_of(values: Values) -> tuple[int, list[Finding]]:
    """By how much the values lie too high (Hounsfield units), and what was found: air and soft tissue tell the scale.

    Numbers that were Hounsfield units before the intercept was applied have air near -2024; where it was not applied, near 24.
    """
    every = max(1, values.size // SAMPLED)
    sample = values.ravel()[::every]
    sample = sample[sample > OUTSIDE]
    if len(sample) < FEW or sample.min() == sample.max():
        words = "blank or tiny images: their numbers do not tell whether they are Hounsfield units"
        return 0, [Finding("units_unknown", "ok", words)]

    def evidence(shift: int) -> float:
        shares = [float(((sample >= low + shift) & (sample <= high + shift)).mean()) for low, high in (AIR, TISSUE)]
        return min(shares)

    found = {shift: evidence(shift) for shift in (0, -SHIFT, SHIFT)}
    best = max(found, key=lambda shift: found[shift])
    if best == 0 or found[best] < ENOUGH or found[0] >= ENOUGH:
        return 0, []
    if best < 0:
        words = f"air lies near {-1000 - SHIFT}: the numbers were Hounsfield units before the intercept; {SHIFT} added"
    else:
        words = f"air lies near {-1000 + SHIFT}: the intercept is missing; {SHIFT} taken away"
    return best, [Finding("units", "repaired", words)]


def regridded(values: Values, place: Floats, step: float, shift: Floats) -> tuple[Values, tuple[int, int]]:
    """Slices at places (n,) mm, moved in plane by (n, 2) pixels, on an even grid of a step; linear interpolation.

    Returns the volume, wide enough for all slices, and the pixel y, x of the first slice that its first pixel is.
    """
    low = np.floor(shift.min(0) + 1e-6).astype(int)
    room = np.ceil(shift.max(0) - 1e-6).astype(int) - low
    straight = values
    if np.abs(shift).max() > 1e-3:
        straight = np.full((len(values), values.shape[1] + room[0], values.shape[2] + room[1]), AIR_HU, values.dtype)
        for k, (image, own) in enumerate(zip(values, shift - low, strict=True)):
            canvas = np.pad(image.astype(np.float32), ((0, room[0]), (0, room[1])), constant_values=AIR_HU)
            moved = scipy.ndimage.shift(canvas, own, order=1, mode="constant", cval=AIR_HU)
            straight[k] = np.round(moved) if values.dtype == np.int16 else moved
    else:
        low = np.zeros(2, int)
    wanted = place[0] + step * np.arange(math.floor((place[-1] - place[0]) / step + 0.5) + 1)
    at = np.clip(np.interp(wanted, place, np.arange(len(place))), 0, len(place) - 1)
    below = np.minimum(at.astype(int), len(place) - 2)
    weight = (at - below).astype(np.float32)
    even = np.empty((len(wanted), *straight.shape[1:]), values.dtype)
    for k, (first, share) in enumerate(zip(below.tolist(), weight.tolist(), strict=True)):
        mixed = straight[first] * (1 - share) + straight[first + 1] * share
        even[k] = np.round(mixed) if values.dtype == np.int16 else mixed
    return even, (int(low[0]), int(low[1]))
