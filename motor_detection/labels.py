"""Labels: the original and the relabelled motor tables become tomograms with motors as float voxel indices."""

import ast
import collections
import csv
import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.volumes.opening import FILE_SUFFIXES
from common.volumes.slices import SLICE_SUFFIXES

NUM_FOLDS = 4  # of the relabelled table; the original one has no folds and gets as many
EXCLUDED_FOLD = -1
NO_MOTOR = -1.0  # on all three axes of a row
SMALLEST_SPACING, LARGEST_SPACING = 0.1, 1000.0  # angstrom per voxel: anything else is another unit
LARGEST_NUMBER = 1 << 20  # voxels along an axis, motors, folds
SHOWN_NAMES = 5  # of a long list; their number stands beside

ORIGINAL_MOTOR = ("Motor axis 0", "Motor axis 1", "Motor axis 2")  # z, y, x in voxels
ORIGINAL_SHAPE = ("Array shape (axis 0)", "Array shape (axis 1)", "Array shape (axis 2)")
ORIGINAL_COLUMNS = ("tomo_id", *ORIGINAL_MOTOR, *ORIGINAL_SHAPE, "Voxel spacing", "Number of motors")
RELABELLED_SHAPE = ("z_shape", "y_shape", "x_shape")
RELABELLED_COLUMNS = ("tomo_id", *RELABELLED_SHAPE, "voxel_spacing", "coordinates", "fold")

Rows = list[tuple[str, dict[str, str]]]  # "FILE line N: TOMO_ID" and the row's fields


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class LabelledTomogram:
    """One tomogram's truth: its motors are float voxel indices (n, 3) in z, y, x, where 0 is a legal coordinate."""

    tomo_id: str
    shape: tuple[int, int, int]
    spacing_angstrom: float
    motors: npt.NDArray[np.float64]  # (n, 3)
    fold: int  # EXCLUDED_FOLD: kept out of training and validation


def read_labels(path: Path) -> tuple[list[LabelledTomogram], list[str]]:
    """Tomograms in order of their id, and the table's contradictions in words.

    The table is the original train_labels.csv (one row per motor, voxels) or the relabelled one (one row per
    tomogram, fractions of the shape), told by its columns. Every defect is listed in one data error.
    """
    columns, rows = read_rows(path)
    problems: list[str] = []
    warnings: list[str] = []
    if set(RELABELLED_COLUMNS) <= set(columns):
        tomograms = relabelled_tomograms(rows, problems)
    elif set(ORIGINAL_COLUMNS) <= set(columns):
        tomograms = original_tomograms(rows, problems, warnings)
    else:
        expected = f"{', '.join(ORIGINAL_COLUMNS)}; or {', '.join(RELABELLED_COLUMNS)}"
        raise data_error(f"{path}: columns {', '.join(columns)} are no label table (expected {expected})")
    if problems:
        raise data_error(*problems)
    return sorted(tomograms, key=lambda tomogram: tomogram.tomo_id), warnings


