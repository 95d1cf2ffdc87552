"""Picks as copick JSON: one file per tomogram in the folder layout of a copick project."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import config_error, data_error
from common.files import read_text, write_text
from motor_detection.pick_files import TomogramPicks, VolumeGrid, check_unique, picks_by_tomogram

REWRITTEN_BY_COPICK = re.compile(r"[<>:\"/\\|?*\x00-\x1f\x7f\s_]|^-|-$")


def copick_path(folder: Path, tomo_id: str, object_name: str, user_id: str, session_id: str) -> Path:
    """Where copick keeps the picks of one run; raises a config error for a name copick would rewrite.

    copick (src/copick/util/escape.py) allows no underscore, space or any of <>:"/\\|?* and no dash at either end.
    """
    for key, name in (("object_name", object_name), ("user_id", user_id), ("session_id", session_id)):
        if not name or REWRITTEN_BY_COPICK.search(name):
            raise config_error(f"{key}: copick allows no underscore, space, slash or outer dash, got {name!r}")
    return folder / "ExperimentRuns" / tomo_id / "Picks" / f"{user_id}_{session_id}_{object_name}.json"


def write_copick_json(
    folder: Path, picks: list[TomogramPicks], object_name: str, user_id: str, session_id: str
) -> list[Path]:
    """Write one copick picks file per tomogram, empty ones included, below `folder`; returns the paths.

    Fields as copick's CopickPicksFile (src/copick/models.py); x, y, z in angstrom = voxel index * spacing of the axis,
    the first voxel's centre at 0. voxel_spacing is null where the voxels are not cubic, since copick has one number.
    """
    check_unique(folder, picks)
    identity = [[float(row == column) for column in range(4)] for row in range(4)]
    paths = [copick_path(folder, tomogram.tomo_id, object_name, user_id, session_id) for tomogram in picks]
    for path, tomogram in zip(paths, picks, strict=True):
        positions = tomogram.points * np.array(tomogram.spacing_angstrom)  # (n, 3) z, y, x angstrom
        points = [
            {"location": {"x": x, "y": y, "z": z}, "transformation_": identity, "instance_id": 0, "score": score}
            for (z, y, x), score in zip(positions.tolist(), tomogram.scores.tolist(), strict=True)
        ]
        cubic = len(set(tomogram.spacing_angstrom)) == 1
        content = {
            "pickable_object_name": object_name,
            "user_id": user_id,
            "session_id": session_id,
            "run_name": tomogram.tomo_id,
            "voxel_spacing": tomogram.spacing_angstrom[0] if cubic else None,
            "unit": "angstrom",
            "points": points,
            "trust_orientation": False,
        }
        write_text(path, json.dumps(content, indent=4) + "\n")
    return paths


def read_copick_json(
    folder: Path, grids: dict[str, VolumeGrid], object_name: str, user_id: str, session_id: str
) -> list[TomogramPicks]:
    """Read one copick picks file for each grid; a position is the location plus the transformation's translation."""
    picks = []
    for tomo_id, grid in grids.items():
        path = copick_path(folder, tomo_id, object_name, user_id, session_id)
        rows = _copick_rows(path)  # (n, 4) z, y, x in angstrom, score
        points = rows[:, :3] / np.array(grid.spacing_angstrom)
        picks += picks_by_tomogram(path, [tomo_id] * len(rows), points, rows[:, 3], {tomo_id: grid})
    return picks


def _copick_rows(path: Path) -> np.ndarray:
    """The points of one copick file as float64 (n, 4): z, y, x in angstrom, score."""
    try:
        content = json.loads(read_text(path))
        if "unit" in content and content["unit"] not in ("angstrom", None):
            raise data_error(f"{path}: unit: expected angstrom, got {content['unit']!r}")
        rows = [_copick_row(point) for point in content["points"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise data_error(f"{path}: not a copick picks file with a score for each point ({error!r})") from error
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _copick_row(point: dict[str, Any]) -> list[float]:
    moved = "transformation_" in point and point["transformation_"] is not None
    shift = [float(row[3]) for row in point["transformation_"][:3]] if moved else [0.0] * 3  # x, y, z in angstrom
    location = [float(point["location"][axis]) for axis in ("x", "y", "z")]
    x, y, z = (place + move for place, move in zip(location, shift, strict=True))
    return [z, y, x, float(point["score"])]
