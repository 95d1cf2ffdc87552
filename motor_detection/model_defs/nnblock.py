"""The blocks of MotorIdentifier: common's N-D blocks at three dimensions, and what only this network needs."""

import torch
from torch import Tensor, nn

from common.blocks import NormName, PreActResBlock
from common.convolution import computed_type


class Stem(nn.Conv3d):
    """A 5^3 convolution of one channel at stride 2: (B, 1, z, y, x) -> (B, out, ceil(z/2), ceil(y/2), ceil(x/2)).

    In bfloat16 on a CPU two voxels along x become two channels of a cell, which is the same memory seen otherwise: the
    kernel's multiplications go by pairs there, and one channel would leave half of them empty.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__(1, out_channels, 5, stride=2, padding=2, bias=False)  # a norm follows

    def forward(self, volume: Tensor) -> Tensor:
        if volume.device.type != "cpu" or computed_type(volume) != torch.bfloat16:
            return super().forward(volume)
        volume = nn.functional.pad(volume, (0, volume.shape[4] % 2)).contiguous()
        batch, _, z, y, x = volume.shape
        pairs = volume.view(batch, z, y, x // 2, 2).permute(0, 4, 1, 2, 3)  # (B, 2, z, y, ceil(x/2)), channels last
        kernel = nn.functional.pad(self.weight, (0, 1)).reshape(-1, 5, 5, 3, 2).permute(0, 4, 1, 2, 3)
        return nn.functional.conv3d(pairs, kernel, None, (2, 2, 1), (2, 2, 1))


class PreActResBlock3d(PreActResBlock):
    """common.blocks.PreActResBlock in 3D: (B, in, z, y, x) -> (B, out, ceil(z/stride), ceil(y/stride), ceil(x/stride))."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: NormName,
        squeeze_excitation: bool,
        drop_path: float,
    ) -> None:
        super().__init__(3, in_channels, out_channels, stride, norm, squeeze_excitation, drop_path)


class TopDownMerge3d(nn.Module):
    """Bring a coarse map to the next finer level: nearest upsampling, sum with the finer level's lateral, one block."""

    def __init__(self, fine_channels: int, channels: int, norm: NormName, squeeze_excitation: bool) -> None:
        super().__init__()
        self.lateral = nn.Conv3d(fine_channels, channels, 1)
        self.block = PreActResBlock3d(channels, channels, 1, norm, squeeze_excitation, 0.0)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """coarse (B, C, ceil(n/2)...), fine (B, F, n...) -> (B, C, n...); odd n are cropped after upsampling."""
        z, y, x = fine.shape[2:]
        assert coarse.shape[2:] == tuple((n + 1) // 2 for n in (z, y, x)), f"{coarse.shape} does not cover {fine.shape}"
        upsampled = nn.functional.interpolate(coarse, scale_factor=2, mode="nearest")[:, :, :z, :y, :x]
        merged: Tensor = self.block(upsampled + self.lateral(fine))
        return merged
