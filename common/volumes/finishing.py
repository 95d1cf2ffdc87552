"""Formats of finished output: each written from mapped voxels in bounded memory; and whether a target can be made at all."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.errors import config_error
from common.extras import extra_package
from common.volumes.volume import Spacing
from common.volumes.zarr_arrays import is_zarr

EXTRA_OF = {
    ".npy": None,
    ".h5": "h5py",
    ".hdf5": "h5py",
    ".zarr": "zarr",
    ".tif": "tifffile",
    ".tiff": "tifffile",
    "": None,
}
KNOWN_TARGETS = (
    f"{', '.join(suffix for suffix in EXTRA_OF if suffix)}, or a name without suffix: a folder of PNG slices"
)
PNG_DTYPES = ("uint8", "uint16")
IMAGEJ_DTYPES = ("uint8", "uint16", "float32")
IMAGEJ_BYTES = (1 << 32) - (1 << 25)  # offsets of 32 bits, and room for the directories
BLOCK_BYTES = 1 << 27  # converted at once
OUR_SLICE = re.compile(r"slice_\d+\.png")


@dataclasses.dataclass(frozen=True)
class Streamed:
    """What becomes a target: mapped voxels [c, z, y, x] and their size z, y, x in nm, where known."""

    path: Path
    values: npt.NDArray[Any]
    voxel_size_nm: Spacing | None

    @property
    def shape(self) -> tuple[int, ...]:
        """[z, y, x] of one channel, as most programs expect it, else [c, z, y, x]."""
        return self.values.shape if self.values.shape[0] > 1 else self.values.shape[1:]


def check_target(path: Path, num_channels: int, dtype: np.dtype[Any]) -> None:
    """A config error where output of this kind cannot be made at `path`; to be called before the work begins.

    Known: .npy, .h5, .zarr, .tif, and a name without suffix (a folder of PNG slices). Checked: suffix, extra package,
    what PNG can hold, and what is at `path` already: only a target of the same kind is ever replaced.
    """
    suffix = path.suffix.lower()
    if suffix not in EXTRA_OF:
        raise config_error(f"{path}: cannot write '{path.suffix}' (expected {KNOWN_TARGETS})")
    package = EXTRA_OF[suffix]
    if package is not None:
        extra_package(package, f"{path}: writing {suffix}")
    if suffix == "" and (num_channels != 1 or np.dtype(dtype).name not in PNG_DTYPES):
        found = f"{num_channels} channels of {np.dtype(dtype)}"
        raise config_error(f"{path}: PNG slices hold no {found} (expected one of {' or '.join(PNG_DTYPES)}): write .h5")
    if not path.exists():
        return
    if suffix in ("", ".zarr"):
        inside = list(path.iterdir()) if path.is_dir() else []
        ours = is_zarr(path) if suffix == ".zarr" else all(OUR_SLICE.fullmatch(p.name) for p in inside)
        if not path.is_dir() or (inside and not ours):
            kind = "zarr" if suffix == ".zarr" else "a folder of slice_*.png"
            raise config_error(
                f"{path}: exists and is not {kind} (expected that, or nothing there): name another output"
            )
    elif path.is_dir():
        raise config_error(f"{path}: exists and is a folder (expected a file, or nothing there): name another output")


def write_final(final: Path, streamed: Streamed) -> None:
    """Write the voxels at `final` in the format that the target's suffix names, and force a file to disk."""
    suffix = streamed.path.suffix.lower()
    if suffix == "":
        write_png_folder(final, streamed)
    elif suffix == ".zarr":
        write_zarr(final, streamed)
    elif suffix in (".tif", ".tiff"):
        write_tiff(final, streamed)
    else:
        write_hdf5(final, streamed)
    if final.is_file():
        with final.open("rb") as file:
            os.fsync(file.fileno())


