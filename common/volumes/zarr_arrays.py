"""Zarr arrays, version 2 and 3, and OME-NGFF images: level 0 of the pyramid, axes and voxel size as stated there."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import config_error
from common.extras import extra_package
from common.files import parsing
from common.volumes.axes import AUTO, LETTERS, arrange
from common.volumes.keys import wrong_key
from common.volumes.volume import StoredBox, Volume, check_dtype
from common.volumes.voxel_size import ANGSTROM_PER, spacing_from_attributes, spacing_in_angstrom

ZARR_SUFFIXES = (".zarr",)
ZARR_MARKS = ("zarr.json", ".zarray", ".zgroup")
DAMAGED = "copy or export it again"


@dataclasses.dataclass(frozen=True)
class ZarrVolume(Volume):
    """One array inside a zarr folder; opened anew by every read, so that it survives forks and pickling."""

    key: str

    def _read_stored(self, box: StoredBox) -> npt.NDArray[Any]:
        zarr = extra_package("zarr", f"{self.path}: reading zarr")
        with parsing(self.path, DAMAGED):
            return np.asarray(zarr.open_array(self.path, path=self.key, mode="r")[box])


def is_zarr(folder: Path) -> bool:
    """Whether a folder holds a zarr group or array."""
    return any((folder / mark).is_file() for mark in ZARR_MARKS)


def open_zarr(path: Path, key: str, axes: str) -> ZarrVolume:
    """An array by its path inside the folder; a group stands for its only array, or level 0 of an OME-NGFF image.

    Errors: a config error for a wrong key, which lists what there is, or where zarr is absent; a data error for damage.
    """
    zarr = extra_package("zarr", f"{path}: reading zarr")
    with parsing(path, DAMAGED):
        root = zarr.open(path, mode="r")
        array, inner = find_array(zarr, path, root, key.strip("/"))
    where = f"{path}:{inner}" if inner else str(path)
    dtype = check_dtype(where, np.dtype(array.dtype), "name another array, or save it as plain numbers")
    with parsing(path, DAMAGED):
        own_axes, sizes = stated_by_image(root, inner)
    ndim = len(array.shape)
    meaning, shape, channels = arrange(where, tuple(array.shape), axes, own_axes if len(own_axes) == ndim else AUTO)
    spacing = spacing_from_attributes(meaning, array.attrs.asdict())
    if len(sizes) == ndim:
        of_space = [size for axis, size in zip(meaning, sizes, strict=True) if axis in "zyx"]
        spacing = spacing_in_angstrom(meaning, of_space, 1) if "z" in meaning else None
    return ZarrVolume(path, meaning, shape, channels, dtype, spacing, inner)


def find_array(zarr: Any, path: Path, root: Any, key: str) -> tuple[Any, str]:
    """The array that a key means, and its own path inside the folder."""
    if isinstance(root, zarr.Array):
        if key:
            raise config_error(f"{path}: is one array, without names inside (found '{key}'): leave ':{key}' away")
        return root, ""
    found = root if not key else root[key] if key in root else None
    if isinstance(found, zarr.Array):
        return found, key
    prefix = f"{key}/" if key else ""
    if found is not None and (levels := multiscales(found)):
        inner = prefix + str(levels[0]["datasets"][0]["path"])  # level 0: full size
        return root[inner], inner
    arrays = {
        name: node
        for name, node in sorted(root.members(max_depth=None), key=lambda m: m[0])
        if isinstance(node, zarr.Array)
    }
    if found is None:
        raise wrong_key(path, f"no array '{key}'", arrays, key)
    inside = {name: node for name, node in arrays.items() if name.startswith(prefix)}
    volumes = [name for name, node in inside.items() if len(node.shape) >= 2]
    if len(volumes) == 1:
        return arrays[volumes[0]], volumes[0]
    raise wrong_key(path, f"'{key}' is a group" if key else "expected the name of one array", inside or arrays, "")


def multiscales(group: Any) -> list[Any]:
    """The pyramids that a group describes: OME-NGFF 0.5 keeps them under "ome", older versions at the top."""
    attributes = group.attrs.asdict()
    nested = attributes["ome"] if "ome" in attributes else attributes
    return list(nested["multiscales"]) if "multiscales" in nested else []


def stated_by_image(root: Any, inner: str) -> tuple[str, list[float]]:
    """The axes ("auto" where none are stated) and the size of a voxel along each in angstrom (nan where unknown).

    Source: OME-NGFF 0.4 and 0.5, "multiscales" metadata: scale of the level times the scale of all levels.
    """
    parent, _, name = inner.rpartition("/")
    if not inner:
        return AUTO, []
    for image in multiscales(root[parent] if parent else root):
        levels = [level for level in image["datasets"] if str(level["path"]) == name]
        if not levels or "axes" not in image:
            continue
        axes = [axis if isinstance(axis, dict) else {"name": str(axis)} for axis in image["axes"]]
        names = "".join(str(axis["name"]) for axis in axes)
        units = [str(axis["unit"]).lower() if "unit" in axis else "" for axis in axes]
        sizes = [ANGSTROM_PER[unit] if unit in ANGSTROM_PER else math.nan for unit in units]
        scaled = False
        for step in (*transformations(levels[0]), *transformations(image)):
            if step["type"] == "scale":
                sizes = [size * float(factor) for size, factor in zip(sizes, step["scale"], strict=True)]
                scaled = True
        return names if len(names) == len(axes) and set(names) <= set(LETTERS) else AUTO, sizes if scaled else []
    return AUTO, []


def transformations(described: Any) -> list[Any]:
    return list(described["coordinateTransformations"]) if "coordinateTransformations" in described else []
