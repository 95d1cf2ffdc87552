"""Packages that only some formats need; their absence is said where it matters."""

import importlib
from typing import Any

from common.errors import config_error

PINNED = {
    "h5py": "3.16.0",
    "zarr": "3.1.6",
    "tifffile": "2026.3.3",
    "pydicom": "3.0.2",
    "nibabel": "5.4.2",
}  # as in requirements-extras.txt


def extra_package(name: str, purpose: str) -> Any:
    """The imported package; a config error where it is absent. purpose: "train.h5: reading HDF5"."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = f"pip install {name}=={PINNED[name]} (requirements-extras.txt)"
        raise config_error(f"{purpose} needs {name}; {install}") from error
