"""Where training patches are cut out of a tomogram, and the file of each."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.errors import data_error
from common.files import parsing, write_atomically
from common.streams import random_for
from motor_detection.config import Convert
from motor_detection.labels import LabelledTomogram

PatchType = Literal["single", "multi", "hard_negative", "negative"]
MARGIN = 16  # voxels that a wanted motor keeps from the patch's faces, where the volume allows it
PATCH_ARRAYS: dict[str, tuple[np.dtype[Any], int]] = {  # dtype and number of axes
    "patch": (np.dtype(np.uint8), 3),
    "heatmap": (np.dtype(np.float32), 3),
    "patch_type": (np.dtype(np.str_), 0),
    "motors": (np.dtype(np.float32), 2),
    "origin": (np.dtype(np.int32), 1),
    "spacing_angstrom": (np.dtype(np.float32), 1),
    "intensity": (np.dtype(np.float32), 1),
    "tomo_id": (np.dtype(np.str_), 0),
}
TRIES = 50  # random origins tried before a wanted patch is given up


@dataclasses.dataclass(frozen=True)
class PatchPlan:
    """One patch to cut: its place in the tomogram (may reach beyond its end) and why it was chosen."""

    patch_type: PatchType
    origin: tuple[int, int, int]


def plan_patches(tomogram: LabelledTomogram, shape: tuple[int, int, int], settings: Convert) -> list[PatchPlan]:
    """All patches of one tomogram: a pure function of its labels, the counts and the seed.

    A wanted patch that has no place (no pair fits, no room beside a motor) is left out.
    """
    random = random_for(f"patches of {tomogram.tomo_id}", settings.seed)
    size = np.array(settings.patch_size)
    room = np.maximum(np.array(shape) - size, 0)  # largest origin
    motors = tomogram.motors
    plans: list[PatchPlan | None] = []
    for motor in motors:
        for _ in range(_round(settings.single, random)):
            plans.append(_around("single", motor[None], size, room, random))
        for _ in range(_round(settings.hard_negative, random)):
            plans.append(_beside(motor, motors, size, room, random))
    for first, second in _pairs(motors):
        fits = (np.abs(first - second) < size - 2 * MARGIN).all()
        for _ in range(_round(settings.multi, random) if fits else 0):
            plans.append(_around("multi", np.stack([first, second]), size, room, random))
    for _ in range(_round(settings.negative, random)):
        plans.append(_anywhere(motors, size, room, random))
    return [plan for plan in plans if plan is not None]


def _round(count: float, random: np.random.Generator) -> int:
    """A fractional count is rounded up with the probability of its fraction."""
    return int(count) + int(random.random() < count - int(count))


def _pairs(motors: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(len(motors)):
        for j in range(i):
            yield motors[j], motors[i]


def _around(
    kind: PatchType, wanted: np.ndarray, size: np.ndarray, room: np.ndarray, random: np.random.Generator
) -> PatchPlan:
    """A random origin whose patch holds all wanted motors, a margin from its faces unless the volume's face is nearer."""
    low = np.ceil(wanted.max(axis=0) + MARGIN - size + 1)
    high = np.floor(wanted.min(axis=0) - MARGIN)
    low, high = np.clip(low, 0, room), np.clip(high, 0, room)
    origin = random.integers(low.astype(int), np.maximum(low, high).astype(int) + 1)
    return PatchPlan(kind, _triple(origin))


def _holds(motors: np.ndarray, origin: np.ndarray, size: np.ndarray) -> bool:
    return bool(((motors >= origin - MARGIN) & (motors <= origin + size - 1 + MARGIN)).all(axis=1).any())


def _beside(
    motor: np.ndarray, motors: np.ndarray, size: np.ndarray, room: np.ndarray, random: np.random.Generator
) -> PatchPlan | None:
    """A patch that ends 0.1 to 0.3 of its size before a motor on one axis: the motor's neighbourhood without it."""
    for _ in range(TRIES):
        origin = random.integers(
            np.clip(np.ceil(motor - size + 1), 0, room).astype(int), np.clip(motor, 0, room).astype(int) + 1
        )
        axis = int(random.integers(3))
        gap = max(random.uniform(0.1, 0.3) * size[axis], MARGIN + 1)
        before = random.random() < 0.5
        origin[axis] = round(motor[axis] - gap - size[axis] if before else motor[axis] + gap)
        if (origin >= 0).all() and (origin <= room).all() and not _holds(motors, origin, size):
            return PatchPlan("hard_negative", _triple(origin))
    return None


def _anywhere(motors: np.ndarray, size: np.ndarray, room: np.ndarray, random: np.random.Generator) -> PatchPlan | None:
    for _ in range(TRIES):
        origin = random.integers(0, room + 1)
        if not _holds(motors, origin, size):
            return PatchPlan("negative", _triple(origin))
    return None


def _triple(origin: np.ndarray) -> tuple[int, int, int]:
    return int(origin[0]), int(origin[1]), int(origin[2])


def cut_patch(
    bytes_of: "ByteVolume", plan: PatchPlan, tomogram: LabelledTomogram, size: tuple[int, int, int]
) -> dict[str, Any]:
    """The arrays of one patch file; beyond the tomogram's end a patch is filled with the tomogram's mean."""
    shape = bytes_of.voxels.shape
    inside = tuple(slice(o, min(o + s, n)) for o, s, n in zip(plan.origin, size, shape, strict=True))
    patch = np.full(size, round(bytes_of.mean), np.uint8)
    cut = bytes_of.voxels[inside]
    patch[tuple(slice(0, n) for n in cut.shape)] = cut
    motors = tomogram.motors - np.array(plan.origin)
    near = ((motors > -np.array(size)) & (motors < 2 * np.array(size))).all(axis=1)  # tails may reach in from outside
    return {
        "patch": patch,
        "patch_type": np.array(plan.patch_type),
        "motors": motors[near].astype(np.float32),
        "origin": np.array(plan.origin, np.int32),
        "spacing_angstrom": np.array(bytes_of.spacing_angstrom, np.float32),
        "intensity": np.array([bytes_of.mean, bytes_of.deviation], np.float32),
        "tomo_id": np.array(tomogram.tomo_id),
    }


@dataclasses.dataclass(frozen=True)
class ByteVolume:
    """A tomogram in memory as bytes, with the mean and standard deviation that normalise it."""

    voxels: np.ndarray  # uint8 [z, y, x]
    spacing_angstrom: tuple[float, float, float]
    mean: float
    deviation: float


def write_patch(path: Path, arrays: dict[str, Any]) -> None:
    """Write one patch file (.npz, uncompressed) atomically."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_patch(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some arrays of one patch file (of PATCH_ARRAYS); a data error (exit code 1) names a file that is not one."""
    with parsing(path, "delete it and run convert.py again"), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in names}
    for name, array in arrays.items():
        dtype, axes = PATCH_ARRAYS[name]
        fits = array.dtype.kind == "U" if dtype.kind == "U" else array.dtype == dtype
        if not fits or array.ndim != axes:
            found = f"{name} is {array.ndim}D {array.dtype} (expected {axes}D {dtype})"
            raise data_error(f"{path}: {found}; delete it and run convert.py again")
    return arrays
