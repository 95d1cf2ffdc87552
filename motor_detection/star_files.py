"""Picks as RELION STAR files, pixel coordinates of RELION 4 or centred angstrom of RELION 5, each with its score."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from common.errors import config_error, data_error
from common.files import read_text, write_text
from motor_detection.pick_files import (
    TomogramPicks,
    VolumeGrid,
    check_unique,
    number_text,
    picks_by_tomogram,
)

STAR_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
STAR_TOKEN = re.compile(r"'[^']*'(?=\s|$)|\"[^\"]*\"(?=\s|$)|\S+")
PIXEL_COLUMNS = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ")
CENTRED_COLUMNS = ("rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst")
ORIGIN_COLUMNS = ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst")
PIXEL_SIZE_COLUMN = "rlnTomoTiltSeriesPixelSize"
SCORE_COLUMN = "rlnAutopickFigureOfMerit"


def write_relion_star(
    path: Path,
    picks: list[TomogramPicks],
    style: Literal["relion4", "relion5"],
    pixel_size_angstrom: dict[str, float],
) -> None:
    """Write all picks as one table `particles` with rlnTomoName, position and rlnAutopickFigureOfMerit (the score).

    relion4: rlnCoordinateX/Y/Z = voxel index * spacing / pixel_size_angstrom, in unbinned pixels of the tilt series,
    the first voxel's centre at 0 (RELION's RealSpaceBackprojection puts voxel i at coordinate i * binning);
    pixel_size_angstrom holds that pixel's size by tomogram name and is repeated in rlnTomoTiltSeriesPixelSize.
    relion5: rlnCenteredCoordinateX/Y/ZAngst = (voxel index - size / 2) * spacing, the centre RELION extracts with
    (tomogram_set.cpp, particle_set.cpp: size / 2.0 for even and odd sizes; its napari picker subtracts one unbinned
    pixel less, github.com/3dem/relion/issues/1137); pixel_size_angstrom is not read.
    There is no optics table on purpose: RELION 4 imports the first table of the file, and RELION 5 fills in voltage and
    aberrations from the tomogram set only if that table is absent. Tomograms without picks leave no row.
    Raises a config error for an unknown style or a missing pixel size.
    """
    check_unique(path, picks)
    if style not in ("relion4", "relion5"):
        raise config_error(f"style: expected relion4 or relion5, got {style!r}")
    rows: list[list[str]] = []
    for tomogram in picks:
        spacing = np.array(tomogram.spacing_angstrom)
        tail: list[str] = []
        if style == "relion4":
            size = _pixel_size(path, tomogram.tomo_id, pixel_size_angstrom)
            positions = tomogram.points * spacing / size  # (n, 3) z, y, x in unbinned pixels
            tail = [number_text(size)]
        else:
            positions = (tomogram.points - np.array(tomogram.shape) / 2) * spacing  # (n, 3) z, y, x in angstrom
        for (z, y, x), score in zip(positions, tomogram.scores, strict=True):
            rows.append([tomogram.tomo_id, *map(number_text, (x, y, z)), *tail, number_text(score)])
    columns = (*PIXEL_COLUMNS, PIXEL_SIZE_COLUMN) if style == "relion4" else CENTRED_COLUMNS
    write_text(path, _star_text("particles", ("rlnTomoName", *columns, SCORE_COLUMN), rows))


def read_relion_star(
    path: Path,
    grids: dict[str, VolumeGrid],
    pixel_size_angstrom: dict[str, float] | None,
    missing_score: float | None,
) -> list[TomogramPicks]:
    """Read the particles of a RELION 4 or 5 STAR file onto the voxel grids of their tomograms.

    Centred angstrom coordinates are preferred where both kinds are present, as RELION does. pixel_size_angstrom is the
    pixel of rlnCoordinateX/Y/Z by tomogram name; None takes rlnTomoTiltSeriesPixelSize of the particle or of its optics
    group (Warp counts in its export pixel instead: pass rlnImagePixelSize). missing_score is given to every pick of a
    file without rlnAutopickFigureOfMerit (1.0 for hand-picked particles); None refuses such a file.
    Raises a data error for missing columns, unknown tomograms and refined shifts (rlnOrigin*Angst), which are relative
    to a rotated frame and must be applied in RELION first.
    """
    tables = read_star(path)
    particles = _particle_table(path, tables)
    names = particles["rlnTomoName"].tolist()
    for unknown in sorted(set(names) - set(grids)):
        raise data_error(f"{path}: tomogram {unknown!r} is not among the {len(grids)} known tomograms")
    shape = np.array([grids[name].shape for name in names], dtype=np.float64).reshape(-1, 3)
    spacing = np.array([grids[name].spacing_angstrom for name in names], dtype=np.float64).reshape(-1, 3)
    for column in (column for column in ORIGIN_COLUMNS if column in particles):
        if np.any(_column(path, particles, column) != 0):
            raise data_error(
                f"{path}: {column} holds refined shifts; apply them in RELION (re-extract recentred) first"
            )
    if set(CENTRED_COLUMNS) <= set(particles):
        centred = np.stack([_column(path, particles, column) for column in CENTRED_COLUMNS[::-1]], axis=1)  # (n, 3)
        points = centred / spacing + shape / 2
    else:
        pixels = np.stack([_column(path, particles, column) for column in PIXEL_COLUMNS[::-1]], axis=1)  # (n, 3)
        points = pixels * _pixel_sizes(path, tables, particles, pixel_size_angstrom)[:, None] / spacing
    if SCORE_COLUMN in particles:
        scores = _column(path, particles, SCORE_COLUMN)
    elif missing_score is not None:
        scores = np.full(len(names), missing_score)
    else:
        raise data_error(f"{path}: no column {SCORE_COLUMN}; say which score its picks get (1.0 for hand-picked ones)")
    return picks_by_tomogram(path, names, points, scores, grids)


def read_star(path: Path) -> dict[str, pd.DataFrame]:
    """Every data block of a STAR file by name (without data_); the cells are text, the columns lose their underscore.

    A block of label and value pairs is a table of one row. Comments stand on lines of their own; text fields between
    semicolons are not supported (RELION, Warp and cryoCAT write none). Raises a data error with the line number.
    """
    blocks: dict[str, list[tuple[int, list[str]]]] = {}
    current: list[tuple[int, list[str]]] | None = None
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        words = STAR_TOKEN.findall(text)
        if not words or words[0].startswith("#"):
            continue
        if words[0].lower().startswith("data_") and len(words) == 1:
            name = words[0][len("data_") :]
            if name in blocks:
                raise data_error(f"{path}:{line}: second block data_{name}")
            current = blocks[name] = []
        elif current is None or text.startswith(";"):
            raise data_error(f"{path}:{line}: expected a data_ block of labels and values, got {text[:40]!r}")
        else:
            current.append((line, words))
    if not blocks:
        raise data_error(f"{path}: not a STAR file: no data_ block")
    return {name: _star_table(path, lines) for name, lines in blocks.items()}


def _star_table(path: Path, lines: list[tuple[int, list[str]]]) -> pd.DataFrame:
    """One block as a table of text; lines: line number and words."""
    is_loop = bool(lines) and lines[0][1][0].lower() == "loop_"
    body = lines[1:] if is_loop else lines
    labels = [words[0][1:] for _, words in body if words[0].startswith("_")]
    rows = body[len(labels) :] if is_loop else []
    for line, words in body if not is_loop else []:
        if len(words) != 2 or not words[0].startswith("_"):
            raise data_error(f"{path}:{line}: expected a label and its value, got {' '.join(words)!r}")
    for line, words in rows:
        if len(words) != len(labels) or words[0].startswith("_"):
            raise data_error(f"{path}:{line}: expected {len(labels)} values, got {len(words)}")
    texts = [words for _, words in rows] if is_loop else [[words[1] for _, words in body]]
    cells = [[word[1:-1] if STAR_QUOTED.fullmatch(word) else word for word in words] for words in texts]
    return pd.DataFrame(cells, columns=pd.Index(labels), dtype=object)


def _star_text(name: str, columns: tuple[str, ...], rows: list[list[str]]) -> str:
    labels = [f"_{column} #{number}" for number, column in enumerate(columns, start=1)]
    return "\n".join(["", f"data_{name}", "", "loop_", *labels, *("\t".join(row) for row in rows)]) + "\n\n"


def _particle_table(path: Path, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    for table in tables.values():
        has_position = set(CENTRED_COLUMNS) <= set(table) or set(PIXEL_COLUMNS) <= set(table)
        if "rlnTomoName" in table and has_position:
            return table
    raise data_error(
        f"{path}: no table with rlnTomoName and {PIXEL_COLUMNS} or {CENTRED_COLUMNS}; found {list(tables)}"
    )


def _column(path: Path, table: pd.DataFrame, column: str) -> np.ndarray:
    """One column as float64 (n,)."""
    try:
        values = table[column].to_numpy().astype(np.float64)
    except ValueError as error:
        raise data_error(f"{path}: {column}: {error}") from error
    if not np.isfinite(values).all():
        raise data_error(f"{path}: {column}: expected finite numbers")
    return values


def _pixel_sizes(
    path: Path, tables: dict[str, pd.DataFrame], particles: pd.DataFrame, pixel_size_angstrom: dict[str, float] | None
) -> np.ndarray:
    """The pixel size of each particle's coordinates in angstrom, float64 (n,)."""
    if pixel_size_angstrom is not None:
        return np.array([_pixel_size(path, name, pixel_size_angstrom) for name in particles["rlnTomoName"]], np.float64)
    if PIXEL_SIZE_COLUMN in particles:
        return _column(path, particles, PIXEL_SIZE_COLUMN)
    optics = tables["optics"] if "optics" in tables else pd.DataFrame()
    if not {"rlnOpticsGroup", PIXEL_SIZE_COLUMN} <= set(optics) or "rlnOpticsGroup" not in particles:
        raise data_error(f"{path}: no {PIXEL_SIZE_COLUMN}; give the pixel size of the coordinates")
    sizes = dict(zip(optics["rlnOpticsGroup"], _column(path, optics, PIXEL_SIZE_COLUMN), strict=True))
    missing = sorted(set(particles["rlnOpticsGroup"]) - set(sizes))
    if missing:
        raise data_error(f"{path}: optics groups {missing} are missing from the optics table")
    return np.array([sizes[group] for group in particles["rlnOpticsGroup"]], dtype=np.float64)


def _pixel_size(path: Path, tomo_id: str, pixel_size_angstrom: dict[str, float]) -> float:
    size = pixel_size_angstrom[tomo_id] if tomo_id in pixel_size_angstrom else float("nan")
    if not (np.isfinite(size) and size > 0):
        raise config_error(f"{path}: expected the tilt-series pixel size of {tomo_id!r} in angstrom, got {size}")
    return size
