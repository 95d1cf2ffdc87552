"""Predicted particle positions in memory and as CSV: every pick of every tomogram, or a BYU 2025 submission.

In memory a position is [z, y, x] in voxels with voxel centres at integers, so voxel 0 is the first one. The formats of
other programs have their own order, origin and unit; the conversion stands in star_files.py (RELION), dynamo_files.py
and copick_files.py and nowhere else.
"""

import collections
import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np

from common.errors import UserError, config_error, data_error
from common.files import parsing, read_text, write_text

TOMO_ID = re.compile(r"[A-Za-z0-9][^\s/\\,\"'#]*")  # safe as a CSV cell, a STAR token and a folder name
RESERVED = ("data_", "loop_", "save_", "global_", "stop_")  # words of the STAR format, in any case
OUTSIDE_TOLERANCE_VOXEL = 1e-3  # what a conversion may add to a position on the very edge
AXES = ("z", "y", "x")
PICKS_COLUMNS = (
    "tomo_id",
    *AXES,
    *(f"{axis}_angstrom" for axis in AXES),
    "score",
    *(f"{axis}_shape" for axis in AXES),
    *(f"{axis}_spacing_angstrom" for axis in AXES),
)
SUBMISSION_COLUMNS = ("tomo_id", "Motor axis 0", "Motor axis 1", "Motor axis 2")
NO_MOTOR = -1  # on any axis of a submission: the tomogram has no motor


@dataclasses.dataclass(frozen=True)
class VolumeGrid:
    """The voxel grid of a tomogram: shape (z, y, x) in voxels and spacing (z, y, x) in angstrom."""

    shape: tuple[int, int, int]
    spacing_angstrom: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class TomogramPicks:
    """The particles found in one tomogram, best first.

    shape and spacing_angstrom: (z, y, x) in voxels and angstrom. points: float64 (n, 3), z, y, x voxel index, voxel
    centres at integers, so a voxel covers index - 0.5 to index + 0.5. scores: float64 (n,) in [0, 1], descending.
    Raises a data error for a NaN, a score outside [0, 1], scores not descending or a point outside the volume.
    """

    tomo_id: str
    shape: tuple[int, int, int]
    spacing_angstrom: tuple[float, float, float]
    points: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.scores)
        assert self.points.shape == (count, 3), f"Expected points {(count, 3)}, got {self.points.shape}"
        assert self.scores.shape == (count,), f"Expected scores {(count,)}, got {self.scores.shape}"
        assert self.points.dtype == self.scores.dtype == np.float64, f"Expected float64, got {self.points.dtype}"
        problems = [f"{self.tomo_id!r}: {problem}" for problem in self._problems()]
        if problems:
            raise data_error(*problems)

    def _problems(self) -> list[str]:
        problems = []
        if not can_be_written(self.tomo_id):
            problems.append(
                "a tomogram's name must start with a letter or digit and hold no space, quote, comma or /; "
                f"{', '.join(RESERVED)} are words of the STAR format"
            )
        if not all(size >= 1 for size in self.shape):
            problems.append(f"expected a shape (z, y, x) of at least one voxel, got {self.shape}")
        if not all(np.isfinite(spacing) and spacing > 0 for spacing in self.spacing_angstrom):
            problems.append(f"expected a voxel spacing above 0 angstrom, got {self.spacing_angstrom}")
        if not np.all((self.scores >= 0) & (self.scores <= 1)):  # also finds NaN
            problems.append("expected every score in [0, 1]; calibrate the scores before writing them")
        elif np.any(np.diff(self.scores) > 0):
            problems.append("expected the scores in descending order")
        lowest = -0.5 - OUTSIDE_TOLERANCE_VOXEL
        inside = (self.points >= lowest) & (self.points <= np.array(self.shape) - 1 - lowest)  # (n, 3)
        if not inside.all():
            first = self.points[~inside.all(axis=1)][0].tolist()
            problems.append(f"point {first} (z, y, x) lies outside {self.shape}: is the axis order or spacing wrong?")
        return problems


