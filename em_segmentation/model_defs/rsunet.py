"""A residual symmetric U-Net for affinities and membranes: small, batch-normalised, so that tiles can be exact.

After Lee et al. 2017 (arXiv:1706.00120), with summed skips and, where sections are thick, kernels that stay in plane until
the levels become isotropic; here two convolutions per module on the way down and one on the way up (as in the residual
encoders of Isensee et al. 2024, arXiv:2404.09556), ReLU, and nearest-neighbour upsampling.
"""

import torch
from torch import Tensor, nn

from common.blocks import NormName, absorbed, norm_layer
from em_segmentation.model_defs.convolution import Conv3d, Pointwise
from em_segmentation.regions import Region, Triple, cut, divided, everywhere, seen_from, widened

SLAB = 32  # cells along z that a level works on at once while predicting; a multiple of all poolings
THICK = 2.0  # sections at least so much thicker than a pixel is wide are not mixed at a level


def kernels_along_z(voxel_size_nm: tuple[float, float, float], num_levels: int) -> tuple[int, ...]:
    """Kernel edges along z per level, finest first: 1 while a voxel is THICK times longer than wide, then 3."""
    length, width = voxel_size_nm[0], min(voxel_size_nm[1:])
    edges = []
    for _ in range(num_levels):
        edges.append(1 if length >= THICK * width else 3)
        length, width = length * (2 if edges[-1] == 3 else 1), width * 2
    return tuple(edges)


