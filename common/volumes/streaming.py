"""Output that several processes write range by range, that survives a kill at any time, and that is continued.

The unfinished voxels lie in a hidden folder `.NAME.partial/` beside the target: data.npy (sparse until written), about.json
(whose output it is), and finished/ with one empty file per finished range of planes, made only after its voxels are on
the disk. `finish` turns them into the target's format and takes the folder away.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.files import parsing, read_text, write_text
from common.volumes.finishing import Streamed, write_final
from common.volumes.volume import Box, Spacing, first_line

DATA, ABOUT, FINISHED, FINAL, REPLACED = "data.npy", "about.json", "finished", "final", "replaced"
PlaneRange = tuple[int, int]  # first and one past the last plane


@dataclasses.dataclass(frozen=True)
class StreamedVolume:
    """A volume [c, z, y, x] on its way to `path`; small and picklable: each process writes through its own copy."""

    path: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    identity: str
    first_byte: int  # of the voxels in data.npy

    @property
    def folder(self) -> Path:
        return partial_folder(self.path)

    def write(self, first_plane: int, planes: npt.NDArray[Any]) -> None:
        """Write planes [c, dz, y, x] (or [dz, y, x] of one channel), force them to disk, mark their range finished."""
        self.write_box((first_plane, 0, 0), planes)
        self.mark_finished(first_plane, first_plane + planes.shape[-3])

    def write_box(self, corner: Box, values: npt.NDArray[Any]) -> None:
        """Write a box [c, dz, dy, dx] (or [dz, dy, dx] of one channel) without marking anything.

        Plain writes, not a memory map: a full disk is then an error with a name instead of the end of the process.
        """
        box = values[None] if values.ndim == 3 else values
        channels, depth, height, width = self.shape
        inside = all(c >= 0 and c + n <= m for c, n, m in zip(corner, box.shape[1:], self.shape[1:], strict=True))
        assert inside and box.shape[0] == channels, f"Expected a box inside {self.shape}, got {box.shape} at {corner}"
        assert box.dtype == self.dtype, f"Expected {self.dtype}, got {box.dtype}"
        z, y, x = corner
        whole_rows = box.shape[3] == width
        whole_planes = whole_rows and box.shape[2] == height
        pieces = box.shape[1] if not whole_planes else 1
        rows = box.shape[2] if not whole_rows else 1
        parts = np.ascontiguousarray(box).reshape(channels, pieces, rows, -1)  # the last axis lies in one piece
        row_bytes = width * self.dtype.itemsize
        with self._writing() as file:
            for c, piece, row in np.ndindex(channels, pieces, rows):
                start = ((c * depth + z + piece) * height + y + row) * row_bytes + x * self.dtype.itemsize
                write_at(file, parts[c, piece, row], self.first_byte + start)

    def mark_finished(self, first_plane: int, last_plane: int) -> None:
        """Force what was written to disk and mark the planes first <= z < last as finished."""
        assert 0 <= first_plane < last_plane <= self.shape[1], f"{first_plane} to {last_plane} of {self.shape[1]}"
        with self._writing() as file:
            os.fdatasync(file)
            (self.folder / FINISHED / f"{first_plane:08d}-{last_plane:08d}").touch()

    @contextmanager
    def _writing(self) -> Iterator[int]:
        try:
            file = os.open(self.folder / DATA, os.O_WRONLY)
            try:
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise data_error(
                f"{self.path}: cannot be written ({first_line(error)}); the same command continues once that is mended"
            ) from error

    def finished_ranges(self) -> list[PlaneRange]:
        """The finished planes, as few ranges as possible, ascending."""
        marks = sorted(path.name.split("-") for path in (self.folder / FINISHED).iterdir())
        merged: list[PlaneRange] = []
        for first, last in ((int(a), int(b)) for a, b in marks):
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], last)
            else:
                merged.append((first, last))
        return merged

    def missing_ranges(self) -> list[PlaneRange]:
        """The planes still to write, as few ranges as possible, ascending."""
        finished = self.finished_ranges()
        starts = [0, *(last for _, last in finished)]
        stops = [*(first for first, _ in finished), self.shape[1]]
        return [(first, last) for first, last in zip(starts, stops, strict=True) if first < last]

    def read_channels(self, corner: Box, size: Box) -> npt.NDArray[Any]:
        """A box [c, z, y, x] of what was written so far; zeros elsewhere."""
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        return np.array(self._mapped()[(slice(None), *box)], order="C", subok=False)

    def _mapped(self) -> npt.NDArray[Any]:
        return np.memmap(self.folder / DATA, self.dtype, "r", self.first_byte, self.shape)

    def finish(self, voxel_size_nm: Spacing | None) -> None:
        """Make the target in the format of its suffix, in bounded memory, and remove the partial folder.

        One process calls it, once nothing is missing; killed in between, it is simply called again. A target of the
        same kind that is there already is replaced.
        """
        missing = self.missing_ranges()
        assert not missing, f"Expected all planes of {self.path} to be written, missing are {missing}"
        try:
            for leftover in (FINAL, REPLACED):  # of a call that was killed
                remove(self.folder / leftover)
            if self.path.suffix.lower() != ".npy":
                write_final(self.folder / FINAL, Streamed(self.path, self._mapped(), voxel_size_nm))
            closing = closing_folder(self.path)
            remove(closing)
            self.folder.rename(closing)
            if self.path.is_dir():
                self.path.rename(closing / REPLACED)
            (closing / (DATA if self.path.suffix.lower() == ".npy" else FINAL)).replace(self.path)
            remove(closing / DATA)  # first: a closing folder with data would be taken up again
            remove(closing)
        except OSError as error:
            raise data_error(
                f"{self.path}: cannot be written ({first_line(error)}); the same command continues"
            ) from error


def open_streamed(path: Path, shape: tuple[int, int, int, int], dtype: np.dtype[Any], identity: str) -> StreamedVolume:
    """The unfinished output [c, z, y, x] for a target: created, or found and continued.

    Any number of processes may call it at once. identity: what the voxels depend on, such as a digest of all settings;
    a config error where the unfinished output there has another identity, shape or dtype (see discard_streamed).
    """
    assert all(n >= 1 for n in shape), f"Expected a shape without empty axes, got {shape}"
    folder = partial_folder(path)
    about = {"identity": identity, "shape": list(shape), "dtype": np.dtype(dtype).str}
    if not (folder / DATA).exists():
        try:
            create(path, about)
        except OSError as error:
            raise data_error(
                f"{path}: cannot be written ({first_line(error)}); name a folder on a writable disk"
            ) from error
    with parsing(folder / ABOUT, "remove this folder"):
        found = json.loads(read_text(folder / ABOUT))
    if found != about:
        differing = ", ".join(
            f"{key} {found[key]} (expected {about[key]})" for key in about if found[key] != about[key]
        )
        raise config_error(
            f"{folder}: unfinished output of other settings: {differing}: start over, or name another output"
        )
    stored = np.lib.format.open_memmap(folder / DATA, mode="r")
    return StreamedVolume(path, shape, np.dtype(dtype), identity, int(stored.offset))


def create(path: Path, about: dict[str, Any]) -> None:
    """Make the whole partial folder under another name, then rename it: of several processes one succeeds, all use it."""
    folder, closing = partial_folder(path), closing_folder(path)
    draft = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    if (closing / DATA).exists():
        draft = closing  # killed just before the target took its place
    else:
        (draft / FINISHED).mkdir(parents=True)
        shape = about["shape"] if about["shape"][0] > 1 else about["shape"][1:]  # may become the target as it is
        np.lib.format.open_memmap(draft / DATA, mode="w+", dtype=np.dtype(about["dtype"]), shape=tuple(shape)).flush()
        write_text(draft / ABOUT, json.dumps(about))
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / DATA).exists():
            raise
        if draft != closing:
            shutil.rmtree(draft)


def discard_streamed(path: Path) -> None:
    """Remove the unfinished output of a target, if there is any: the caller's explicit choice to start over."""
    for folder in (partial_folder(path), *path.parent.glob(f"{partial_folder(path).name}-*")):
        remove(folder)


def partial_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def closing_folder(path: Path) -> Path:
    """The partial folder's name while the target takes its place."""
    return path.with_name(f".{path.name}.partial-closing")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_at(file: int, values: npt.NDArray[Any], position: int) -> None:
    """All bytes of a contiguous array at a position; the system may take them in several pieces."""
    left = memoryview(values.reshape(-1).view(np.uint8).data)
    while left:
        written = os.pwrite(file, left, position)
        left, position = left[written:], position + written
