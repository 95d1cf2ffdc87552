"""Two 3D U-Nets: the plain one of two convolutions per level, and the one of strided residual units.

Both are the networks that MONAI calls BasicUNet and UNet (with two residual units), weight for weight: basic_unet_key and
residual_unet_key map their state dicts onto ours. Instance norm makes the output depend on the tile, so inference blends
windows.
"""

import re

import torch
from torch import Tensor, nn

from common.convolution import channels_last
from em_segmentation.model_defs.convolution import Conv3d, Doubling, InstanceNorm, Pointwise, PReLU

LEAK = 0.1  # of BasicUNet's leaky ReLU


class ConvNormAct(nn.Module):
    """3^3 convolution, instance norm, dropout, activation: (B, in, z, y, x) -> (B, out, ceil(z/stride), ...)."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, affine: bool, dropout: float, act: nn.Module
    ) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm = InstanceNorm(out_channels, affine)
        self.dropout = nn.Dropout(dropout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(self.conv(x))

    def activated(self, convolved: Tensor) -> Tensor:
        """What follows the convolution."""
        result: Tensor = self.act(self.dropout(self.norm(convolved)))
        return result


class TwoConvs(nn.Sequential):
    """Two ConvNormAct in a row at one resolution: (B, in, z, y, x) -> (B, out, z, y, x)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__(
            ConvNormAct(in_channels, out_channels, 1, True, dropout, nn.LeakyReLU(LEAK, inplace=True)),
            ConvNormAct(out_channels, out_channels, 1, True, dropout, nn.LeakyReLU(LEAK, inplace=True)),
        )


