"""A patient's volume: Hounsfield units (or labels) on a grid, and where the grid lies in the patient.

Patient coordinates are mm in the order z, y, x: towards superior, posterior, left (DICOM's and ITK's LPS, reversed).
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
AIR_HU = -1024  # what lies outside the field of view is taken for air


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A volume and the affine map of its indices."""

    values: npt.NDArray[Any]  # [z, y, x]
    affine: Floats  # (4, 4): index z, y, x, 1 -> patient mm z, y, x, 1

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along z, y, x."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


def affine_of(origin_mm: Floats, directions: Floats, spacing_mm: Floats) -> Floats:
    """The map of a grid from the first voxel's centre (3,), unit directions of its axes (3 columns) and spacings (3,)."""
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    affine[:3, 3] = origin_mm
    return affine


def canonical(scan: Scan) -> Scan:
    """The same with axes ordered and turned so that z goes up, y back and x left, as nearly as whole turns allow.

    No voxel changes.
    """
    directions = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    order = best_axes(np.abs(directions))  # array axis that goes along patient z, y, x
    values, affine = scan.values.transpose(order), scan.affine.copy()
    affine[:, :3] = scan.affine[:, order]
    for axis in range(3):
        if affine[axis, axis] < 0:
            values = np.flip(values, axis)
            affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Scan(values, affine)


def best_axes(weights: Floats) -> list[int]:
    """For each patient axis (row) a different array axis (column), the sum of weights the largest."""
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    return list(max(orders, key=lambda order: sum(weights[row, axis] for row, axis in enumerate(order))))
