"""3D convolutions and instance norm that are safe and fast on a CPU, in channels-last layout and bfloat16 autocast."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import common.convolution
from common.convolution import channels_last, computed_type

EPSILON = 1e-5  # added to variances


class Conv3d(common.convolution.Conv3d):
    """A convolution safe on thin maps and fast on small ones, whose output is channels last everywhere."""

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, in, z, y, x) and weights of this kernel and stride (out, in, k, k, k) -> (B, out, ...)."""
        return channels_last(super().convolved(x, weight, bias))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1^3 convolution as one matrix product over voxels: (B, in, z, y, x), (out, in), (out) -> (B, out, z, y, x)."""
    return nn.functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


class Pointwise(nn.Conv3d):
    """A 1^3 convolution; channels-last layout makes the matrix product the faster form."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, z, y, x) -> (B, out, z, y, x)."""
        return pointwise(x, self.weight.flatten(1), self.bias)


class Doubling(nn.Module):
    """A transposed 2^3 convolution to twice the size: one matrix product, as no two cells write to the same place."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        drawn = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=bias)
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, z, y, x) -> (B, out, 2z, 2y, 2x)."""
        batch, (z, y, x_size), out = len(x), x.shape[2:], self.weight.shape[1]
        weight = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)  # (2 * 2 * 2 * out, in)
        bias = None if self.bias is None else self.bias.repeat(8)
        cells = nn.functional.linear(x.movedim(1, -1), weight, bias).view(batch, z, y, x_size, 2, 2, 2, out)
        apart = cells.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, 2 * z, 2 * y, 2 * x_size, out)
        return apart.movedim(-1, 1)


class DepthwiseConv3d(nn.Conv3d):
    """A k^3 convolution of every channel for itself; training is several times faster than with torch's on a CPU.

    There all three forms are the dense one, whose gradients are fast here: a strided convolution takes every other cell
    of it, a transposed one puts zeros between the cells first.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, channels: int, kernel_size: int) -> None:
        assert kernel_size % 2 == 1, f"Expected an odd kernel, got {kernel_size}"
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, z, y, x) -> (B, C, z, y, x)."""
        return depthwise(x, self.weight, self.bias) if x.device.type == "cpu" else super().forward(x)

    def halving(self, x: Tensor) -> Tensor:
        """(B, C, 2n...) -> (B, C, n...)."""
        if x.device.type == "cpu":
            return depthwise(x, self.weight, self.bias)[:, :, ::2, ::2, ::2]
        return nn.functional.conv3d(x, self.weight, self.bias, 2, self.padding, groups=len(self.weight))

    def doubling(self, x: Tensor) -> Tensor:
        """(B, C, n...) -> (B, C, 2n - 1...)."""
        if x.device.type != "cpu":
            return nn.functional.conv_transpose3d(x, self.weight, self.bias, 2, self.padding, groups=len(self.weight))  # type: ignore[arg-type]
        size = [2 * n - 1 for n in x.shape[2:]]
        apart = channels_last(x.new_zeros(*x.shape[:2], *size))
        apart[:, :, ::2, ::2, ::2] = x
        return depthwise(apart, self.weight.flip(2, 3, 4), self.bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, z, y, x), (C, 1, k, k, k), (C) -> (B, C, z, y, x), in autocast's type."""
    dtype = computed_type(x)
    convolved: Tensor = _Depthwise.apply(x.to(dtype), weight.to(dtype), bias.to(dtype))  # type: ignore[no-untyped-call]
    return convolved


class InstanceNorm(nn.Module):
    """Every channel of every volume to mean 0 and variance 1, then scaled and shifted if affine (Ulyanov et al. 2016).

    As batch norm of one volume at a time, whose channels-last form is ten times faster than instance or group norm's.
    """

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, z, y, x) -> the same shape; the statistics are float32 in every precision; one cell becomes 0."""
        if x[0, 0].numel() == 1:
            return x - x if self.bias is None else x - x + self.bias.view(-1, 1, 1, 1)
        normalized = [self._of_one(one) for one in torch.split(x, 1)]
        return normalized[0] if len(normalized) == 1 else torch.cat(normalized)

    def _of_one(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _ExactNorm.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, EPSILON)


class PReLU(nn.PReLU):
    """x, or slope times x where it is negative, with one slope for all channels (He et al. 2015).

    On a CPU by a backward pass of three plain steps, six times as fast as torch's.
    """

    def __init__(self) -> None:
        super().__init__(num_parameters=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, z, y, x) -> the same."""
        bent: Tensor = _PReLU.apply(x, self.weight) if x.device.type == "cpu" else super().forward(x)  # type: ignore[no-untyped-call]
        return bent


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return nn.functional.leaky_relu(x, float(slope))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        by_x = torch.ops.aten.leaky_relu_backward(gradient, x, float(slope), False)
        by_slope = (gradient * x.clamp(max=0)).sum(dtype=torch.float32)
        return by_x, by_slope.to(slope.dtype).reshape(slope.shape)


