"""Picks as a Dynamo table (.tbl) with its table map (.doc) from tomogram number to name."""

from pathlib import Path

import numpy as np

from common.errors import data_error
from common.files import read_text, write_text
from motor_detection.pick_files import (
    TomogramPicks,
    VolumeGrid,
    check_unique,
    number_text,
    numbers_of,
    picks_by_tomogram,
)

DYNAMO_COLUMNS = 26  # up to x, y, z; Dynamo's own later columns (27-42) are optional


def write_dynamo_table(path: Path, picks: list[TomogramPicks]) -> None:
    """Write a Dynamo table (.tbl) and beside it the table map (.doc) from tomogram number to name.

    One row per pick, 26 columns: 1 tag (1, 2, ...), 2 aligned = 1, 3 averaged = 0, 10 cc = score, 13 ftype = 0 (tilt
    range unknown), 20 tomogram number, 22 class = 1, 24-26 x, y, z in voxels; shifts (4-6) and Euler angles (7-9) are 0
    (wiki.dynamo.biozentrum.unibas.ch, "Table convention"). Dynamo counts voxels from 1 as MATLAB does (same wiki,
    "Volume center"; RELION's dynamo_particle.cpp also subtracts 1): column = index + 1. The map has one line per
    tomogram, number and name with a tab between; replace the names by file names to let Dynamo crop from them.
    """
    check_unique(path, picks)
    rows: list[str] = []
    for number, tomogram in enumerate(picks, start=1):
        for point, score in zip(tomogram.points, tomogram.scores, strict=True):
            x, y, z = (number_text(value) for value in point[::-1] + 1)
            head = f"{len(rows) + 1} 1 0 0 0 0 0 0 0 {number_text(score)} 0 0 0 0 0 0 0 0 0"
            rows.append(f"{head} {number} 0 1 0 {x} {y} {z}\n")
    names = [f"{number}\t{tomogram.tomo_id}\n" for number, tomogram in enumerate(picks, start=1)]
    write_text(path.with_suffix(".doc"), "".join(names))
    write_text(path, "".join(rows))


def read_dynamo_rows(path: Path) -> np.ndarray:
    """Any Dynamo table as numbers: float64 (n, columns), at least 26 columns, the same in every row."""
    rows = [numbers_of(path, line, text.split()) for line, text in enumerate(read_text(path).splitlines(), start=1)]
    rows = [row for row in rows if row]
    widths = {len(row) for row in rows}
    if len(widths) > 1 or any(width < DYNAMO_COLUMNS for width in widths):
        raise data_error(f"{path}: expected {DYNAMO_COLUMNS} or more columns in every row, got {sorted(widths)}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else DYNAMO_COLUMNS)


def read_dynamo_table(path: Path, grids: dict[str, VolumeGrid]) -> list[TomogramPicks]:
    """Read a Dynamo table with its map (.doc); a particle's position is column 24-26 plus its shift, column 4-6."""
    table = read_dynamo_rows(path)
    names: dict[int, str] = {}
    for line, text in enumerate(read_text(path.with_suffix(".doc")).splitlines(), start=1):
        words = text.split(maxsplit=1)
        if len(words) != 2:
            raise data_error(
                f"{path.with_suffix('.doc')}:{line}: expected a tomogram number and its name, got {text!r}"
            )
        names[int(numbers_of(path.with_suffix(".doc"), line, words[:1])[0])] = words[1].strip()
    unknown = sorted({int(number) for number in table[:, 19]} - set(names))
    if unknown:
        raise data_error(f"{path}: tomogram numbers {unknown} are missing from {path.with_suffix('.doc')}")
    points = (table[:, 23:26] + table[:, 3:6] - 1)[:, ::-1]  # (n, 3), x, y, z from 1 -> z, y, x from 0
    return picks_by_tomogram(path, [names[int(number)] for number in table[:, 19]], points, table[:, 9], grids)
