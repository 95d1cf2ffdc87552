"""Which two voxels an affinity speaks of, in one canonical form for both conventions of storing and any sign of offset.

A link joins the voxels w and w + offset, where the first component of the offset that is not 0 is positive.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from common.errors import config_error
from em_segmentation.regions import Triple

Slices = tuple[slice, slice, slice]
Volume = npt.NDArray[np.uint8]
STORED_AT = ("source", "destination")
STEPS: tuple[Triple, Triple, Triple] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
FULL = 255  # an affinity, or a boundary, that is certain


@dataclasses.dataclass(frozen=True)
class Link:
    """Pairs of voxels (w, w + offset) with one affinity each."""

    channel: int
    offset: Triple
    at_upper: bool  # the affinity is stored at w + offset instead of w
    of_boundary: bool  # the channel holds boundaries: the affinity is 255 - the larger of the two

    @property
    def is_direct(self) -> bool:
        """Whether the two voxels share a face."""
        return sum(map(abs, self.offset)) == 1


def affinity_links(offsets: tuple[Triple, ...], stored_at: str) -> tuple[Link, ...]:
    """One link per affinity channel; "source": aff[c, v] joins v and v + offset, "destination": v - offset and v.

    Raises a config error for an offset of nothing but zeros and for an unknown place.
    """
    if stored_at not in STORED_AT:
        raise config_error(f"stored_at: {stored_at!r} (expected source or destination): say where affinities lie")
    links = []
    for channel, offset in enumerate(offsets):
        if not any(offset):
            raise config_error(f"offsets: channel {channel} joins voxels to themselves (0, 0, 0): remove it")
        is_canonical = next(step for step in offset if step) > 0
        upward = offset if is_canonical else (-offset[0], -offset[1], -offset[2])
        links.append(Link(channel, upward, (stored_at == "destination") == is_canonical, False))
    return tuple(links)


def boundary_links() -> tuple[Link, ...]:
    """Links of direct neighbours of a volume [1, z, y, x] of boundary probabilities."""
    return tuple(Link(0, step, False, True) for step in STEPS)


def sides(start: Triple, stop: Triple, shape: Triple, offset: Triple) -> tuple[Slices, Slices]:
    """Where w and w + offset lie, for w from start to before stop, as far as w + offset is inside the shape."""
    lower, upper = [], []
    for first, last, n, step in zip(start, stop, shape, offset, strict=True):
        begin = max(first, -step)
        end = max(begin, min(last, n - step))
        lower.append(slice(begin, end))
        upper.append(slice(begin + step, end + step))
    return (lower[0], lower[1], lower[2]), (upper[0], upper[1], upper[2])


def link_affinities(volume: Volume, link: Link, lower: Slices, upper: Slices) -> Volume:
    """The affinities 0..255 of a link's pairs, of the slices' shape; volume [c, z, y, x]."""
    channel: Volume = volume[link.channel]
    if link.of_boundary:
        weakest: Volume = np.subtract(FULL, np.maximum(channel[lower], channel[upper]), dtype=np.uint8)
        return weakest
    stored: Volume = channel[upper if link.at_upper else lower]
    return stored


def shape_of(volume: npt.NDArray[np.generic]) -> Triple:
    """The last three lengths: z, y, x."""
    z, y, x = volume.shape[-3:]
    return z, y, x