class _ExactNorm(torch.autograd.Function):
    """Batch norm in float32 with pairwise sums: torch's own adds cell after cell, which costs 1e-4 of the deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean = x.mean((0, 2, 3, 4))
        variance = (x - mean.view(-1, 1, 1, 1)).square_().mean((0, 2, 3, 4))
        ctx.save_for_backward(x, weight, mean, (variance + EPSILON).rsqrt_())
        return nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, EPSILON)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight, mean, scale = ctx.saved_tensors
        gradient = channels_last(gradient)
        wanted = [True, weight is not None, weight is not None]
        backward = torch.ops.aten.native_batch_norm_backward
        by_x, by_weight, by_bias = backward(gradient, x, weight, None, None, mean, scale, True, EPSILON, wanted)
        return by_x, by_weight if weight is not None else None, by_bias if weight is not None else None


class _Depthwise(torch.autograd.Function):
    """The gradient by x is the convolution with the mirrored kernel; that by the weights comes from 2D convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = channels_last(x)
        ctx.save_for_backward(x, weight)
        return _depthwise(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = channels_last(gradient)
        by_x = _depthwise(gradient, weight.flip(2, 3, 4), None) if ctx.needs_input_grad[0] else None
        by_weight = depthwise_weight_gradient(x, gradient, weight.shape[2])
        by_bias = gradient.sum((0, 2, 3, 4), dtype=torch.float32).to(gradient.dtype)
        return by_x, by_weight, by_bias


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.conv3d(x, weight, bias, padding=weight.shape[2] // 2, groups=x.shape[1])


def depthwise_weight_gradient(x: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    """Of a depthwise convolution of x (B, C, z, y, x) that kept the size -> (C, 1, k, k, k).

    The slices of every offset along z become a batch of images, and kernels wider than 3 fall into columns of at most
    3: the only ones for which torch's 2D weight gradient is fast.
    """
    reach, size = kernel // 2, x.shape[2]
    wide = nn.functional.pad(x, (reach, reach)) if kernel > 3 else x
    margin = (reach, 0) if kernel > 3 else (reach, reach)  # along y and x
    total = x.new_zeros(x.shape[1], 1, kernel, kernel, kernel, dtype=torch.float32)
    for first in range(0, kernel, 3):
        columns = min(3, kernel - first)
        seen = wide[..., first : first + x.shape[4] + columns - 1] if kernel > 3 else x
        seen = channels_last(seen)
        weight = x.new_empty(x.shape[1], 1, kernel, columns)
        for sample, its_gradient in zip(seen, gradient, strict=True):
            images, its_images = sample.transpose(0, 1), its_gradient.transpose(0, 1)  # (z, C, y, x), channels last
            for offset in range(-min(reach, size - 1), min(reach, size - 1) + 1):
                begin, end = max(0, -offset), min(size, size - offset)
                pair = its_images[begin:end], images[begin + offset : end + offset]
                total[:, :, reach + offset, :, first : first + columns] += _by_weight(*pair, weight, margin)
    return total.to(x.dtype)


def _by_weight(gradient: Tensor, images: Tensor, weight: Tensor, margin: tuple[int, int]) -> Tensor:
    """Of one 2D depthwise convolution, padded by `margin`, of images (N, C, y, x) -> the weight's shape."""
    backward = torch.ops.aten.convolution_backward
    wanted, channels = (False, True, False), len(weight)
    by_weight: Tensor = backward(
        gradient, images, weight, None, (1, 1), margin, (1, 1), False, (0, 0), channels, wanted
    )[1]
    return by_weight
