"""The volume store: one file of bytes per study, mapped into memory, and beside it what the bytes mean and where they are from.

STORE/volumes/NAME.npy   [z, y, x] uint8
STORE/volumes/NAME.json  grid, window, verdict; of the patient a keyed hash
STORE/key                32 random bytes of that hash; it stays with whoever owns the archive
"""

import dataclasses
import hashlib
import hmac
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import data_error
from common.files import parsing, read_text, write_atomically
from ct_retrieval.config import Grid
from ct_retrieval.resampling import Bytes, Window

NAME = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is known of a stored volume."""

    name: str
    patient: str  # keyed hash; of unknown patients the study's own
    source: str  # digest of what it was made from
    status: str  # ok or repaired
    findings: list[dict[str, str]]
    centre_mm: list[float]  # patient z, y, x of the crop's middle
    centre_of: str  # lungs, body or volume
    lungs_ml: float
    scan_shape: list[int]  # z, y, x
    scan_spacing_mm: list[float]
    grid: dict[str, Any]  # shape, spacing and window that the bytes have


def safe_name(words: str) -> str:
    """A file's name of any words."""
    return NAME.sub("_", words).strip("._") or "study"


def store_key(store: Path) -> bytes:
    """The store's secret, drawn on first use."""
    path = store / "key"
    if not path.exists():
        write_atomically(path, lambda file: file.write(os.urandom(32)))
        path.chmod(0o600)
    return path.read_bytes()


def patient_hash(key: bytes, identity: str) -> str:
    """A patient's name in the store: equal for equal identities, and nothing else without the key."""
    return hmac.new(key, identity.encode(), hashlib.sha256).hexdigest()[:16]


def volume_path(store: Path, name: str) -> Path:
    """Where a study's bytes lie."""
    return store / "volumes" / f"{name}.npy"


def write_study(store: Path, study: Study, volume: Bytes) -> None:
    """Write a volume, then what is known of it: a study is there once both are."""
    write_atomically(volume_path(store, study.name), lambda file: np.save(file, volume))
    text = json.dumps(dataclasses.asdict(study), indent=1) + "\n"
    write_atomically(volume_path(store, study.name).with_suffix(".json"), lambda file: file.write(text.encode()))


def read_study(path: Path) -> Study:
    """What a study's JSON says."""
    with parsing(path, "ingest.py writes it anew"):
        return Study(**json.loads(read_text(path)))


def studies_of(store: Path) -> dict[str, Study]:
    """All studies of a store by name, sorted."""
    found = {}
    for path in sorted((store / "volumes").glob("*.json")):
        if path.with_suffix(".npy").exists():
            found[path.stem] = read_study(path)
    return found


def open_volume(store: Path, study: Study) -> npt.NDArray[np.uint8]:
    """A study's bytes, mapped: what is not looked at is not read. A data error where they are not those it was stored as."""
    path = volume_path(store, study.name)
    with parsing(path, "ingest.py writes it anew"):
        volume: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    if volume.dtype != np.uint8 or list(volume.shape) != list(study.grid["shape"]):
        raise data_error(f"{path}: holds {volume.dtype} {list(volume.shape)}; expected uint8 {study.grid['shape']}")
    return volume


def window_of(grid: Grid) -> Window:
    """The window of a grid's bytes."""
    return Window(grid.low_hu, grid.high_hu)
