"""The blocks of MotorIdentifier: common's N-D blocks at three dimensions, and what only this network needs."""

from torch import Tensor, nn

from common.blocks import NormName, PreActResBlock


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
