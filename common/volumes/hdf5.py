"""HDF5 files: one dataset, named as file.h5:path/inside unless the file holds only one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from common.errors import data_error
from common.extras import extra_package
from common.files import parsing
from common.volumes.axes import AUTO, arrange
from common.volumes.keys import wrong_key
from common.volumes.volume import StoredBox, Volume, check_dtype, first_line
from common.volumes.voxel_size import spacing_from_attributes

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
DAMAGED = "copy or export it again"
FILTER_NAMES = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}


@dataclasses.dataclass(frozen=True)
class Hdf5Volume(Volume):
    """One dataset of an HDF5 file; opened anew by every read, so that it survives forks and pickling."""

    key: str

    def _read_stored(self, box: StoredBox) -> npt.NDArray[Any]:
        with open_file(self.path) as file, parsing(self.path, DAMAGED):
            stored: npt.NDArray[Any] = file[self.key][box]
        return stored


def open_hdf5(path: Path, key: str, axes: str) -> Hdf5Volume:
    """A dataset by its path inside the file; "" or a group stands for the only dataset in it.

    Errors: a data error for a damaged file and a config error for a wrong key, which lists what the file holds; a
    config error where h5py is absent.
    """
    with open_file(path) as file, parsing(path, DAMAGED):
        dataset = find_dataset(path, file, key)
        where = f"{path}:{dataset.name.strip('/')}"
        check_filters(where, dataset)
        dtype = check_dtype(where, dataset.dtype, "name another dataset, or save it as plain numbers")
        meaning, shape, channels = arrange(where, dataset.shape or (), axes, AUTO)
        spacing = spacing_from_attributes(meaning, plain(dataset.attrs))
        if spacing is None:
            spacing = spacing_from_attributes(meaning, plain(file.attrs))
        return Hdf5Volume(path, meaning, shape, channels, dtype, spacing, dataset.name)


def open_file(path: Path) -> Any:
    """The file, open for reading; a data error where it is truncated or of another kind."""
    h5py = extra_package("h5py", f"{path}: reading HDF5")
    try:
        return h5py.File(path, "r", locking="best-effort")
    except PermissionError:
        raise
    except OSError as error:
        raise data_error(f"{path}: truncated or no HDF5 file ({first_line(error)}): copy or export it again") from error


def plain(attributes: Any) -> Mapping[str, Any]:
    """The attributes that can be read: a damaged or exotic one is no reason to refuse the voxels."""
    found: dict[str, Any] = {}
    for name in attributes:
        try:
            found[name] = attributes[name]
        except (OSError, TypeError, ValueError, RuntimeError):
            continue
    return found


def find_dataset(path: Path, file: Any, key: str) -> Any:
    h5py = extra_package("h5py", f"{path}: reading HDF5")
    inner = key.strip("/")
    try:
        found = file if not inner else file[inner]
    except (KeyError, ValueError, OSError, RuntimeError):
        found = None
    if isinstance(found, h5py.Dataset):
        return found
    datasets = datasets_in(h5py, path, file)
    if isinstance(found, h5py.Group):
        inside = {name: d for name, d in datasets.items() if not inner or name.startswith(f"{inner}/")}
        volumes = [d for d in inside.values() if d.ndim >= 2]
        if len(volumes) == 1:
            return volumes[0]
        what = f"'{inner}' is a group" if inner else "expected the name of one dataset"
        raise wrong_key(path, what, inside or datasets, "")
    raise wrong_key(path, f"no dataset '{inner}'", datasets, inner)


def datasets_in(h5py: Any, path: Path, file: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = item

    try:
        file.visititems(note)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise data_error(f"{path}: damaged HDF5 file ({first_line(error)}): copy or export it again") from error
    return found


def check_filters(where: str, dataset: Any) -> None:
    """A data error where the dataset's compression needs a plugin that is not there."""
    h5py = extra_package("h5py", f"{where}: reading HDF5")
    settings = dataset.id.get_create_plist()
    for i in range(settings.get_nfilters()):
        number = settings.get_filter(i)[0]
        if not h5py.h5z.filter_avail(number):
            name = FILTER_NAMES[number] if number in FILTER_NAMES else "unknown"
            remedy = "write it again with gzip, for example: h5repack -f GZIP=1 IN OUT"
            raise data_error(
                f"{where}: compressed by HDF5 filter {number} ({name}), which is not installed here: {remedy}"
            )
