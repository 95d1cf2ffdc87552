"""Test-time augmentation: the network sees a tile flipped and turned, its output is brought back and averaged.

An affinity belongs to a direction. Turned back, the channel of offset o speaks of the offset M o, where M is the turn: it
is another channel, or that channel seen from the edge's other end, one offset further. Averaging flipped affinities
without this is wrong at every boundary.
"""

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import config_error
from em_segmentation.regions import Region, Triple, seen_from, widened

PartNetwork = Callable[[Tensor, Region], Tensor]  # (1, c, z, y, x) -> the output (1, C, ...) in a region, to be changed


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seen tile: y and x swapped if `swapped`, then reversed along the flipped axes."""

    flips: tuple[bool, bool, bool]
    swapped: bool

    def see(self, x: Tensor) -> Tensor:
        """(..., z, y, x) as the network sees it."""
        x = x.transpose(-1, -2) if self.swapped else x
        return x.flip(self._axes()) if any(self.flips) else x

    def back(self, x: Tensor) -> Tensor:
        """What the network said (..., z, y, x), in the tile's own axes."""
        x = x.flip(self._axes()) if any(self.flips) else x
        return x.transpose(-1, -2) if self.swapped else x

    def see_region(self, region: Region, shape: Triple) -> Region:
        """Where a region of a tile of this shape (z, y, x) lies in the seen tile."""
        parts, sizes = list(region), list(shape)
        if self.swapped:
            parts[1:], sizes[1:] = parts[:0:-1], sizes[:0:-1]
        z, y, x = (
            slice(n - part.stop, n - part.start) if flip else part
            for part, n, flip in zip(parts, sizes, self.flips, strict=True)
        )
        return z, y, x

    def offset_back(self, offset: Triple) -> Triple:
        """The offset in the tile's own axes that an offset in the seen tile is."""
        z, y, x = (-step if flip else step for step, flip in zip(offset, self.flips, strict=True))
        return (z, x, y) if self.swapped else (z, y, x)

    def _axes(self) -> list[int]:
        return [axis - 3 for axis, flip in enumerate(self.flips) if flip]


def turns_of(name: str) -> list[Turn]:
    """The turns of inference.tta; the first is the tile as it is."""
    flips_z = (False,) if name in ("none", "flips_in_plane", "turns_in_plane") else (False, True)
    flips_yx = [(False, False)] if name == "none" else list(itertools.product((False, True), repeat=2))
    swaps = (False, True) if name in ("turns_in_plane", "all") else (False,)
    return [Turn((z, y, x), swap) for swap, z, (y, x) in itertools.product(swaps, flips_z, flips_yx)]


def affinity_moves(turn: Turn, offsets: tuple[Triple, ...], stored_at: str) -> list[tuple[int, Triple]]:
    """Per channel: the channel of the turned output that speaks of the same edges, and where: at v + shift.

    Raises a config error where no channel does.
    """
    backs = [turn.offset_back(offset) for offset in offsets]
    moves: list[tuple[int, Triple]] = []
    sign = 1 if stored_at == "source" else -1
    for z, y, x in offsets:
        if (z, y, x) in backs:
            moves.append((backs.index((z, y, x)), (0, 0, 0)))
        elif (-z, -y, -x) in backs:
            moves.append((backs.index((-z, -y, -x)), (sign * z, sign * y, sign * x)))
        else:
            raise config_error(
                f"inference.tta: turned, no offset of targets.affinity_offsets becomes {[z, y, x]}; expected offsets that "
                "turns exchange, or inference.tta=none"
            )
    return moves


def averaged(
    network: PartNetwork, turns: list[Turn], affinities: slice, offsets: tuple[Triple, ...], stored_at: str
) -> PartNetwork:
    """A network of probabilities as its mean over turns, the first of them none.

    affinities: its channels that belong to offsets. Near a face, an edge that a turn cannot know is averaged without it.
    """
    if len(turns) == 1:
        return network
    moves = [affinity_moves(turn, offsets, stored_at) if affinities.stop > affinities.start else [] for turn in turns]
    steps = offsets if affinities.stop > affinities.start else ()
    reach = [max((abs(offset[axis]) for offset in steps), default=0) for axis in range(3)]

    def average(x: Tensor, region: Region) -> Tensor:
        shape: Triple = (x.shape[2], x.shape[3], x.shape[4])
        wide = widened(region, (reach[0], reach[1], reach[2]), shape)  # other ends of the region's edges
        total = network(x, wide)
        size: Triple = (total.shape[2], total.shape[3], total.shape[4])
        count = torch.ones(total.shape[1:], dtype=torch.uint8, device=x.device)  # (C, z, y, x)
        for turn, affinity_move in zip(turns[1:], moves[1:], strict=True):
            seen = network(turn.see(x), turn.see_region(wide, shape))
            for channel in range(total.shape[1]):  # brought back one by one: a whole copy is large
                source, shift = channel, (0, 0, 0)
                if affinities.start <= channel < affinities.stop:
                    source, shift = affinity_move[channel - affinities.start]
                    source += affinities.start
                here, there = overlap(shift, size)
                total[:, channel][(slice(None), *here)] += turn.back(seen[:, source])[(slice(None), *there)]
                count[channel][here] += 1
            del seen  # before the next one is computed
        return total.div_(count)[(slice(None), slice(None), *seen_from(wide, (1, 1, 1), region))]

    return average


def overlap(shift: Triple, shape: Triple) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels v for which v + shift lies inside too, and those v + shift."""
    here = tuple(slice(max(0, -s), max(0, n - max(0, s))) for s, n in zip(shift, shape, strict=True))
    there = tuple(slice(max(0, s), max(0, n + min(0, s))) for s, n in zip(shift, shape, strict=True))
    return here, there
