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


def output_shape(shape: Triple, stride: int) -> Triple:
    """ceil(n / stride) per axis, as strided convolutions with half padding give it."""
    return -(-shape[0] // stride), -(-shape[1] // stride), -(-shape[2] // stride)


def exact_tiles(shape: Triple, tile: Triple, stride: int, alignment: int, halo: int) -> Iterator[Tile]:
    """Tiles that cover an input of `shape` once, z slowest; all lengths in input cells.

    tile: of kept input per tile, a multiple of alignment; alignment: a multiple of stride; halo: reach of the network.
    """
    assert all(edge % alignment == 0 for edge in tile) and alignment % stride == 0, f"{tile}, {alignment}, {stride}"
    margin = -(-halo // alignment) * alignment
    starts = [range(0, n, edge) for n, edge in zip(shape, tile, strict=True)]
    for corner in itertools.product(*starts):
        first, last, keep, write = [], [], [], []
        for start, edge, n in zip(corner, tile, shape, strict=True):
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


def balanced_tile(shape: Triple, largest: Triple, alignment: int) -> Triple:
    """The edges, multiples of alignment, of as few tiles as `largest` allows, all about equally large."""
    edges = []
    for n, limit in zip(shape, largest, strict=True):
        count = -(-n // limit)
        edges.append(-(-n // (count * alignment)) * alignment)
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
    """The weighted mean of a network's logits over overlapping windows, (C, ceil(z/stride), ...) float32.

    Windows start at multiples of the stride; cells are weighted by a Gaussian of 1/8 of the window's edge.
    """
    total: Tensor | None = None
    weight_sum = torch.zeros(())
    starts = [window_starts(n, edge, overlap) for n, edge in zip(shape, window, strict=True)]
    for corner in itertools.product(*starts):
        begin = [start // stride * stride for start in corner]
        end = [min(start + edge, n) for start, edge, n in zip(corner, window, shape, strict=True)]
        logits = network(read(((begin[0], begin[1], begin[2]), (end[0], end[1], end[2]))))[0].float()
        if total is None:
            total = torch.zeros(len(logits), *output_shape(shape, stride), device=logits.device)
            weight_sum = torch.zeros(output_shape(shape, stride), device=logits.device)
        z, y, x = logits.shape[1:]
        weights = gaussian_weights((z, y, x), 1 / 8, logits.device)
        where = tuple(slice(b // stride, b // stride + n) for b, n in zip(begin, (z, y, x), strict=True))
        total[(slice(None), *where)] += weights * logits
        weight_sum[where] += weights
    assert total is not None
    return total / weight_sum
