"""Names of arrays inside one file or folder (HDF5, zarr): what to say when one is missing, wrong or not the only one."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError, config_error, data_error

MAX_LISTED = 12
NEAR = 0.4  # share of equal letters from which a name is proposed


def wrong_key(path: Path, what: str, datasets: Mapping[str, Any], key: str) -> UserError:
    """The error for a missing or wrong name of a dataset: what there is, the nearest name, and how to write it."""
    if not datasets:
        return data_error(f"{path}: {what}; it holds no array at all: export it again")
    listed = [f"{name} {tuple(d.shape)} {d.dtype}" for name, d in datasets.items()]
    rest = [f"... {len(listed) - MAX_LISTED} more"] if len(listed) > MAX_LISTED else []
    names = list(datasets)
    near = difflib.get_close_matches(key, names, 1, NEAR) or [n for n in names if key and n.split("/")[-1] == key]
    volumes = [name for name, d in datasets.items() if len(d.shape) >= 2] or names
    remedy = f"did you mean {path.name}:{near[0]}" if near else f"name one, such as {path.name}:{volumes[0]}"
    return config_error(f"{path}: {what} (it holds {', '.join([*listed[:MAX_LISTED], *rest])}): {remedy}")
