"""Convolutions that can be trusted on a CPU where a map is no wider than the kernel.

torch 2.13's own (oneDNN with AVX-512) then write beyond their buffers or leave part of a result unset: weight gradients in
float32 for 3D kernels of 7 on maps of 5 slices and the like, in bfloat16 also those of 2D kernels of 7, and outputs. With the
zeros put around the map beforehand, and in float32 instead of bfloat16, every such case that was tried is right.
"""

import torch
from torch import Tensor, nn


def is_thin(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Whether torch's own result for this map (B, C, n...) could be wrong."""
    return x.device.type == "cpu" and any(k > 1 and n <= k for n, k in zip(x.shape[2:], layer.kernel_size, strict=True))


def on_thin_map(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The layer's output, of the type that torch's own would have."""
    assert not isinstance(layer.padding, str), f"Expected numbers, got {layer.padding}"
    assert layer.padding_mode == "zeros" and set(layer.dilation) == {1}, f"Expected zeros and no dilation, got {layer}"
    is_cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    given = torch.get_autocast_dtype("cpu") if is_cast else x.dtype
    working = torch.float32 if given == torch.bfloat16 else x.dtype
    convolve = nn.functional.conv3d if isinstance(layer, nn.Conv3d) else nn.functional.conv2d
    with torch.autocast("cpu", enabled=False):
        padded = nn.functional.pad(x.to(working), [n for p in reversed(layer.padding) for n in (p, p)])
        bias = None if layer.bias is None else layer.bias.to(working)
        result: Tensor = convolve(padded, layer.weight.to(working), bias, layer.stride, groups=layer.groups)
    return result.to(given)


class Conv2d(nn.Conv2d):
    """torch's, (B, ins, y, x) -> (B, outs, y', x'), safe on thin maps."""

    def forward(self, x: Tensor) -> Tensor:
        return on_thin_map(self, x) if is_thin(self, x) else super().forward(x)


class Conv3d(nn.Conv3d):
    """torch's, (B, ins, z, y, x) -> (B, outs, z', y', x'), safe on thin maps."""

    def forward(self, x: Tensor) -> Tensor:
        return on_thin_map(self, x) if is_thin(self, x) else super().forward(x)


CONVOLUTION: dict[int, type[Conv2d] | type[Conv3d]] = {2: Conv2d, 3: Conv3d}
