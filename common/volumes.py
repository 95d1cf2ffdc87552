"""Lazy volumes: slice folders, .npy arrays and MRC maps behind one contract, and writers for slices and MRC.

Opening a volume reads headers; reading a box touches the bytes (or, for compressed slices, the files) of that box.
"""

import abc
import dataclasses
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from common.errors import UserError, config_error, data_error
from common.files import write_atomically

Box = tuple[int, int, int]  # z, y, x in voxels
Spacing = tuple[float, float, float]  # z, y, x in angstrom

SLICE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
MRC_SUFFIXES = (".mrc", ".rec", ".map")
FILE_SUFFIXES = (".npy", *MRC_SUFFIXES)
KNOWN_KINDS = f"a folder of slices ({', '.join(SLICE_SUFFIXES)}) or a file {', '.join(FILE_SUFFIXES)}"

KEPT_IMAGE_MODES: dict[str, np.dtype[Any]] = {  # Pillow's modes of more than 8 bits; all others become 8-bit grey
    "I;16": np.dtype(np.uint16),
    "I;16L": np.dtype(np.uint16),
    "I;16B": np.dtype(np.uint16),
    "I;16N": np.dtype(np.uint16),
    "I": np.dtype(np.int32),
    "F": np.dtype(np.float32),
}
# what Pillow raises on bad files
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error, zlib.error,
                    OverflowError, MemoryError, Image.DecompressionBombError)  # fmt: skip

MRC_DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # mode -> samples, MRC2014 table 1
MRC_KNOWN_MODES = "0 int8, 1 int16, 2 float32, 6 uint16, 12 float16"
MRC_PLAUSIBLE_MODES = range(128)
MRC_PLAUSIBLE_SIZE = 1 << 20  # voxels along one axis; a header read in the wrong byte order shows more
IMOD_STAMP = 1146047817  # "IMOD" as an integer: the file follows IMOD's rules for mode 0
IMOD_SIGNED_FLAG = 1
MRC_HEADER = np.dtype(
    [
        ("size", "<i4", 3),  # columns, rows, sections as stored
        ("mode", "<i4"),
        ("start", "<i4", 3),
        ("grid", "<i4", 3),  # mx, my, mz: intervals of the cell along x, y, z
        ("cell", "<f4", 3),  # angstrom along x, y, z
        ("angles", "<f4", 3),
        ("axes", "<i4", 3),  # mapc, mapr, maps: which of 1 x, 2 y, 3 z the columns, rows and sections run along
        ("statistics", "<f4", 3),  # minimum, maximum, mean
        ("space_group", "<i4"),
        ("extended_bytes", "<i4"),
        ("extra_96", "V8"),
        ("extended_kind", "S4"),
        ("version", "<i4"),
        ("extra_112", "V40"),
        ("imod_stamp", "<i4"),  # byte 152
        ("imod_flags", "<i4"),  # byte 156
        ("extra_160", "V36"),
        ("origin", "<f4", 3),
        ("map", "S4"),
        ("machine_stamp", "S4"),  # byte 212
        ("rms", "<f4"),
        ("labels_used", "<i4"),
        ("labels", "S80", 10),
    ]
)


@dataclasses.dataclass(frozen=True)
class Volume(abc.ABC):
    """A volume on disk; small, read-only and picklable, so that worker processes open the file themselves."""

    path: Path
    shape: Box
    dtype: np.dtype[Any]  # of what read returns
    spacing_angstrom: Spacing | None  # None where the format holds none, or holds 0

    def read(self, corner: Box, size: Box) -> npt.NDArray[Any]:
        """One box as a new contiguous array [z, y, x] in native byte order; it must lie inside the volume."""
        inside = all(c >= 0 and s >= 1 and c + s <= n for c, s, n in zip(corner, size, self.shape, strict=True))
        assert inside, f"Expected a box inside {self.shape}, got corner {corner} and size {size}"
        try:
            return self._read(corner, size)
        except OSError as error:
            raise data_error(f"{self.path}: cannot be read ({error.strerror}); is the disk still there?") from error

    @abc.abstractmethod
    def _read(self, corner: Box, size: Box) -> npt.NDArray[Any]: ...