class UpTwoConvs(nn.Module):
    """Transposed 2^3 convolution up, concatenation behind the finer level, two convolutions."""

    def __init__(self, coarse: int, fine: int, up: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.up = Doubling(coarse, up, True)
        self.convs = TwoConvs(fine + up, out_channels, dropout)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """coarse (B, C, floor(n/2)...), fine (B, F, n...) -> (B, out, n...); odd n repeat the last upsampled cell."""
        raised = self.up(coarse)
        missing = [n - m for n, m in zip(fine.shape[2:], raised.shape[2:], strict=True)]  # 0 or 1 along z, y, x
        if any(missing):
            raised = nn.functional.pad(raised, (0, missing[2], 0, missing[1], 0, missing[0]), "replicate")
        merged: Tensor = self.convs(torch.cat([fine, raised], 1))
        return merged


class BasicUNet3d(nn.Module):
    """(B, in, z, y, x) -> (B, out, z, y, x), every edge at least 16; Ronneberger et al. 2015 in 3D.

    filters: of the five levels, finest first, and of the last convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, filters: tuple[int, int, int, int, int, int], dropout: float
    ) -> None:
        super().__init__()
        self.stem = TwoConvs(in_channels, filters[0], dropout)
        self.downs = nn.ModuleList(TwoConvs(filters[i], filters[i + 1], dropout) for i in range(4))
        self.pool = nn.MaxPool3d(2)
        halved = [UpTwoConvs(filters[i + 1], filters[i], filters[i + 1] // 2, filters[i], dropout) for i in (3, 2, 1)]
        last = UpTwoConvs(filters[1], filters[0], filters[1], filters[5], dropout)
        self.ups = nn.ModuleList([*halved, last])
        self.head = Pointwise(filters[5], out_channels, True)

    def forward(self, volume: Tensor) -> Tensor:
        levels = [self.stem(channels_last(volume))]
        for down in self.downs:
            levels.append(down(self.pool(levels[-1])))
        x = levels[-1]
        for up, level in zip(self.ups, reversed(levels[:-1]), strict=True):
            x = up(x, level)
        logits: Tensor = self.head(x)  # (B, out, z, y, x)
        return logits


class ResidualUnit(nn.Module):
    """Convolutions beside a skip that is the identity, a 1^3 or (strided) a 3^3 convolution (Kerfoot et al. 2019)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float, depth: int) -> None:
        super().__init__()
        units = [ConvNormAct(in_channels, out_channels, stride, False, dropout, PReLU())]
        units += [ConvNormAct(out_channels, out_channels, 1, False, dropout, PReLU()) for _ in range(depth - 1)]
        self.units = nn.Sequential(*units)
        self.skip: nn.Module = nn.Identity()
        if stride != 1:
            self.skip = Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)
        elif in_channels != out_channels:
            self.skip = Pointwise(in_channels, out_channels, True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, n...) -> (B, out, ceil(n / stride)...)."""
        if not isinstance(self.skip, Conv3d):
            summed: Tensor = self.units(x) + self.skip(x)
            return summed
        # the first convolution and the skip see the same cells: one pass over them for both
        first, *others = self.units
        assert isinstance(first, ConvNormAct) and first.conv.bias is not None and self.skip.bias is not None
        weight = torch.cat([first.conv.weight, self.skip.weight])
        both = self.skip.convolved(x, weight, torch.cat([first.conv.bias, self.skip.bias]))
        inner, skipped = both.chunk(2, 1)
        inner = first.activated(channels_last(inner))
        for unit in others:
            inner = unit(inner)
        return inner + skipped


class UpResidual(nn.Module):
    """Transposed 3^3 convolution to twice the size, then one residual unit (the last one ends in a bare convolution)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, is_last: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
        self.norm = InstanceNorm(out_channels, False)
        self.dropout = nn.Dropout(dropout)
        self.act = PReLU()
        self.unit = ResidualUnit(out_channels, out_channels, 1, dropout, 1)
        if is_last:  # logits are neither normalised nor bent
            bare = self.unit.units[0]
            bare.norm, bare.dropout, bare.act = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, n...) -> (B, out, 2n...)."""
        raised: Tensor = self.unit(self.act(self.dropout(self.norm(channels_last(self.up(x))))))
        return raised


class ResidualUNet3d(nn.Module):
    """(B, in, z, y, x) -> (B, out, z, y, x), every edge a multiple of 2^(levels - 1).

    The first unit already halves the volume: nothing runs at full resolution but the last transposed convolution, which
    makes it five times faster than BasicUNet3d with three times its weights.
    """

    def __init__(self, in_channels: int, out_channels: int, filters: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        ins = (in_channels, *filters[:-2])
        self.downs = nn.ModuleList(ResidualUnit(i, o, 2, dropout, 2) for i, o in zip(ins, filters[:-1], strict=True))
        self.bottom = ResidualUnit(filters[-2], filters[-1], 1, dropout, 2)
        below = (filters[-1], *reversed(filters[:-2]))  # what comes up into each level, deepest first
        outs = (*reversed(filters[:-2]), out_channels)
        self.ups = nn.ModuleList(
            UpResidual(level + up, out, dropout, number == len(outs) - 1)
            for number, (level, up, out) in enumerate(zip(reversed(filters[:-1]), below, outs, strict=True))
        )

    def forward(self, volume: Tensor) -> Tensor:
        step = 2 ** len(self.downs)
        assert all(n % step == 0 for n in volume.shape[2:]), f"Expected multiples of {step}, got {tuple(volume.shape)}"
        levels = [channels_last(volume)]
        for down in self.downs:
            levels.append(down(levels[-1]))
        x = self.bottom(levels[-1])
        for up, level in zip(self.ups, reversed(levels[1:]), strict=True):
            x = up(torch.cat([level, x], 1))
        return x  # type: ignore[no-any-return]


def basic_unet_key(reference: str) -> str:
    """Our name of a weight of MONAI's BasicUNet."""
    key = re.sub(r"^conv_0\.", "stem.", reference)
    key = re.sub(r"^down_(\d)\.convs\.", lambda m: f"downs.{int(m[1]) - 1}.", key)
    key = re.sub(r"^upcat_(\d)\.", lambda m: f"ups.{4 - int(m[1])}.", key)
    key = key.replace("upsample.deconv.", "up.").replace("final_conv.", "head.")
    return re.sub(r"conv_(\d)\.", r"\1.", key).replace("adn.N.", "norm.")


def residual_unet_key(reference: str, num_levels: int) -> str:
    """Our name of a weight of MONAI's UNet with residual units; num_levels: of the network, filters' length."""
    path = reference.removeprefix("model.")
    depth = 0
    while path.startswith("1.submodule."):
        path, depth = path.removeprefix("1.submodule."), depth + 1
    if depth == num_levels - 1:
        return "bottom." + _unit_key(path)
    if path.startswith("0."):
        return f"downs.{depth}." + _unit_key(path.removeprefix("0."))
    number = num_levels - 2 - depth
    rest = path.removeprefix("2.")
    if rest.startswith("1."):
        return f"ups.{number}.unit." + _unit_key(rest.removeprefix("1."))
    return f"ups.{number}." + rest.removeprefix("0.").replace("conv.", "up.").replace("adn.A.", "act.")


def _unit_key(path: str) -> str:
    key = re.sub(r"^conv\.unit(\d)\.", r"units.\1.", path).replace("residual.", "skip.")
    return key.replace("adn.A.", "act.")
