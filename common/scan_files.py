"""Volumes with a place in the patient from NIfTI, NRRD and MetaImage files.

NIfTI is read by nibabel; NRRD (Kindlmann's nrrd format, version 5) and MetaImage (ITK) are plain enough to be read here.
"""

import bz2
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.extras import extra_package
from common.files import parsing
from common.scans import Scan

LARGEST = 2**33  # bytes of a volume: what claims more is refused before it is unpacked
NRRD_TYPES = {"signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1",
              "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2", "int16": "i2", "int16_t": "i2",
              "ushort": "u2", "unsigned short": "u2", "uint16": "u2", "uint16_t": "u2", "int": "i4", "signed int": "i4",
              "int32": "i4", "int32_t": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4",
              "float": "f4", "double": "f8"}  # fmt: skip
META_TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
              "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}  # fmt: skip
# signs that bring x, y, z to left, posterior, superior
SPACES = {"left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
          "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1)}  # fmt: skip
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def read_scan(path: Path) -> Scan:
    """The volume of a file, axes as stored (see scans.canonical).

    Raises a config error for an unknown kind of file, a data error where the file is damaged, has not three axes, claims to be
    larger than LARGEST, or does not say where it lies.
    """
    readers: dict[str, Callable[[Path], Scan]] = {".nii": read_nifti, ".gz": read_nifti, ".nrrd": read_nrrd,
                                                  ".nhdr": read_nrrd, ".mha": read_meta, ".mhd": read_meta}  # fmt: skip
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise config_error(
            f"{path}: unknown kind of volume; expected one of {', '.join(SUFFIXES)}, or a folder of DICOM"
        )
    if not path.exists():
        raise config_error(f"{path}: no such file")
    with parsing(path, "is the file whole?"):
        return readers[path.suffix.lower()](path)


def read_nifti(path: Path) -> Scan:
    """A NIfTI file: i, j, k towards right, anterior, superior become z, y, x towards superior, posterior, left."""
    nibabel = extra_package("nibabel", f"{path}: reading NIfTI")
    image = nibabel.load(path)
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_size(path, shape, np.dtype(image.get_data_dtype()))
    stored = np.asarray(image.dataobj).reshape(shape)
    affine = (
        np.asarray(image.affine, float) * np.array([-1, -1, 1, 1])[:, None]
    )  # rows x, y, z: left, posterior, superior
    return from_file_order(path, stored, affine)


def from_file_order(path: Path, stored: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> Scan:
    """An array [i, j, k] and its map to x, y, z (left, posterior, superior) as a scan [z, y, x]."""
    turned = np.eye(4)
    turned[:3, :3] = affine[2::-1, 2::-1]
    turned[:3, 3] = affine[2::-1, 3]
    if not np.isfinite(turned).all() or abs(np.linalg.det(turned[:3, :3])) < 1e-12:
        raise data_error(f"{path}: does not say where its voxels lie (its directions span no volume)")
    if stored.dtype.kind not in "iuf":
        raise data_error(f"{path}: holds {stored.dtype}; expected integers or floats")
    return Scan(np.ascontiguousarray(stored.T).astype(stored.dtype.newbyteorder("="), copy=False), turned)


def check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The bytes that a volume takes; a data error unless it has three axes and is not too large."""
    if len(shape) != 3 or min(shape) < 1:
        raise data_error(f"{path}: has the axes {list(shape)}; expected three")
    size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if size > LARGEST:
        raise data_error(f"{path}: says it holds {size / 2**30:.1f} GiB; expected at most {LARGEST / 2**30:.0f}")
    return size


def read_nrrd(path: Path) -> Scan:
    """A NRRD file with its data attached or in one file beside it."""
    data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    if not data.startswith(b"NRRD"):
        raise ValueError("no NRRD file")
    end = min(found for found in (data.find(b"\n\n"), data.find(b"\r\n\r\n"), len(data)) if found >= 0)
    head, rest = data[:end], data[end:].removeprefix(b"\r\n\r\n" if data[end : end + 1] == b"\r" else b"\n\n")
    fields: dict[str, str] = {}
    for line in head.decode("ascii", "replace").splitlines()[1:]:
        name, separator, value = line.partition(":")
        if separator and not line.startswith("#") and not value.startswith("="):
            fields[name.strip().lower()] = value.strip()
    shape = tuple(int(n) for n in fields["sizes"].split())
    if fields["type"].lower() not in NRRD_TYPES:
        raise data_error(f"{path}: samples of type {fields['type']}; expected integers or floats")
    order = ">" if "endian" in fields and fields["endian"].lower() == "big" else "<"
    dtype = np.dtype(order + NRRD_TYPES[fields["type"].lower()])
    size = check_size(path, shape, dtype)
    named = [name for name in ("data file", "datafile") if name in fields]
    if named:
        rest = (path.parent / fields[named[0]]).read_bytes()
    stored = np.frombuffer(unpacked(rest, fields["encoding"].lower(), size), dtype).reshape(shape, order="F")
    return from_file_order(path, stored, nrrd_affine(path, fields))


def nrrd_affine(path: Path, fields: dict[str, str]) -> npt.NDArray[np.float64]:
    """The map of indices to x, y, z towards left, posterior, superior."""
    if "space" not in fields or "space directions" not in fields:
        raise data_error(f"{path}: says no space and directions; expected those of a patient (left-posterior-superior)")
    space = fields["space"].lower()
    if space not in SPACES:
        raise data_error(f"{path}: space {fields['space']}; expected one of {', '.join(SPACES)}")
    affine = np.eye(4)
    affine[:3, :3] = np.array([vector(word) for word in fields["space directions"].split(") ")]).T
    affine[:3, 3] = vector(fields["space origin"]) if "space origin" in fields else 0
    return np.asarray(affine * np.array([*SPACES[space], 1])[:, None], float)


def vector(words: str) -> list[float]:
    """The numbers of (1,0,0)."""
    return [float(word) for word in words.strip(" ()").split(",")]


def unpacked(data: bytes, encoding: str, size: int) -> bytes:
    """So many bytes of packed data; never more, whatever it holds."""
    if encoding in ("gzip", "gz", "zlib"):
        found = zlib.decompressobj(47).decompress(data, size)
    elif encoding in ("bzip2", "bz2"):
        found = bz2.BZ2Decompressor().decompress(data, size)
    elif encoding == "raw":
        found = data[:size]
    else:
        raise ValueError(f"encoding {encoding}; expected raw, gzip or bzip2")
    if len(found) < size:
        raise ValueError(f"{len(found)} bytes of samples, expected {size}")
    return found


def read_meta(path: Path) -> Scan:
    """A MetaImage, .mha or .mhd with its data in one file beside it."""
    data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    fields: dict[str, str] = {}
    place = 0
    while "ElementDataFile" not in fields:
        end = data.index(b"\n", place)
        name, separator, value = data[place:end].decode("ascii", "replace").partition("=")
        if not separator:
            raise ValueError("no MetaImage header")
        fields[name.strip()] = value.strip()
        place = end + 1
    shape = tuple(int(n) for n in fields["DimSize"].split())
    if fields["ElementType"] not in META_TYPES or (
        "ElementNumberOfChannels" in fields and fields["ElementNumberOfChannels"] != "1"
    ):
        raise data_error(f"{path}: samples of type {fields['ElementType']}; expected one integer or float per voxel")
    is_big = any(
        name in fields and fields[name] == "True" for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    )
    dtype = np.dtype((">" if is_big else "<") + META_TYPES[fields["ElementType"]])
    size = check_size(path, shape, dtype)
    local = fields["ElementDataFile"] == "LOCAL"
    rest = data[place:] if local else (path.parent / fields["ElementDataFile"]).read_bytes()
    packed = "CompressedData" in fields and fields["CompressedData"] == "True"
    stored = np.frombuffer(unpacked(rest, "zlib" if packed else "raw", size), dtype).reshape(shape, order="F")
    affine = np.eye(4)
    spacing = [float(v) for v in fields["ElementSpacing"].split()] if "ElementSpacing" in fields else [1.0] * 3
    for names, column in (
        (("TransformMatrix", "Rotation", "Orientation"), None),
        (("Offset", "Position", "Origin"), 3),
    ):
        there = [name for name in names if name in fields]
        if there and column is None:  # nine numbers, the direction of one axis after the other
            affine[:3, :3] = np.array([float(v) for v in fields[there[0]].split()]).reshape(3, 3).T
        elif there:
            affine[:3, 3] = [float(v) for v in fields[there[0]].split()]
    affine[:3, :3] *= spacing
    return from_file_order(path, stored, affine)