@dataclasses.dataclass(frozen=True)
class SliceFolder(Volume):
    """One image file per z, in natural order of the names; colour becomes 8-bit grey."""

    slices: tuple[Path, ...] = dataclasses.field(repr=False)

    def _read(self, corner: Box, size: Box) -> npt.NDArray[Any]:
        (z, y, x), (depth, height, width) = corner, size
        box = np.empty(size, self.dtype)
        for i, path in enumerate(self.slices[z : z + depth]):
            box[i] = self._decode(path)[y : y + height, x : x + width]
        return box

    def _decode(self, path: Path) -> npt.NDArray[Any]:
        try:
            with Image.open(path) as image:
                self._compare(path, image)
                return np.asarray(image if image.mode in KEPT_IMAGE_MODES else image.convert("L"))
        except UNREADABLE_IMAGE as error:
            raise unreadable_slice(path, error) from error

    def _compare(self, path: Path, image: ImageFile.ImageFile) -> None:
        height, width, dtype = image_layout(image)
        if (height, width) != self.shape[1:]:
            expected = f"{self.shape[1]} x {self.shape[2]}, as in {self.slices[0].name}"
            raise data_error(f"{path}: height x width {height} x {width} (expected {expected}): re-export this slice")
        if dtype != self.dtype:
            expected = f"{self.dtype}, as in {self.slices[0].name}"
            raise data_error(f"{path}: {dtype} pixels (expected {expected}): re-export this slice")
        pages = getattr(image, "n_frames", 1)  # formats of a single image do not have the attribute
        if pages != 1:
            raise data_error(f"{path}: {pages} pages (expected 1): export one file per slice")


@dataclasses.dataclass(frozen=True)
class MappedVolume(Volume):
    """Plain samples in one file. Every read maps the file anew, so that resident pages go when the box is copied."""

    offset: int  # bytes before the first sample
    stored_dtype: np.dtype[Any]
    stored_shape: Box
    stored_axes: Box  # the stored axis that runs along z, y and x

    def _read(self, corner: Box, size: Box) -> npt.NDArray[Any]:
        stored = np.memmap(self.path, self.stored_dtype, "r", self.offset, self.stored_shape)
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        return np.array(stored.transpose(self.stored_axes)[box], self.dtype, order="C", subok=False)


def open_volume(path: Path) -> Volume:
    """The volume at a path, by its kind: a folder of slices, .npy, or .mrc/.rec/.map.

    A path that is missing or of no known kind is a config error; unreadable content is a data error.
    """
    if not path.exists():
        raise config_error(f"{path}: no such file or folder (expected {KNOWN_KINDS})")
    try:
        if path.is_dir():
            return open_slice_folder(path)
        if path.suffix.lower() == ".npy":
            return open_npy(path)
        if path.suffix.lower() in MRC_SUFFIXES:
            return open_mrc(path)
    except OSError as error:
        raise data_error(f"{path}: cannot be read ({error.strerror}); check its rights and its disk") from error
    remedy = "unpack it first" if path.suffix.lower() == ".gz" else "convert it first"
    raise config_error(f"{path}: unknown kind of volume '{path.suffix}' (expected {KNOWN_KINDS}): {remedy}")


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts numbers in names by value (9.jpg before 10.jpg); equal values, as 01 and 1, by the name itself."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))), name


def open_slice_folder(folder: Path) -> SliceFolder:
    """A folder of slices; only the first one's header is read."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in SLICE_SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise data_error(f"{folder}: no slices (expected slice_0000{SLICE_SUFFIXES[0]} ... or {SLICE_SUFFIXES[1:]})")
    suffixes = sorted({path.suffix.lower() for path in found})
    if len(suffixes) > 1:
        raise data_error(f"{folder}: slices of {len(suffixes)} kinds {suffixes} (expected one): move the others away")
    slices = tuple(sorted(found, key=lambda path: natural_key(path.name)))
    try:
        with Image.open(slices[0]) as image:
            height, width, dtype = image_layout(image)
    except UNREADABLE_IMAGE as error:
        raise unreadable_slice(slices[0], error) from error
    return SliceFolder(folder, (len(slices), height, width), dtype, None, slices)


def image_layout(image: ImageFile.ImageFile) -> tuple[int, int, np.dtype[Any]]:
    """Height, width and dtype of an image's pixels once they are grey; from its header alone."""
    dtype = KEPT_IMAGE_MODES[image.mode] if image.mode in KEPT_IMAGE_MODES else np.dtype(np.uint8)
    return image.height, image.width, dtype


def unreadable_slice(path: Path, error: BaseException) -> UserError:
    return data_error(f"{path}: not a readable image ({error}): re-copy or re-export this slice")