class ResidualModule(nn.Module):
    """conv-norm-relu into the width, then conv-norm beside the identity, relu: (B, in, z, y, x) -> (B, out, z, y, x)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Triple, norm: NormName) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv1 = Conv3d(in_channels, out_channels, kernel, padding=padding, bias=False)
        self.norm1 = norm_layer(norm, 3, out_channels)
        self.conv2 = Conv3d(out_channels, out_channels, kernel, padding=padding, bias=False)
        self.norm2 = norm_layer(norm, 3, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return nn.functional.relu(self.norm2(self.conv2(x)).add_(x), inplace=True)

    def absorb_norms(self) -> None:
        """Make the norms part of the convolutions, for eval mode only: fewer maps in memory."""
        self.norm1, self.norm2 = absorbed(self.conv1, self.norm1), absorbed(self.conv2, self.norm2)


class MergeModule(nn.Module):
    """conv-norm beside the identity, relu, after a skip was added: (B, width, z, y, x) -> the same."""

    def __init__(self, width: int, kernel: Triple, norm: NormName) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = Conv3d(width, width, kernel, padding=padding, bias=False)
        self.norm = norm_layer(norm, 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.conv(x)).add_(x), inplace=True)

    def absorb_norms(self) -> None:
        """As a ResidualModule does."""
        self.norm = absorbed(self.conv, self.norm)


class RSUNet(nn.Module):
    """(B, in, z, y, x) -> (B, out, z, y, x), any size; the last strip of an odd map is pooled by itself.

    fold: voxels along z, y, x that become channels of one cell before the first level, and come back at the end: (1, 2, 2)
    makes a network four times as fast that still draws at full resolution (Shi et al. 2016). filters: per level, finest
    first. kernel_z: 1 or 3 per level; a level with 1 is pooled in plane only. halo and alignment: how far, in voxels z, y,
    x, an output looks (None: at the whole tile), and where tiles may begin.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        fold: Triple,
        filters: tuple[int, ...],
        kernel_z: tuple[int, ...],
        norm: NormName,
    ) -> None:
        super().__init__()
        assert len(kernel_z) == len(filters), f"Expected one kernel per level, got {kernel_z} for {filters}"
        self.fold = fold
        folded = fold[0] * fold[1] * fold[2]
        kernels: list[Triple] = [(edge, 3, 3) for edge in kernel_z]
        widths = [in_channels * folded, *filters]
        self.downs = nn.ModuleList(
            ResidualModule(widths[level], widths[level + 1], kernel, norm) for level, kernel in enumerate(kernels)
        )
        self.reaches = [(kernel[0] // 2, kernel[1] // 2, kernel[2] // 2) for kernel in kernels]
        self.factors: list[Triple] = [(2 if edge == 3 else 1, 2, 2) for edge in kernel_z[:-1]]
        finer = list(range(len(filters) - 1))
        self.raises = nn.ModuleList(Pointwise(filters[level + 1], filters[level], False) for level in finer)
        self.ups = nn.ModuleList(MergeModule(filters[level], kernels[level], norm) for level in finer)
        self.head = Pointwise(filters[0], out_channels * folded, True)
        halo, self.alignment = reach_of(fold, kernels, self.factors)
        self.halo = halo if norm == "batch" else None  # statistics of a group norm come from the whole tile

    def forward(self, volume: Tensor) -> Tensor:
        return self.part(volume, everywhere(volume))

    def part(self, volume: Tensor, region: Region) -> Tensor:
        """The output in a region of the volume alone: on the way up nothing is kept or computed beyond what it needs."""
        x, skips = folded_in(volume, self.fold), []
        needed = divided(region, self.fold)
        inner, outer = [needed], []
        for level, factors in enumerate(self.factors):
            outer.append(widened(needed, self.reaches[level], x.shape[2:]))
            needed = divided(outer[-1], factors)
            inner.append(needed)
            skip, x = self.down(level, x, outer[-1])
            skips.append(skip)
        x = cut(self.downs[-1](x), needed)
        for level in reversed(range(len(self.factors))):
            raised = doubled(self.raises[level](x), self.factors[level])
            raised = cut(raised, seen_from(inner[level + 1], self.factors[level], outer[level]))
            x = cut(self.ups[level](skips.pop() + raised), seen_from(outer[level], (1, 1, 1), inner[level]))
        return cut(folded_out(self.head(x), self.fold), seen_from(inner[0], self.fold, region))

    def down(self, level: int, x: Tensor, kept: Region) -> tuple[Tensor, Tensor]:
        """A level's map (B, width, ...) in a region, and all of it pooled.

        In eval mode slab by slab of sections, as the finest maps are the largest; not where norms look at the whole tile.
        """
        module, factors, depth = self.downs[level], self.factors[level], x.shape[2]
        slab, reach = depth if self.training or self.halo is None else SLAB, 2 * self.reaches[level][0]
        pooled, skips = [], []
        for first in range(0, depth, slab):
            last = min(depth, first + slab)
            low, high = max(0, first - reach), min(depth, last + reach)
            found = module(x if high - low == depth else x[:, :, low:high])
            found = found if high - low == last - first else found[:, :, first - low : last - low]
            pooled.append(nn.functional.max_pool3d(found, factors, ceil_mode=True))
            begin, end = max(kept[0].start, first), min(kept[0].stop, last)
            if begin < end:
                skips.append(cut(found, (slice(begin - first, end - first), *kept[1:])))
        return joined(skips), joined(pooled)


def joined(slabs: list[Tensor]) -> Tensor:
    """Slabs of sections (B, C, z, y, x) one behind the other."""
    return slabs[0] if len(slabs) == 1 else torch.cat(slabs, 2)


def reach_of(fold: Triple, kernels: list[Triple], factors: list[Triple]) -> tuple[Triple, Triple]:
    """How far an output looks to either side, and the edge of the coarsest cell, in voxels z, y, x."""
    reach, scale = [edge - 1 for edge in fold], list(fold)
    for level, kernel in enumerate(kernels):
        convolutions = 2 if level == len(kernels) - 1 else 3  # two down, one up
        for axis in range(3):
            reach[axis] += convolutions * (kernel[axis] // 2) * scale[axis]
            if level < len(factors):
                reach[axis] += 2 * (factors[level][axis] - 1) * scale[axis]
                scale[axis] *= factors[level][axis]
    return (reach[0], reach[1], reach[2]), (scale[0], scale[1], scale[2])


def folded_in(x: Tensor, fold: Triple) -> Tensor:
    """(B, C, z, y, x) -> (B, C fz fy fx, z/fz, y/fy, x/fx), rounded up; the last voxels are repeated to fill a cell."""
    if fold == (1, 1, 1):
        return x
    missing = [-n % edge for n, edge in zip(x.shape[2:], fold, strict=True)]
    if any(missing):
        x = nn.functional.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), "replicate")
    batch, channels, *size = x.shape
    z, y, width = (n // edge for n, edge in zip(size, fold, strict=True))
    cells = x.reshape(batch, channels, z, fold[0], y, fold[1], width, fold[2])
    ordered = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, z, y, width, -1)  # channels last in memory
    return ordered.permute(0, 4, 1, 2, 3)


def folded_out(x: Tensor, fold: Triple) -> Tensor:
    """(B, C fz fy fx, z, y, x) -> (B, C, z fz, y fy, x fx)."""
    if fold == (1, 1, 1):
        return x
    batch, channels, z, y, width = x.shape
    cells = x.reshape(batch, -1, *fold, z, y, width).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return cells.reshape(batch, channels // (fold[0] * fold[1] * fold[2]), z * fold[0], y * fold[1], width * fold[2])


def doubled(x: Tensor, factors: Triple) -> Tensor:
    """Nearest-neighbour upsampling."""
    return nn.functional.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest")
