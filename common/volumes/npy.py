"""Plain .npy arrays."""

from pathlib import Path

import numpy as np

from common.errors import data_error
from common.volumes.axes import AUTO, arrange
from common.volumes.volume import MappedVolume, check_dtype

NPY_SUFFIXES = (".npy",)


def open_npy(path: Path, axes: str) -> MappedVolume:
    """A .npy file of a real array in C or Fortran order; pickles are never executed."""
    remedy = "save a plain numeric array again with np.save"
    try:
        stored = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it opens no .npz and no pickle
    except OSError:
        raise
    except Exception as error:  # a damaged header ends in whatever Python's own parser raises
        size = path.stat().st_size
        raise data_error(f"{path}: truncated or no plain array ({error}; {size} bytes): {remedy}") from error
    dtype = check_dtype(str(path), stored.dtype, remedy)
    meaning, shape, channels = arrange(str(path), stored.shape, axes, AUTO)
    turned = stored.flags.f_contiguous and not stored.flags.c_contiguous
    stored_shape, order = stored.shape, tuple(range(stored.ndim))
    if turned:
        stored_shape, order = stored_shape[::-1], order[::-1]
    return MappedVolume(path, meaning, shape, channels, dtype, None, stored.offset, stored.dtype, stored_shape, order)