def read_rows(path: Path) -> tuple[list[str], Rows]:
    """Column names, and each row's place in words with its fields; a table without rows is a data error."""
    if not path.is_file():
        raise data_error(f"{path}: no such file (expected train_labels.csv or RELABELED_DATA.csv)")
    rows: Rows = []
    problems = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            for values in reader:
                if values and len(values) != len(columns):
                    found = f"{len(values)} fields (expected {len(columns)})"
                    problems.append(f"{path} line {reader.line_num}: {found}: quote fields that hold commas")
                elif values:
                    row = dict(zip(columns, values, strict=True))
                    rows.append((f"{path} line {reader.line_num}", row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise data_error(f"{path}: not a readable CSV table ({error}): export it again as UTF-8") from error
    if "tomo_id" in columns:
        nameless = [where for where, row in rows if not row["tomo_id"]]
        problems += [f"{where}: 'tomo_id' is empty: correct the row or remove it" for where in nameless]
        rows = [(f"{where}: {row['tomo_id']}", row) for where, row in rows]
    if problems:
        raise data_error(*problems)
    if not rows:
        raise data_error(f"{path}: no rows (expected one per tomogram or motor): copy the table again")
    return columns, rows


def relabelled_tomograms(rows: Rows, problems: list[str]) -> list[LabelledTomogram]:
    """One tomogram per row; motors = fractions * shape, not truncated."""
    tomograms = []
    first_place: dict[str, str] = {}
    for where, row in rows:
        if row["tomo_id"] in first_place:
            problems.append(f"{where}: tomo_id stands already in {first_place[row['tomo_id']]}: keep one row")
            continue
        first_place[row["tomo_id"]] = where
        shape, spacing = shape_and_spacing(row, RELABELLED_SHAPE, "voxel_spacing", where, problems)
        motors = fractions(row["coordinates"], where, problems) * shape
        check_motors(motors, shape, "coordinates", where, problems)
        fold = whole_number(row, "fold", EXCLUDED_FOLD, where, problems)
        tomograms.append(LabelledTomogram(row["tomo_id"], shape, spacing, motors, fold))
    return tomograms


def original_tomograms(rows: Rows, problems: list[str], warnings: list[str]) -> list[LabelledTomogram]:
    """One tomogram per group of rows with the same id; folds are dealt out."""
    groups: dict[str, Rows] = collections.defaultdict(list)
    for where, row in rows:
        groups[row["tomo_id"]].append((where, row))
    tomograms = [original_tomogram(tomo_id, group, problems, warnings) for tomo_id, group in sorted(groups.items())]
    folds = deal_folds({tomogram.tomo_id: len(tomogram.motors) > 0 for tomogram in tomograms})
    return [dataclasses.replace(tomogram, fold=folds[tomogram.tomo_id]) for tomogram in tomograms]


def original_tomogram(tomo_id: str, group: Rows, problems: list[str], warnings: list[str]) -> LabelledTomogram:
    """The rows of one tomogram; its fold is still open."""
    where, first_row = group[0]
    shape, spacing = shape_and_spacing(first_row, ORIGINAL_SHAPE, "Voxel spacing", where, problems)
    motors = []
    claims = set()
    for place, row in group:
        for field in (*ORIGINAL_SHAPE, "Voxel spacing"):
            if row[field] != first_row[field]:
                found = f"{row[field]} (expected {first_row[field]} as in {where})"
                problems.append(f"{place}: '{field}' is {found}: give a tomogram one shape and one spacing")
        motor = [number(row, field, place, problems) for field in ORIGINAL_MOTOR]
        if motor.count(NO_MOTOR) in (1, 2):
            problems.append(f"{place}: Motor axis 0-2 are {motor}: give all three, or -1 on all three for no motor")
        elif NO_MOTOR not in motor:
            motors.append(motor)
        claims.add(whole_number(row, "Number of motors", 0, place, problems))
    located = np.array(motors, np.float64).reshape(-1, 3)
    check_motors(located, shape, "Motor axis 0-2", where, problems)
    if len(group) - len(motors) > 1:
        problems.append(f"{where}: {len(group) - len(motors)} rows without a motor (expected at most 1): keep one row")
    if motors and len(group) > len(motors):
        warnings.append(f"{where}: a row without a motor stands beside {len(motors)} with one; the motors are kept")
    if claims != {len(motors)}:
        claimed = " and ".join(str(claim) for claim in sorted(claims))
        warnings.append(f"{where}: 'Number of motors' says {claimed}, the rows list {len(motors)}; the rows are kept")
    return LabelledTomogram(tomo_id, shape, spacing, located, EXCLUDED_FOLD)


def deal_folds(has_motor: dict[str, bool]) -> dict[str, int]:
    """Folds for tomograms by id: equal shares of those with and those without motors, in the order of a hash.

    The order of the table does not matter; sizes differ by at most one, in all and among those with motors.
    """
    dealt = sorted(has_motor, key=lambda tomo_id: (has_motor[tomo_id], hashlib.sha256(tomo_id.encode()).hexdigest()))
    return {tomo_id: position % NUM_FOLDS for position, tomo_id in enumerate(dealt)}


def number(row: dict[str, str], field: str, where: str, problems: list[str]) -> float:
    """A finite number; anything else is noted as a problem and read as NaN."""
    try:
        value = float(row[field])
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    problems.append(f"{where}: '{field}' is '{row[field]}' (expected a finite number): correct the row or remove it")
    return math.nan


def whole_number(row: dict[str, str], field: str, smallest: int, where: str, problems: list[str]) -> int:
    """A whole number from `smallest` on; anything else is noted as a problem and read as `smallest - 1`."""
    value = number(row, field, where, problems)
    if math.isnan(value):
        return smallest - 1
    if not smallest <= value <= LARGEST_NUMBER or value != int(value):
        expected = f"a whole number from {smallest} to {LARGEST_NUMBER}"
        problems.append(f"{where}: '{field}' is '{row[field]}' (expected {expected}): correct the row or remove it")
        return smallest - 1
    return int(value)


def shape_and_spacing(
    row: dict[str, str], shape_fields: tuple[str, str, str], spacing_field: str, where: str, problems: list[str]
) -> tuple[tuple[int, int, int], float]:
    """Voxels along z, y, x (0 where noted as a problem) and angstrom per voxel."""
    z, y, x = (whole_number(row, field, 1, where, problems) for field in shape_fields)
    spacing = number(row, spacing_field, where, problems)
    if not math.isnan(spacing) and not SMALLEST_SPACING <= spacing <= LARGEST_SPACING:
        expected = f"expected {SMALLEST_SPACING:g} to {LARGEST_SPACING:g}"
        problems.append(f"{where}: '{spacing_field}' is {spacing:g} angstrom ({expected}): take it from the microscope")
    return (z, y, x), spacing


def fractions(text: str, where: str, problems: list[str]) -> npt.NDArray[np.float64]:
    """(n, 3) fractions z, y, x from the text of a list; malformed text is noted as a problem and read as no motor."""
    try:
        rows = np.array([[float(value) for value in point] for point in ast.literal_eval(text)], np.float64)
        rows = rows.reshape(-1, 3) if rows.size == 0 else rows
        if rows.ndim == 2 and rows.shape[1] == 3 and np.isfinite(rows).all():
            return rows
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError):
        pass  # reported below, like text of the wrong shape
    expected = "[] or a list of finite fractions (z, y, x) like [(0.5, 0.25, 0.75)]"
    problems.append(f"{where}: 'coordinates' is {text[:80]!r} (expected {expected}): correct the row")
    return np.empty((0, 3))


def check_motors(
    motors: npt.NDArray[np.float64], shape: tuple[int, int, int], field: str, where: str, problems: list[str]
) -> None:
    """Note motors outside the volume (voxels reach half a voxel beyond their centres) and motors that stand twice."""
    if 0 in shape:
        return  # its problem is noted; every motor would seem to lie outside
    outside = ((motors < -0.5) | (motors > np.array(shape) - 0.5)).any(axis=1)
    for motor in motors[outside].tolist():
        found = f"{field} z, y, x = {motor} lies outside the volume of shape {shape}"
        problems.append(f"{where}: {found}: check the axis order and the units (voxels or fractions)")
    for motor, times in collections.Counter(tuple(motor) for motor in motors.tolist()).items():
        if times > 1:
            problems.append(f"{where}: {field} z, y, x = {list(motor)} stands {times} times: keep one")


def match_tomograms(tomograms: list[LabelledTomogram], root: Path) -> tuple[dict[str, Path], list[str]]:
    """Each labelled tomogram's volume, root/TOMO_ID/ or root/TOMO_ID.npy|mrc|rec|map, and warnings in words.

    A tomogram without a volume, or with two, is a data error; excluded tomograms may be absent. Volumes without a
    label are left out with a warning.
    """
    expected = f"folders TOMO_ID/ with {'/'.join(SLICE_SUFFIXES)} slices, or files TOMO_ID{'|'.join(FILE_SUFFIXES)}"
    remedy = "See motor_detection/README.md#data"
    if not root.is_dir():
        raise config_error(f"data.root: no folder {root} (expected {expected}). {remedy}")
    found: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sorted(root.iterdir()):
        if not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() in FILE_SUFFIXES):
            found[path.name if path.is_dir() else path.stem].append(path)
    if not found:
        raise data_error(f"data.root: no tomograms in {root} (expected {expected}). {remedy}")
    labelled = {tomogram.tomo_id: tomogram.fold for tomogram in tomograms}
    missing = [tomo_id for tomo_id in labelled if tomo_id not in found]
    needed = [tomo_id for tomo_id in missing if labelled[tomo_id] != EXCLUDED_FOLD]
    problems = []
    if needed:
        there = f"{len(found)} volumes are there: {few(sorted(found))}"
        problems.append(f"data.root: {len(needed)} labelled tomograms not in {root}: {few(needed)} ({there}). {remedy}")
    for tomo_id, paths in sorted(found.items()):
        if tomo_id in labelled and len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            problems.append(f"data.root: {tomo_id} is in {root} {len(paths)} times ({names}): keep one")
    if problems:
        raise data_error(*problems)
    warnings = []
    if missing:
        warnings.append(f"{root}: {len(missing)} tomograms excluded by fold -1 are absent: {few(missing)}")
    unlabelled = sorted(set(found) - set(labelled))
    if unlabelled:
        warnings.append(f"{root}: {len(unlabelled)} volumes without a label are left out: {few(unlabelled)}")
    return {tomo_id: found[tomo_id][0] for tomo_id in labelled if tomo_id in found}, warnings


def few(names: list[str]) -> str:
    """The first names of a list, and dots where more follow."""
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
