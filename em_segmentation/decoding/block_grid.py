"""Blocks of a volume, what is read around them, and the files that they leave in a scratch folder."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.files import parsing, write_atomically
from em_segmentation.decoding.links import Slices, Volume
from em_segmentation.decoding.region_graph import Ids
from em_segmentation.decoding.settings import Settings
from em_segmentation.regions import Triple

Table = npt.NDArray[np.generic]


class ChannelReader(Protocol):
    """A volume [c, z, y, x] of uint8 that is read in boxes; it must be picklable to be read by other processes."""

    @property
    def shape(self) -> Triple:
        """z, y, x."""
        ...

    @property
    def num_channels(self) -> int:
        """c."""
        ...

    def read_channels(self, corner: Triple, size: Triple) -> Volume:
        """The box [c, *size] from corner on."""
        ...


class LabelWriter(Protocol):
    """Takes finished blocks, in any order and from any process."""

    def write(self, corner: Triple, labels: npt.NDArray[np.unsignedinteger]) -> None:
        """Keep labels [z, y, x] at corner."""
        ...


@dataclasses.dataclass(frozen=True)
class Box:
    """Voxels from start to before stop."""

    start: Triple
    stop: Triple

    @property
    def size(self) -> Triple:
        """Edges."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def within(self, other: "Box") -> Slices:
        """This box as slices of an array of another one."""
        z, y, x = (slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, other.start, strict=True))
        return z, y, x

    def common(self, other: "Box") -> "Box":
        """The voxels of both (they must have some)."""
        first = [max(a, b) for a, b in zip(self.start, other.start, strict=True)]
        last = [min(a, b) for a, b in zip(self.stop, other.stop, strict=True)]
        return Box((first[0], first[1], first[2]), (last[0], last[1], last[2]))

    def widened(self, below: Triple, above: Triple, shape: Triple) -> "Box":
        """The box with margins, cut at the faces of the volume."""
        first = [max(0, a - m) for a, m in zip(self.start, below, strict=True)]
        last = [min(n, b + m) for b, m, n in zip(self.stop, above, shape, strict=True)]
        return Box((first[0], first[1], first[2]), (last[0], last[1], last[2]))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Blocks that cover a volume once, numbered with z slowest."""

    shape: Triple
    block: Triple

    @property
    def counts(self) -> Triple:
        """Blocks along z, y, x."""
        z, y, x = (-(-n // edge) for n, edge in zip(self.shape, self.block, strict=True))
        return z, y, x

    def __len__(self) -> int:
        return int(np.prod(self.counts))

    def box(self, number: int) -> Box:
        """The voxels of a block."""
        place = np.unravel_index(number, self.counts)
        start = [int(k) * edge for k, edge in zip(place, self.block, strict=True)]
        stop = [min(a + edge, n) for a, edge, n in zip(start, self.block, self.shape, strict=True)]
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def meeting(self, box: Box) -> list[int]:
        """The blocks that have voxels in a box."""
        ranges = [range(a // e, -(-b // e)) for a, b, e in zip(box.start, box.stop, self.block, strict=True)]
        return [int(np.ravel_multi_index(place, self.counts)) for place in itertools.product(*ranges)]


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker must know; picklable where the reader is."""

    reader: ChannelReader
    settings: Settings
    grid: Grid
    scratch: Path

    def has(self, name: str) -> bool:
        """Whether a table was written."""
        return (self.scratch / f"{name}.npy").exists()

    def save(self, name: str, table: Table) -> None:
        """Write a table, whole or not at all."""
        write_atomically(self.scratch / f"{name}.npy", lambda file: np.save(file, table, allow_pickle=False))

    def load(self, name: str) -> npt.NDArray[np.int64]:
        """A table of whole numbers."""
        path = self.scratch / f"{name}.npy"
        with parsing(path, f"delete {self.scratch} and start the same command again"):
            loaded: npt.NDArray[np.int64] = np.load(path, allow_pickle=False)
        return loaded

    def mapped(self, name: str) -> npt.NDArray[np.int64]:
        """A table of which only what is used is read."""
        path = self.scratch / f"{name}.npy"
        with parsing(path, f"delete {self.scratch} and start the same command again"):
            loaded: npt.NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
        return loaded

    def read(self, box: Box) -> Volume:
        """Channels [c, z, y, x] of a box."""
        return np.ascontiguousarray(self.reader.read_channels(box.start, box.size))

    def gathered(self, box: Box, name: str, table_of: Callable[[int], Table]) -> Ids:
        """table_of(N)[NAME_N] of the blocks N in a box [z, y, x]."""
        found = np.empty(box.size, np.int32)
        for number in self.grid.meeting(box):
            block = self.grid.box(number)
            shared = box.common(block)
            local = np.asarray(self.mapped(f"{name}_{number}")[shared.within(block)])
            found[shared.within(box)] = np.take(table_of(number), local)
        return found

    def nodes(self, box: Box) -> Ids:
        """Labels [z, y, x] of a box, from the first pass and numbered through all blocks by the table `of_node`."""
        return self.gathered(box, "labels", functools.partial(self.part, "of_node", "offsets"))

    def objects(self, box: Box) -> Ids:
        """The final ids [z, y, x] of a box, holes not filled."""
        return self.gathered(box, "labels", functools.partial(self.part, "final", "offsets"))

    def part(self, name: str, offsets: str, number: int) -> Table:
        """What a table over the labels of all blocks says of block `number`."""
        first = self.load(offsets)
        return np.asarray(self.mapped(name)[first[number] : first[number + 1]])