def open_npy(path: Path) -> MappedVolume:
    """A .npy file of a real 3D array [z, y, x], in C or Fortran order; pickles are never executed."""
    remedy = "save a plain numeric array again with np.save"
    try:
        stored = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it opens no .npz and no pickle
    except OSError:
        raise
    except Exception as error:  # a damaged header ends in whatever Python's own parser raises
        size = path.stat().st_size
        raise data_error(f"{path}: truncated or no plain array ({error}; {size} bytes): {remedy}") from error
    if stored.dtype.kind not in "biuf":
        raise data_error(f"{path}: holds {stored.dtype} (expected bool, integers or floats): {remedy}")
    if stored.ndim != 3 or 0 in stored.shape:
        raise data_error(f"{path}: shape {stored.shape} (expected three axes z, y, x, none empty): {remedy}")
    shape: Box = (stored.shape[0], stored.shape[1], stored.shape[2])
    turned = stored.flags.f_contiguous and not stored.flags.c_contiguous
    stored_shape, axes = ((shape[2], shape[1], shape[0]), (2, 1, 0)) if turned else (shape, (0, 1, 2))
    dtype = stored.dtype.newbyteorder("=")
    return MappedVolume(path, shape, dtype, None, stored.offset, stored.dtype, stored_shape, axes)


def open_mrc(path: Path) -> MappedVolume:
    """An MRC2014 map or image stack of either byte order and any axis order.

    Source: Cheng et al., MRC2014, J. Struct. Biol. 192 (2015), and IMOD's rule for the sign of mode 0 (byte 152).
    """
    with path.open("rb") as file:
        raw = file.read(MRC_HEADER.itemsize)
    header = read_mrc_header(path, raw)
    mode, extended_bytes = int(header["mode"]), int(header["extended_bytes"])
    if mode not in MRC_DTYPES:
        remedy = "convert it, for example with IMOD: newstack -mode 2 IN OUT"
        raise data_error(f"{path}: header field mode is {mode} (expected {MRC_KNOWN_MODES}): {remedy}")
    unsigned = mode == 0 and header["imod_stamp"] == IMOD_STAMP and not header["imod_flags"] & IMOD_SIGNED_FLAG
    order = header["size"].dtype.byteorder
    stored_dtype = np.dtype("u1" if unsigned else MRC_DTYPES[mode]).newbyteorder(order)
    columns, rows, sections = (int(n) for n in header["size"])
    expected = MRC_HEADER.itemsize + extended_bytes + columns * rows * sections * stored_dtype.itemsize
    if extended_bytes < 0:
        raise data_error(f"{path}: header field nsymbt is {extended_bytes} (expected >= 0): export the file again")
    if path.stat().st_size < expected:
        found = f"{path.stat().st_size} bytes (expected {expected}: {sections} x {rows} x {columns} {stored_dtype})"
        raise data_error(f"{path}: {found}: the file is cut short; copy it again")
    z, y, x = axes = mrc_axes(path, header)
    stored_shape = (sections, rows, columns)
    return MappedVolume(
        path,
        (stored_shape[z], stored_shape[y], stored_shape[x]),
        stored_dtype.newbyteorder("="),
        mrc_spacing(path, header),
        MRC_HEADER.itemsize + extended_bytes,
        stored_dtype,
        stored_shape,
        axes,
    )


def read_mrc_header(path: Path, raw: bytes) -> Any:
    """The header in the byte order of its machine stamp, or in the other one where only that makes sense."""
    if len(raw) < MRC_HEADER.itemsize:
        raise data_error(f"{path}: {len(raw)} bytes (expected an MRC header of {MRC_HEADER.itemsize}): copy it again")
    big = raw[212:214] == b"\x11\x11"
    for order in (">", "<") if big else ("<", ">"):
        header = np.frombuffer(raw, MRC_HEADER.newbyteorder(order))[0]
        sizes = header["size"]
        if header["mode"] in MRC_PLAUSIBLE_MODES and sizes.min() >= 1 and sizes.max() <= MRC_PLAUSIBLE_SIZE:
            return header
    little = np.frombuffer(raw, MRC_HEADER)[0]
    found = f"header fields nx, ny, nz = {little['size'].tolist()}, mode = {little['mode']}"
    raise data_error(f"{path}: not an MRC file ({found}): export it again as MRC2014")