def chunk_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Cubes of about two million bytes, one channel each."""
    edge = 128 if dtype.itemsize == 1 else 64
    cube = tuple(min(edge, n) for n in shape[-3:])
    return (1,) * (len(shape) - 3) + cube


def blocks(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of whole chunks that cover a shape: as long along the last axes as BLOCK_BYTES allow."""
    edges = list(chunk)
    for axis in reversed(range(len(shape))):
        used = itemsize * int(np.prod(edges))
        edges[axis] *= max(1, min(-(-shape[axis] // edges[axis]), BLOCK_BYTES // used))
    starts = (range(0, n, edge) for n, edge in zip(shape, edges, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(c, min(c + edge, n)) for c, edge, n in zip(corner, edges, shape, strict=True))


def write_hdf5(final: Path, streamed: Streamed) -> None:
    """Dataset "main", chunked; integers compressed by gzip 1; attribute resolution: voxel size z, y, x in nm."""
    h5py = extra_package("h5py", f"{streamed.path}: writing HDF5")
    values = streamed.values.reshape(streamed.shape)
    chunk = chunk_of(values.shape, values.dtype)
    packed = {} if values.dtype.kind == "f" else {"compression": "gzip", "compression_opts": 1}
    with h5py.File(final, "w") as file:
        dataset = file.create_dataset("main", values.shape, values.dtype, chunks=chunk, **packed)
        if streamed.voxel_size_nm is not None:
            dataset.attrs["resolution"] = streamed.voxel_size_nm
        for box in blocks(values.shape, chunk, values.dtype.itemsize):
            dataset[box] = values[box]


def write_zarr(final: Path, streamed: Streamed) -> None:
    """An OME-NGFF 0.4 image (zarr version 2, which most viewers read) of one level, "0"."""
    zarr = extra_package("zarr", f"{streamed.path}: writing zarr")
    values = streamed.values.reshape(streamed.shape)
    chunk = chunk_of(values.shape, values.dtype)
    group = zarr.open_group(final, mode="w", zarr_format=2)
    keys = {"name": "v2", "separator": "/"}
    array = group.create_array("0", shape=values.shape, dtype=values.dtype, chunks=chunk, chunk_key_encoding=keys)
    size = (1.0,) * 3 if streamed.voxel_size_nm is None else streamed.voxel_size_nm
    unit = {} if streamed.voxel_size_nm is None else {"unit": "nanometer"}
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] if values.ndim == 4 else []
    axes += [{"name": axis, "type": "space", **unit} for axis in "zyx"]
    scale = [1.0] * (values.ndim - 3) + [float(s) for s in size]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    group.attrs["multiscales"] = [{"version": "0.4", "name": "main", "axes": axes, "datasets": [level]}]
    for box in blocks(values.shape, chunk, values.dtype.itemsize):
        array[box] = values[box]


def write_tiff(final: Path, streamed: Streamed) -> None:
    """Plain pages: an ImageJ stack of those dtypes below 4 GB, else BigTIFF in the order c, z; bool becomes uint8."""
    tifffile = extra_package("tifffile", f"{streamed.path}: writing TIFF")
    values = streamed.values.view(np.uint8) if streamed.values.dtype == bool else streamed.values
    imagej = values.dtype.name in IMAGEJ_DTYPES and values.nbytes < IMAGEJ_BYTES
    order = (1, 0) if imagej and len(values) > 1 else (0, 1)  # ImageJ's channels vary faster than its sections
    paged = values.transpose(*order, 2, 3)
    shape = paged.shape if len(values) > 1 else paged.shape[1:]
    axes = ("ZCYX" if imagej else "CZYX")[4 - len(shape) :] if len(values) > 1 else "ZYX"
    about: dict[str, Any] = {"axes": axes}
    resolution = None
    if imagej and streamed.voxel_size_nm is not None:
        z, y, x = streamed.voxel_size_nm
        about |= {"spacing": z, "unit": "nm"}
        resolution = (1 / x, 1 / y)
    pages = (np.ascontiguousarray(page) for group in paged for page in group)
    with tifffile.TiffWriter(final, bigtiff=not imagej, imagej=imagej) as file:
        file.write(
            pages, shape=shape, dtype=values.dtype, metadata=about, resolution=resolution, photometric="minisblack"
        )


def write_png_folder(final: Path, streamed: Streamed) -> None:
    final.mkdir()
    digits = max(4, len(str(streamed.values.shape[1] - 1)))
    for z, plane in enumerate(streamed.values[0]):
        Image.fromarray(np.asarray(plane)).save(final / f"slice_{z:0{digits}d}.png", compress_level=1)