def can_be_written(tomo_id: str) -> bool:
    """Whether a tomogram's name can stand in every format: text without spaces and quotes, no word of the STAR format."""
    is_text = tomo_id.isprintable() and all(not "\ud800" <= letter <= "\udfff" for letter in tomo_id)
    return TOMO_ID.fullmatch(tomo_id) is not None and not tomo_id.lower().startswith(RESERVED) and is_text


def grids_of(picks: list[TomogramPicks]) -> dict[str, VolumeGrid]:
    """The voxel grid of every tomogram by name: what the readers of formats without shape and spacing ask for."""
    return {tomogram.tomo_id: VolumeGrid(tomogram.shape, tomogram.spacing_angstrom) for tomogram in picks}


def picks_by_tomogram(
    path: Path, tomo_ids: list[str], points: np.ndarray, scores: np.ndarray, grids: dict[str, VolumeGrid]
) -> list[TomogramPicks]:
    """Sort rows into tomograms, best first, one entry for each grid in its order, empty ones included.

    tomo_ids: n names; points: (n, 3) z, y, x voxels; scores: (n,). Raises a data error naming `path` for a tomogram
    without a grid and for picks that TomogramPicks refuses.
    """
    rows: dict[str, list[int]] = {tomo_id: [] for tomo_id in grids}
    for row, tomo_id in enumerate(tomo_ids):
        if tomo_id not in rows:
            raise data_error(f"{path}: tomogram {tomo_id!r} is not among the {len(grids)} known tomograms")
        rows[tomo_id].append(row)
    picks = []
    for tomo_id, grid in grids.items():
        chosen = np.array(rows[tomo_id], dtype=np.int64)
        order = chosen[np.argsort(-scores[chosen], kind="stable")]
        try:
            picks.append(TomogramPicks(tomo_id, grid.shape, grid.spacing_angstrom, points[order], scores[order]))
        except UserError as error:
            raise data_error(*(f"{path}: {problem}" for problem in error.problems)) from error
    return picks


def write_picks_csv(path: Path, picks: list[TomogramPicks]) -> None:
    """Write all picks to one CSV file, one row per pick, exact to the last bit.

    z, y, x: voxel index; *_angstrom: distance from the centre of the first voxel; *_shape in voxels. A tomogram without
    picks is one row whose position and score are empty.
    """
    check_unique(path, picks)
    rows: list[list[str]] = [list(PICKS_COLUMNS)]
    for tomogram in picks:
        grid = [*map(str, tomogram.shape), *map(number_text, tomogram.spacing_angstrom)]
        if len(tomogram.scores) == 0:
            rows.append([tomogram.tomo_id, *[""] * 7, *grid])
        for point, score in zip(tomogram.points, tomogram.scores, strict=True):
            position = [*point, *(point * np.array(tomogram.spacing_angstrom)), score]
            rows.append([tomogram.tomo_id, *map(number_text, position), *grid])
    write_text(path, _csv_text(rows))


def read_picks_csv(path: Path) -> list[TomogramPicks]:
    """Read what write_picks_csv wrote, in the file's order of tomograms; the angstrom columns must agree."""
    rows = _csv_rows(path, PICKS_COLUMNS)
    grids: dict[str, VolumeGrid] = {}
    positions: list[list[float]] = []
    tomo_ids: list[str] = []
    for line, row in rows:
        sizes = numbers_of(path, line, [row[f"{axis}_shape"] for axis in AXES])
        if not all(size.is_integer() for size in sizes):
            raise data_error(f"{path}:{line}: expected a shape in whole voxels, got {sizes}")
        spacing = numbers_of(path, line, [row[f"{axis}_spacing_angstrom"] for axis in AXES])
        grid = VolumeGrid((int(sizes[0]), int(sizes[1]), int(sizes[2])), (spacing[0], spacing[1], spacing[2]))
        if grids.setdefault(row["tomo_id"], grid) != grid:
            raise data_error(f"{path}:{line}: shape or spacing differs from the tomogram's first row")
        position = [row[column] for column in PICKS_COLUMNS[1:8]]
        if any(position):
            positions.append(numbers_of(path, line, position))
            tomo_ids.append(row["tomo_id"])
            voxels, angstrom = np.array(positions[-1][:3]), np.array(positions[-1][3:6])
            if np.any(np.abs(voxels * spacing - angstrom) > OUTSIDE_TOLERANCE_VOXEL * np.abs(spacing)):
                raise data_error(f"{path}:{line}: position in voxels and in angstrom differ; correct or delete one")
    table = np.array(positions, dtype=np.float64).reshape(-1, 7)  # (n, 7)
    return picks_by_tomogram(path, tomo_ids, table[:, :3], table[:, 6], grids)


