"""Whole-volume inference: exact tiles for networks with a finite reach, blended windows for the others.

Exact: an output cell depends only on the input within a halo. Every output cell is computed once, from a tile widened by
the halo and cut at the volume's faces, so that convolutions meet the same zero padding as without tiles. Tiles start
at multiples of the network's alignment, so that strided convolutions sample the same grid.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Triple = tuple[int, int, int]
Box = tuple[Triple, Triple]  # first and one past the last cell, z y x


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: the input to read, and which part of its output to keep where."""

    read: Box  # input cells, with halo
    keep: tuple[slice, slice, slice]  # of the tile's own output
    write: tuple[slice, slice, slice]  # of the whole output


def cube(edge: int) -> Triple:
    """The same length along z, y and x."""
    return edge, edge, edge


def output_shape(shape: Triple, stride: int) -> Triple:
    """ceil(n / stride) per axis, as strided convolutions with half padding give it."""
    return -(-shape[0] // stride), -(-shape[1] // stride), -(-shape[2] // stride)


def exact_tiles(shape: Triple, tile: Triple, stride: int, alignment: Triple, halo: Triple) -> Iterator[Tile]:
    """Tiles that cover an input of `shape` once, z slowest; all lengths in input cells.

    tile: of kept input per tile, a multiple of alignment; alignment: a multiple of stride; halo: reach of the network.
    """
    assert all(edge % grid == 0 and grid % stride == 0 for edge, grid in zip(tile, alignment, strict=True)), (
        f"{tile}, {alignment}, {stride}"
    )
    margins = [-(-reach // grid) * grid for reach, grid in zip(halo, alignment, strict=True)]
    starts = [range(0, n, edge) for n, edge in zip(shape, tile, strict=True)]
    for corner in itertools.product(*starts):
        first, last, keep, write = [], [], [], []
        for start, edge, n, margin in zip(corner, tile, shape, margins, strict=True):
            stop = min(start + edge, n)
            begin, end = max(0, start - margin), min(stop + margin, n)
            first.append(begin)
            last.append(end)
            out_start, out_stop = start // stride, -(-stop // stride)
            keep.append(slice(out_start - begin // stride, out_stop - begin // stride))
            write.append(slice(out_start, out_stop))
        yield Tile(
            ((first[0], first[1], first[2]), (last[0], last[1], last[2])),
            (keep[0], keep[1], keep[2]),
            (write[0], write[1], write[2]),
        )


def balanced_tile(shape: Triple, largest: Triple, alignment: Triple) -> Triple:
    """The edges, multiples of alignment, of as few tiles as `largest` allows, all about equally large."""
    edges = []
    for n, limit, grid in zip(shape, largest, alignment, strict=True):
        count = -(-n // limit)
        edges.append(-(-n // (count * grid)) * grid)
    return edges[0], edges[1], edges[2]


def run_exactly(
    network: Callable[[Tensor], Tensor], read: Callable[[Box], Tensor], tiles: list[Tile], output: Tensor
) -> None:
    """Fill `output` (C, z, y, x) with the network's map, tile by tile; read gives (1, c, z, y, x) of a box."""
    for tile in tiles:
        computed = network(read(tile.read))[0]
        output[(slice(None), *tile.write)] = computed[(slice(None), *tile.keep)]


def window_starts(n: int, window: int, overlap: float) -> list[int]:
    """First cells of windows that cover n cells, at most window * (1 - overlap) apart, the last flush with the end."""
    if n <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = -(-(n - window) // step) + 1
    return [round(k * (n - window) / (count - 1)) for k in range(count)]


def gaussian_weights(shape: Triple, sigma_share: float, device: torch.device) -> Tensor:
    """A separable Gaussian over a window's cells, 1 at its middle; sigma is a share of each edge. (z, y, x)"""
    axes = []
    for n in shape:
        offset = torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2
        axes.append(torch.exp(-0.5 * (offset / max(sigma_share * n, 0.5)) ** 2))
    return axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]


def run_blended(
    network: Callable[[Tensor], Tensor],
    read: Callable[[Box], Tensor],
    shape: Triple,
    window: Triple,
    stride: int,
    overlap: float,
) -> Tensor:
    """The weighted mean of a network's map over overlapping windows, (C, ceil(z/stride), ...) float32; see blended_planes."""
    planes = (0, output_shape(shape, stride)[0])
    return torch.cat([part for _, part in blended_planes(network, read, shape, window, stride, overlap, planes)], 1)


def blended_planes(
    network: Callable[[Tensor], Tensor],
    read: Callable[[Box], Tensor],
    shape: Triple,
    window: Triple,
    stride: int,
    overlap: float,
    planes: tuple[int, int],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first plane, (C, dz, y, x) float32) of the output planes [first, last), as soon as no window is to come.

    Windows start at multiples of the stride; cells are weighted by a Gaussian of 1/8 of the window's edge. Only a window's
    depth of planes is held; any range of planes has the bits that it has as part of the whole.
    """
    _, high, wide = output_shape(shape, stride)
    starts = [window_starts(n, edge, overlap) for n, edge in zip(shape, window, strict=True)]
    rows = [start // stride for start in starts[0]]  # first plane of each row of windows
    ends = [-(-min(start + window[0], shape[0]) // stride) for start in starts[0]]
    used = [number for number in range(len(rows)) if rows[number] < planes[1] and ends[number] > planes[0]]
    deepest = max(ends[number] - rows[number] for number in used)
    sums: Tensor | None = None  # (C + 1, deepest, y, x), the weights as a last channel, from plane rows[used[...]] on
    for number, following in itertools.zip_longest(used, used[1:]):
        for y, x in itertools.product(starts[1], starts[2]):
            found, begin = run_window(network, read, shape, window, stride, (starts[0][number], y, x))
            if sums is None:
                sums = found.new_zeros(len(found) + 1, deepest, high, wide)
            place = sums[
                :, : found.shape[1], begin[1] : begin[1] + found.shape[2], begin[2] : begin[2] + found.shape[3]
            ]
            weights = gaussian_weights((found.shape[1], found.shape[2], found.shape[3]), 1 / 8, found.device)
            place[:-1] += weights * found
            place[-1] += weights
        assert sums is not None
        done = (rows[following] if following is not None else ends[number]) - rows[
            number
        ]  # planes without more to come
        first, last = max(rows[number], planes[0]), min(rows[number] + done, planes[1])
        if last > first:
            part = sums[:, first - rows[number] : last - rows[number]]
            yield first, part[:-1] / part[-1:]
        kept = deepest - done
        for plane in range(kept):  # one after the other: in place, without a copy of all
            sums[:, plane] = sums[:, plane + done]
        sums[:, max(kept, 0) :] = 0


def run_window(
    network: Callable[[Tensor], Tensor],
    read: Callable[[Box], Tensor],
    shape: Triple,
    window: Triple,
    stride: int,
    start: Triple,
) -> tuple[Tensor, list[int]]:
    """The network's map (C, z, y, x) float32 of the window at a start, and the output cell that it begins at."""
    begin = [first // stride * stride for first in start]
    end = [min(first + edge, n) for first, edge, n in zip(start, window, shape, strict=True)]
    found = network(read(((begin[0], begin[1], begin[2]), (end[0], end[1], end[2]))))[0].float()
    return found, [first // stride for first in begin]
