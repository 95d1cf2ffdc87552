"""Regions of maps: boxes of cells along z, y, x, and how they lie in coarser, finer and smaller maps."""

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[int, int, int]  # z, y, x
VoxelSize = tuple[float, float, float]  # nm, z y x
Region = tuple[slice, slice, slice]  # z, y, x; start and stop are numbers


def everywhere(x: Tensor) -> Region:
    """The region that is all of a map (..., z, y, x)."""
    return slice(0, x.shape[-3]), slice(0, x.shape[-2]), slice(0, x.shape[-1])


def divided(region: Region, factors: Triple) -> Region:
    """The coarser cells, by factors along z, y, x, that touch a region."""
    z, y, x = (slice(part.start // f, -(-part.stop // f)) for part, f in zip(region, factors, strict=True))
    return z, y, x


def widened(region: Region, reach: Triple, shape: Sequence[int]) -> Region:
    """A region and what lies within reach of it, inside a map of this shape (z, y, x)."""
    z, y, x = (
        slice(max(0, part.start - r), min(n, part.stop + r)) for part, r, n in zip(region, reach, shape, strict=True)
    )
    return z, y, x


def seen_from(origin: Region, factors: Triple, region: Region) -> Region:
    """Where a region lies in the map that a map of just `origin` becomes when it is made finer by factors."""
    z, y, x = (
        slice(part.start - first.start * f, part.stop - first.start * f)
        for part, first, f in zip(region, origin, factors, strict=True)
    )
    return z, y, x


def cut(x: Tensor, region: Region) -> Tensor:
    """A region of a map (B, C, z, y, x), channels last in memory of its own; the map itself where that is all of it."""
    if region == everywhere(x):
        return x
    return x[:, :, region[0], region[1], region[2]].clone(memory_format=torch.channels_last_3d)