def write_submission_csv(path: Path, picks: list[TomogramPicks], threshold: float) -> None:
    """Write a BYU 2025 submission: one row per tomogram, its best pick or -1, -1, -1 below the threshold.

    Motor axis 0, 1, 2 are z, y, x in voxels (the competition's sample_submission.csv). A score equal to the threshold
    counts. Raises a config error for a threshold outside [0, 1].
    """
    check_unique(path, picks)
    if not 0 <= threshold <= 1:
        raise config_error(f"threshold: expected a number in [0, 1], got {threshold}")
    rows: list[list[str]] = [list(SUBMISSION_COLUMNS)]
    for tomogram in picks:
        found = len(tomogram.scores) > 0 and tomogram.scores[0] >= threshold
        position = list(map(number_text, tomogram.points[0])) if found else [str(NO_MOTOR)] * 3
        rows.append([tomogram.tomo_id, *position])
    write_text(path, _csv_text(rows))


def read_submission_csv(path: Path) -> dict[str, np.ndarray | None]:
    """Position by tomogram, float64 (3,) z, y, x in voxels, or None where any axis is -1 (the competition's rule)."""
    positions: dict[str, np.ndarray | None] = {}
    for line, row in _csv_rows(path, SUBMISSION_COLUMNS):
        if row["tomo_id"] in positions:
            raise data_error(f"{path}:{line}: second row of {row['tomo_id']!r}; expected one row per tomogram")
        position = np.array(numbers_of(path, line, [row[column] for column in SUBMISSION_COLUMNS[1:]]))
        positions[row["tomo_id"]] = None if np.any(position == NO_MOTOR) else position
    return positions


def check_unique(path: Path, picks: list[TomogramPicks]) -> None:
    """Raise a config error where a tomogram comes twice: its rows could not be told apart."""
    times = collections.Counter(tomogram.tomo_id for tomogram in picks)
    twice = sorted(name for name, count in times.items() if count > 1)
    if twice:
        raise config_error(f"{path}: tomograms given twice: {', '.join(twice)}; merge their picks first")


def number_text(value: float) -> str:
    """The shortest text that reads back as exactly this float64."""
    return repr(float(value))


def numbers_of(path: Path, line: int, words: list[str]) -> list[float]:
    """The words of one line as finite numbers, or a data error with file and line."""
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError as error:
            raise data_error(f"{path}:{line}: expected a number, got {word!r}") from error
        if not math.isfinite(numbers[-1]):
            raise data_error(f"{path}:{line}: expected a finite number, got {word!r}")
    return numbers


def _csv_text(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _csv_rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells by column name of every row; a data error for a missing column or a ragged row."""
    with parsing(path, "delete it; the same predict.py call picks it again"):
        rows = list(csv.reader(io.StringIO(read_text(path))))
    header = rows[0] if rows else []
    missing = [column for column in columns if column not in header]
    if missing:
        raise data_error(f"{path}: missing columns {missing}; expected {list(columns)}")
    numbered = [(line, row) for line, row in enumerate(rows[1:], start=2) if row]
    for line, row in numbered:
        if len(row) != len(header):
            raise data_error(f"{path}:{line}: expected {len(header)} cells, got {len(row)}")
    return [(line, dict(zip(header, row, strict=True))) for line, row in numbered]
