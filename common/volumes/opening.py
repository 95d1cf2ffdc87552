"""One door to every format: open_volume looks at the name and the kind of what is there."""

import re
from pathlib import Path

from common.errors import UserError, config_error
from common.volumes.axes import check_axes
from common.volumes.hdf5 import HDF5_SUFFIXES, open_hdf5
from common.volumes.mrc import MRC_SUFFIXES, open_mrc
from common.volumes.npy import NPY_SUFFIXES, open_npy
from common.volumes.slices import SINGLE_IMAGE_SUFFIXES, SLICE_SUFFIXES, open_single_image, open_slice_folder
from common.volumes.tiff import TIFF_SUFFIXES, open_tiff
from common.volumes.volume import Volume, unreadable_file
from common.volumes.zarr_arrays import ZARR_SUFFIXES, is_zarr, open_zarr

FILE_SUFFIXES = (*NPY_SUFFIXES, *MRC_SUFFIXES)  # files of one array that need no extra package and no key
WITH_KEY = re.compile(rf"(.*(?:{'|'.join(re.escape(s) for s in (*HDF5_SUFFIXES, *ZARR_SUFFIXES))})):(.*)", re.I | re.S)
KNOWN_KINDS = (
    f"a folder of slices ({', '.join(SLICE_SUFFIXES)}) or a file {', '.join((*FILE_SUFFIXES, *TIFF_SUFFIXES))}, "
    f"{', '.join(HDF5_SUFFIXES)}, {', '.join(ZARR_SUFFIXES)}, {', '.join(SINGLE_IMAGE_SUFFIXES)}"
)


def open_volume(location: str | Path, axes: str) -> Volume:
    """The volume at a location: a path, or FILE.h5:NAME and FOLDER.zarr:NAME for one array of several.

    axes: what the axes of the file's array mean in its order ("zyx", "xyz", "zyxc", "yx" ...), or "auto": what the
    format states, else yx, zyx or czyx by their number; other orders are transposed while reading. Only headers are read.
    A location that is missing or of no known kind, or a wrong NAME, is a config error; unreadable content and axes that
    do not fit are data errors.
    """
    check_axes(axes)
    path, key = split_location(location)
    if not path.exists():
        raise config_error(f"{path}: no such file or folder (expected {KNOWN_KINDS})")
    try:
        return open_by_kind(path, key, axes)
    except OSError as error:
        raise unreadable_file(path, error) from error


def split_location(location: str | Path) -> tuple[Path, str]:
    """The path and the name inside ("" if none) of "train.h5:volumes/raw"."""
    with_key = WITH_KEY.fullmatch(str(location))
    if with_key is None or Path(location).exists():
        return Path(location), ""
    return Path(with_key[1]), with_key[2]


def open_by_kind(path: Path, key: str, axes: str) -> Volume:
    suffix = path.suffix.lower()
    if path.is_dir():
        return open_zarr(path, key, axes) if suffix in ZARR_SUFFIXES or is_zarr(path) else open_slice_folder(path, axes)
    if suffix in HDF5_SUFFIXES:
        return open_hdf5(path, key, axes)
    openers = (
        (NPY_SUFFIXES, open_npy),
        (MRC_SUFFIXES, open_mrc),
        (TIFF_SUFFIXES, open_tiff),
        (SINGLE_IMAGE_SUFFIXES, open_single_image),
    )
    for suffixes, opener in openers:
        if suffix in suffixes:
            return opener(path, axes)
    raise unknown_kind(path)


def unknown_kind(path: Path) -> UserError:
    remedy = (
        f"unpack it first, for example: gunzip -k {path.name}" if path.suffix.lower() == ".gz" else "convert it first"
    )
    return config_error(f"{path}: unknown kind of volume '{path.suffix}' (expected {KNOWN_KINDS}): {remedy}")
