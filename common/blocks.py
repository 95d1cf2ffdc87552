"""N-dimensional convolution blocks, each written once for 2D and 3D."""

from typing import Literal

import torch
from torch import Tensor, nn

NormName = Literal["batch", "group"]

CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS_PER_GROUP = 8  # of group norm; fewer channels than this make one group


def norm_layer(name: NormName, dims: int, channels: int) -> nn.Module:
    """Batch norm (exact tiling, needs large batches of cells) or group norm (any batch, but depends on the tile)."""
    if name == "batch":
        return BATCH_NORM[dims](channels)
    groups = max(1, channels // CHANNELS_PER_GROUP)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class SqueezeExcitation(nn.Module):
    """Channel gate from global statistics: x * sigmoid(W2 silu(W1 mean(x))) (Hu et al. 2018).

    The gate may close: unlike some detectors, nothing clamps it to [0.5, 1].
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(4, channels // reduction))
        self.excite = nn.Linear(self.squeeze.out_features, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        spatial = tuple(range(2, x.dim()))
        gate = torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(x.mean(spatial)))))  # (B, C)
        return x * gate.reshape(*gate.shape, *[1] * len(spatial))


class DropPath(nn.Module):
    """Drop a whole residual branch per sample with a probability, scaled to keep its expectation (Huang et al. 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        assert 0 <= probability < 1, f"Expected a probability below 1, got {probability}"
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


class PreActResBlock(nn.Module):
    """norm-silu-conv3(stride)-norm-silu-conv3 + skip (He et al. 2016, identity mappings), optional SE and drop path.

    The skip is the identity, or a strided 1x1 convolution and a norm where the shape changes.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: NormName,
        squeeze_excitation: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION[dims]
        self.norm1 = norm_layer(norm, dims, in_channels)
        self.conv1 = convolution(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = norm_layer(norm, dims, out_channels)
        self.conv2 = convolution(out_channels, out_channels, 3, padding=1, bias=False)
        self.gate = SqueezeExcitation(out_channels, 4) if squeeze_excitation else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.skip = nn.Sequential(
                convolution(in_channels, out_channels, 1, stride=stride, bias=False),
                norm_layer(norm, dims, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, n...) -> (B, out, ceil(n / stride)...)."""
        branch = self.conv1(nn.functional.silu(self.norm1(x)))
        branch = self.conv2(nn.functional.silu(self.norm2(branch)))
        total: Tensor = self.skip(x) + self.drop_path(self.gate(branch))
        return total