def mrc_axes(path: Path, header: Any) -> Box:
    """The stored axes (0 sections, 1 rows, 2 columns) that run along z, y and x."""
    columns_rows_sections = header["axes"].tolist()
    if columns_rows_sections == [0, 0, 0]:  # written by old programs that mean the usual order
        return 0, 1, 2
    if sorted(columns_rows_sections) != [1, 2, 3]:
        found = f"header fields mapc, mapr, maps = {columns_rows_sections} (expected 1, 2, 3 in some order)"
        raise data_error(f"{path}: {found}: export the file again")
    x, y, z = (2 - columns_rows_sections.index(axis) for axis in (1, 2, 3))
    return z, y, x


def mrc_spacing(path: Path, header: Any) -> Spacing | None:
    """Voxel size z, y, x in angstrom, cell / grid; None where the header leaves it 0."""
    cell, grid = header["cell"].astype(np.float64), header["grid"].astype(np.int64)
    if not np.isfinite(cell).all() or (cell < 0).any():
        remedy = "repair the header, for example with IMOD: alterheader -del DX,DY,DZ FILE"
        raise data_error(f"{path}: header field cella (x, y, z) is {cell.tolist()} angstrom (expected > 0): {remedy}")
    if (grid < 0).any():
        remedy = "repair the header, for example with IMOD: alterheader -sam MX,MY,MZ FILE"
        raise data_error(f"{path}: header field mx, my, mz is {grid.tolist()} (expected > 0): {remedy}")
    if 0 in cell or 0 in grid:
        return None
    x, y, z = (cell / grid).tolist()
    return z, y, x


def write_slice_folder(volume: npt.NDArray[np.uint8], folder: Path, suffix: str, jpeg_quality: int) -> None:
    """Write [z, y, x] grey levels as slice_0000.jpg (or .png, exact) ...; the folder appears once it is complete.

    jpeg_quality: 1 to 95, the highest that Pillow advises. What a killed call left behind is overwritten by the next.
    """
    assert volume.ndim == 3 and volume.dtype == np.uint8, f"Expected 3D uint8, got {volume.ndim}D {volume.dtype}"
    if suffix not in (".jpg", ".png"):
        raise config_error(f"{folder}: cannot write slices as '{suffix}' (expected .jpg or .png)")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise config_error(f"{folder}: exists already (expected a new or empty folder): remove it or choose another")
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for z, image in enumerate(volume):
            Image.fromarray(image).save(unfinished / f"slice_{z:04d}{suffix}", quality=jpeg_quality)
        unfinished.replace(folder)
    except OSError as error:
        raise data_error(f"{folder}: cannot be written ({error.strerror}); what was finished before is kept") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_mrc(path: Path, volume: npt.NDArray[Any], spacing_angstrom: Spacing) -> None:
    """Write [z, y, x] as a little-endian MRC2014 map: int8, int16, float32, uint16 or float16, statistics filled."""
    assert volume.ndim == 3 and volume.size, f"Expected a 3D volume, got shape {volume.shape}"
    assert all(0 < s < np.inf for s in spacing_angstrom), f"Expected a spacing > 0, got {spacing_angstrom}"
    modes = {dtype: mode for mode, dtype in MRC_DTYPES.items()}
    if volume.dtype.str[1:] not in modes:
        raise config_error(f"{path}: MRC holds no {volume.dtype} (expected {MRC_KNOWN_MODES}): convert the volume")
    header = np.zeros((), MRC_HEADER)
    header["size"] = header["grid"] = volume.shape[::-1]
    header["mode"] = modes[volume.dtype.str[1:]]
    header["cell"] = np.multiply(spacing_angstrom, volume.shape)[::-1]
    header["angles"], header["axes"] = 90, (1, 2, 3)
    sums = np.array([section.sum(dtype=np.float64) for section in volume])
    mean = sums.sum() / volume.size
    squares = sum(float(np.square(section.astype(np.float64) - mean).sum()) for section in volume)
    header["statistics"], header["rms"] = (volume.min(), volume.max(), mean), np.sqrt(squares / volume.size)
    header["space_group"], header["version"] = 1, 20140
    header["map"], header["machine_stamp"] = b"MAP ", b"DD"
    header["labels_used"], header["labels"][0] = 1, b"PlainScope"

    def write(file: IO[bytes]) -> None:
        file.write(header.tobytes())
        for section in volume:
            file.write(np.ascontiguousarray(section, section.dtype.newbyteorder("<")).tobytes())

    write_atomically(path, write)
