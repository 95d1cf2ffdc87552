"""The constants of ct_retrieval, each with unit and reason, and the presets made from them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.config import outside


@dataclasses.dataclass(frozen=True)
class Grid:
    """What every stored volume is sampled onto."""

    shape: tuple[int, int, int] = (300, 270, 270)  # voxels z, y, x: the lungs of nearly all adults
    spacing_mm: float = 1.0  # along all axes
    low_hu: float = -1000.0  # byte 0: air
    high_hu: float = 200.0  # byte 255: enhanced vessels and bone alike

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"shape": (8, 2048), "spacing_mm": (0.1, 20)})
        if not -4000 <= self.low_hu < self.high_hu <= 4000:
            yield f"low_hu, high_hu: expected -4000 <= low < high <= 4000, got {self.low_hu:g}, {self.high_hu:g}"


@dataclasses.dataclass(frozen=True)
class Ingest:
    centre: Literal["lungs", "volume"] = "lungs"  # what the crop is laid about; lungs: the body where none are
    least_extent_mm: float = 100.0  # along z, below which a series is no chest: a few slices, a biopsy

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"least_extent_mm": (0, 2000)})


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path = Path("runs/ct_retrieval")  # of all runs' folders
    preset: str = "archive"
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    run: Run = dataclasses.field(default_factory=Run)
    grid: Grid = dataclasses.field(default_factory=Grid)
    ingest: Ingest = dataclasses.field(default_factory=Ingest)


ARCHIVE = Config()
PRESETS = {"archive": ARCHIVE}
