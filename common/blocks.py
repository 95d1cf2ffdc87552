"""N-dimensional convolution blocks, each written once for 2D and 3D."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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


def absorbed(conv: nn.Conv2d | nn.Conv3d, norm: nn.Module) -> nn.Module:
    """Give a convolution the scale and shift of the batch norm behind it; returns what is left to do: nothing."""
    if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
        return norm
    assert norm.running_mean is not None and norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return nn.Identity()


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
        in_place = not self.training  # one map less in memory; in training the backward pass would need a copy
        branch = self.conv1(nn.functional.silu(self.norm1(x), in_place))
        branch = self.conv2(nn.functional.silu(self.norm2(branch), in_place))
        total: Tensor = self.skip(x) + self.drop_path(self.gate(branch))
        return total

    def absorb_norms(self) -> None:
        """Make norms behind a convolution part of it, for eval mode only: fewer maps in memory."""
        self.norm2 = absorbed(self.conv1, self.norm2)
        if isinstance(self.skip, nn.Sequential):
            self.skip[1] = absorbed(self.skip[0], self.skip[1])  # type: ignore[arg-type]
