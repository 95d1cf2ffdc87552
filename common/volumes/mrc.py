"""MRC2014 maps and image stacks: read in place, written whole."""

from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.files import write_atomically
from common.volumes.axes import AUTO, arrange
from common.volumes.volume import Box, MappedVolume, Spacing
from common.volumes.voxel_size import spacing_in_angstrom

MRC_SUFFIXES = (".mrc", ".rec", ".map")
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


def open_mrc(path: Path, axes: str) -> MappedVolume:
    """An MRC2014 map or image stack of either byte order and any axis order; axes rename what the header calls z, y, x.

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
    z, y, x = order = mrc_axes(path, header)
    stored_shape = (sections, rows, columns)
    meant_shape = (stored_shape[z], stored_shape[y], stored_shape[x])
    meaning, shape, channels = arrange(str(path), meant_shape, axes, AUTO)
    spacing = mrc_spacing(path, header)
    return MappedVolume(
        path,
        meaning,
        shape,
        channels,
        stored_dtype.newbyteorder("="),
        None if spacing is None else spacing_in_angstrom(meaning, spacing, 1),
        MRC_HEADER.itemsize + extended_bytes,
        stored_dtype,
        stored_shape,
        order,
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
