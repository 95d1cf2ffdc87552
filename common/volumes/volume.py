"""The contract of all volumes on disk: small, read-only, picklable, and lazy.

Opening a volume reads headers; reading a box touches the bytes (or, for compressed slices, the files) of that box.
"""

import abc
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError, data_error

Box = tuple[int, int, int]  # z, y, x in voxels
Spacing = tuple[float, float, float]  # z, y, x in angstrom
StoredBox = tuple[slice, ...]  # one slice, with start and stop, per axis of the file's own array

ANGSTROM_PER_NM = 10


@dataclasses.dataclass(frozen=True)
class Volume(abc.ABC):
    """A volume on disk. Worker processes get a pickled copy and open the file themselves."""

    path: Path
    axes: str  # what each axis of the file's own array means, in its order: "zyx", "zyxc", "xyz", "tczyx" (one t) ...
    shape: Box
    num_channels: int
    dtype: np.dtype[Any]  # of what read returns
    spacing_angstrom: Spacing | None  # None where the format holds none, or holds 0

    @property
    def voxel_size_nm(self) -> Spacing | None:
        """Voxel size z, y, x in nm; None where the file holds none."""
        if self.spacing_angstrom is None:
            return None
        z, y, x = self.spacing_angstrom
        return z / ANGSTROM_PER_NM, y / ANGSTROM_PER_NM, x / ANGSTROM_PER_NM

    def read(self, corner: Box, size: Box) -> npt.NDArray[Any]:
        """One box of a volume of one channel: a new contiguous array [z, y, x] in native byte order."""
        assert self.num_channels == 1, f"Expected one channel, got {self.num_channels} in {self.path}"
        box: npt.NDArray[Any] = self.read_channels(corner, size)[0]
        return box

    def read_channels(self, corner: Box, size: Box) -> npt.NDArray[Any]:
        """One box as a new contiguous array [c, z, y, x] in native byte order; it must lie inside the volume."""
        inside = all(c >= 0 and s >= 1 and c + s <= n for c, s, n in zip(corner, size, self.shape, strict=True))
        assert inside, f"Expected a box inside {self.shape}, got corner {corner} and size {size}"
        ranges = dict(zip("zyx", (slice(c, c + s) for c, s in zip(corner, size, strict=True)), strict=True))
        ranges |= {"c": slice(0, self.num_channels), "t": slice(0, 1)}
        try:
            stored = self._read_stored(tuple(ranges[axis] for axis in self.axes))
        except OSError as error:
            why = first_line(error)
            raise data_error(f"{self.path}: cannot be read ({why}); is the disk there, and the file whole?") from error
        order = [self.axes.index(axis) for axis in "tczyx" if axis in self.axes]
        box = stored.transpose(order).reshape((self.num_channels, *size))  # (c, z, y, x)
        mapped = isinstance(stored, np.memmap)  # without the copy, resident pages would stay
        return np.array(box, self.dtype, order="C", subok=False, copy=True if mapped else None)

    @abc.abstractmethod
    def _read_stored(self, box: StoredBox) -> npt.NDArray[Any]:
        """A box of the file's own array, its axes as stored."""


@dataclasses.dataclass(frozen=True)
class MappedVolume(Volume):
    """Plain samples in one file. Every read maps the file anew, so that resident pages go when the box is copied."""

    offset: int  # bytes before the first sample
    stored_dtype: np.dtype[Any]
    stored_shape: tuple[int, ...]
    stored_order: tuple[int, ...]  # the axis in the file of each axis of the array it means: reversed for Fortran order

    def _read_stored(self, box: StoredBox) -> npt.NDArray[Any]:
        stored = np.memmap(self.path, self.stored_dtype, "r", self.offset, self.stored_shape)
        return stored.transpose(self.stored_order)[box]


def first_line(error: BaseException) -> str:
    """What an error says, in at most one line: libraries' errors may hold several, or nothing but an errno."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.strip().partition("\n")[0][:200] or type(error).__name__


def check_dtype(where: str, dtype: np.dtype[Any], remedy: str) -> np.dtype[Any]:
    """The native dtype of stored samples; a data error unless they are bool, integers or floats."""
    if dtype.kind not in "biuf":
        raise data_error(f"{where}: holds {dtype} (expected bool, integers or floats): {remedy}")
    return dtype.newbyteorder("=")


def unreadable_file(path: Path, error: OSError) -> UserError:
    return data_error(f"{path}: cannot be read ({first_line(error)}); check its rights and its disk")
