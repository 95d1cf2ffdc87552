"""A scan sampled straight onto the store's grid: one crop of fixed size and spacing about the lungs, no volume in between."""

import dataclasses

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from common.scans import AIR_HU, Scan, canonical

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
STRAIGHT = 1e-3  # sine of the angle up to which axes are taken as the patient's
COARSE_MM = 4.0  # at which body and lungs are looked for
BODY_HU, LUNG_HU = -300, -500
LEAST_LUNGS_ML = 400.0  # air inside a body from which on it is taken for lungs: half of a small adult's


@dataclasses.dataclass(frozen=True)
class Window:
    """Hounsfield units and the bytes that stand for them: linear between the ends, clipped beyond."""

    low: float
    high: float

    def to_bytes(self, units: npt.NDArray[np.floating]) -> Bytes:
        """Bytes 0..255, rounded."""
        scaled = (np.clip(units, self.low, self.high) - self.low) * (255 / (self.high - self.low))
        return np.asarray(scaled + 0.5).astype(np.uint8)

    def to_units(self, stored: Bytes) -> npt.NDArray[np.float32]:
        """Hounsfield units of bytes, right to half a step within the window."""
        return (self.low + stored.astype(np.float32) * ((self.high - self.low) / 255)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Centre:
    """The middle of what a crop is laid about."""

    mm: tuple[float, float, float]  # patient z, y, x
    of: str  # lungs, body or volume
    lungs_ml: float


def centre_of(scan: Scan) -> Centre:
    """The middle of the lungs' box; of the body's where no lungs are; of the volume where no body is."""
    step = [max(1, round(COARSE_MM / spacing)) for spacing in scan.spacing_mm]
    coarse = scan.values[:: step[0], :: step[1], :: step[2]]
    voxel_ml = float(np.abs(np.linalg.det(scan.affine[:3, :3])) * np.prod(step) / 1000)
    body = largest(coarse > BODY_HU)
    lungs = lungs_in(body, coarse)
    volume = lungs.sum() * voxel_ml
    for mask, of in ((lungs if volume >= LEAST_LUNGS_ML else np.zeros(0), "lungs"), (body, "body")):
        if mask.any():
            box = [np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis))) for axis in range(3)]
            middle = [(ends[0] + ends[-1]) / 2 * by for ends, by in zip(box, step, strict=True)]
            return Centre(place_of(scan, middle), of, volume)
    return Centre(place_of(scan, [(n - 1) / 2 for n in scan.values.shape]), "volume", volume)


def place_of(scan: Scan, index: list[float]) -> tuple[float, float, float]:
    """Patient mm of an index."""
    z, y, x = (scan.affine @ np.array([*index, 1.0]))[:3]
    return float(z), float(y), float(x)


def largest(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part of a mask; nothing where it is empty."""
    labels, count = scipy.ndimage.label(mask)
    if count == 0:
        return np.zeros(mask.shape, np.bool_)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax(), np.bool_)


def lungs_in(body: npt.NDArray[np.bool_], coarse: npt.NDArray[np.number]) -> npt.NDArray[np.bool_]:
    """Air that the body encloses, slice by slice."""
    filled = np.stack([scipy.ndimage.binary_fill_holes(plane) for plane in body]) if len(body) else body
    inside = filled & (coarse < LUNG_HU)
    return scipy.ndimage.binary_opening(inside) if inside.any() else inside


def crop(
    scan: Scan, centre_mm: tuple[float, float, float], shape: tuple[int, int, int], spacing_mm: float, window: Window
) -> Bytes:
    """Bytes [z, y, x] on a grid along the patient's axes about a centre, linearly interpolated; air outside the scan."""
    scan = canonical(scan)
    axes: list[Floats] = [
        np.asarray(place + (np.arange(number) - (number - 1) / 2) * spacing_mm, np.float64)
        for place, number in zip(centre_mm, shape, strict=True)
    ]
    directions = scan.affine[:3, :3] / np.array(scan.spacing_mm)
    if np.abs(directions - np.diag(np.diag(directions))).max() < STRAIGHT:
        index = [(wanted - scan.affine[axis, 3]) / scan.affine[axis, axis] for axis, wanted in enumerate(axes)]
        return along_axes(scan.values, index, window)
    return oblique(scan, axes, window)


def along_axes(values: npt.NDArray[np.number], index: list[Floats], window: Window) -> Bytes:
    """Linear interpolation at indices along each axis, source slice by source slice."""
    air = window.to_bytes(np.array([AIR_HU], np.float32))[0]
    found = np.full([len(own) for own in index], air, np.uint8)
    (first_z, weight_z, inside_z), rows, columns = (
        neighbours(own, n) for own, n in zip(index, values.shape, strict=True)
    )
    planes: dict[int, npt.NDArray[np.float32]] = {}

    def plane(z: int) -> npt.NDArray[np.float32]:
        if z not in planes:
            for old in [key for key in planes if key < z - 1]:
                del planes[old]
            planes[z] = in_plane(values[z], rows, columns)
        return planes[z]

    rows_inside, columns_inside = np.flatnonzero(rows[2]), np.flatnonzero(columns[2])
    if not len(rows_inside) or not len(columns_inside):
        return found
    place = np.ix_(rows_inside, columns_inside)
    for k in np.flatnonzero(inside_z).tolist():
        z, share = int(first_z[k]), np.float32(weight_z[k])
        mixed = plane(z) if share == 0 else plane(z) * (1 - share) + plane(z + 1) * share
        found[k][place] = window.to_bytes(mixed)
    return found


Neighbours = tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.bool_]]


def neighbours(index: Floats, number: int) -> Neighbours:
    """The lower neighbour, the upper one's share, and which indices lie within half a voxel of the first and last."""
    inside = (index > -0.5) & (index < number - 0.5)
    clipped = np.clip(index, 0, number - 1)
    lower = np.minimum(clipped.astype(np.int64), max(0, number - 2))
    return lower, clipped - lower, inside


def in_plane(image: npt.NDArray[np.number], rows: Neighbours, columns: Neighbours) -> npt.NDArray[np.float32]:
    """An image (y, x) interpolated at rows and columns that lie inside."""
    lower, share, inside = rows
    own, upper = lower[inside], np.minimum(lower[inside] + 1, image.shape[0] - 1)
    weight = share[inside].astype(np.float32)[:, None]
    mixed = image[own] * (1 - weight) + image[upper] * weight  # (rows, x)
    lower, share, inside = columns
    own, upper = lower[inside], np.minimum(lower[inside] + 1, image.shape[1] - 1)
    weight = share[inside].astype(np.float32)
    found: npt.NDArray[np.float32] = mixed[:, own] * (1 - weight) + mixed[:, upper] * weight
    return found.astype(np.float32, copy=False)


def oblique(scan: Scan, axes: list[Floats], window: Window) -> Bytes:
    """The same for scans whose axes are not the patient's, plane by plane."""
    inverse = np.linalg.inv(scan.affine)
    y, x = np.meshgrid(axes[1], axes[2], indexing="ij")
    planes = []
    for z in axes[0].tolist():
        places = np.stack([np.full(y.shape, z), y, x, np.ones(y.shape)])
        index = np.tensordot(inverse, places, 1)[:3]
        sampled = scipy.ndimage.map_coordinates(scan.values, index, np.float32, order=1, mode="constant", cval=AIR_HU)
        planes.append(window.to_bytes(sampled))
    return np.stack(planes)
