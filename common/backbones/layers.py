"""Pieces of the convolutional families, in 2D and 3D alike.

In 3D a kernel of 3 x 3 becomes one of 3 x 3 x 3 and a stride of 2 one of 2 along z too, but pooling and gates look at one
depth slice at a time. So with weights inflated by their centre slice (pretrained.py) slice j of a map with stride s along
z is exactly the 2D map of slice s * j of the image.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.blocks import BATCH_NORM
from common.convolution import CONVOLUTION

MAX_POOL: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
Kernel = int | tuple[int, int]
NormMaker = Callable[[int], nn.Module]


def along(dims: int, z: int, yx: Kernel) -> Any:  # of two or three numbers, as Conv2d and Conv3d want them
    """(y, x), or (z, y, x) in 3D."""
    pair = (yx, yx) if isinstance(yx, int) else yx
    return (z, *pair) if dims == 3 else pair


def convolution(dims: int, ins: int, outs: int, kernel: Kernel, stride: int, padding: Kernel, groups: int) -> nn.Module:
    """A convolution without bias; padding along y and x. A kernel given as (y, x) has one slice in 3D."""
    z = kernel if isinstance(kernel, int) else 1
    return CONVOLUTION[dims](
        ins, outs, along(dims, z, kernel), stride, along(dims, (z - 1) // 2, padding), groups=groups, bias=False
    )


def pooled_stem(dims: int, ins: int, outs: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    """A convolution of stride 2 and the pooling of stride 2 that follows it, after a norm and an activation.

    Of volumes the pooling would drop every other slice; so the convolution has its stride along z too (4), and computes
    what is kept: the same maps in half the time.
    """
    first = CONVOLUTION[dims](ins, outs, kernel, along(dims, 4, 2), kernel // 2, bias=False)
    return first, InPlane(nn.MaxPool2d(3, 2, 1))


def batch_norm(dims: int, eps: float, momentum: float) -> NormMaker:
    """A maker of batch norms from a number of channels."""
    return functools.partial(BATCH_NORM[dims], eps=eps, momentum=momentum)


def plain_norm(dims: int) -> NormMaker:
    """Batch norm with torch's constants."""
    return batch_norm(dims, 1e-5, 0.1)


def conv_norm(
    dims: int, ins: int, outs: int, kernel: int, stride: int, groups: int, norm: NormMaker, act: nn.Module | None
) -> nn.Sequential:
    """Convolution, norm and (at will) activation: (B, ins, n...) -> (B, outs, ceil(n / stride)...)."""
    layers = [convolution(dims, ins, outs, kernel, stride, (kernel - 1) // 2, groups), norm(outs)]
    return nn.Sequential(*layers, *([act] if act is not None else []))


def max_pool(dims: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> nn.Module:
    """The maximum over each slice's own neighbours; in 3D every stride-th slice is kept."""
    return MAX_POOL[dims](along(dims, 1, kernel), stride, along(dims, 0, padding), ceil_mode=ceil_mode)


def avg_pool(dims: int, kernel: int, stride: int, padding: int) -> nn.Module:
    """The mean over each slice's own neighbours; in 3D every stride-th slice is kept."""
    pool = nn.AvgPool2d(kernel, stride, padding)
    return pool if dims == 2 else OfSlices(pool, stride)


class InPlane(nn.Module):
    """A 2D layer without weights that keeps channels apart, on the slices of (B, C, z, y, x) or on (B, C, y, x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            slices = x.transpose(1, 2)  # a batch of images, channels last too: no copy
            done: Tensor = self.layer(slices.flatten(0, 1))
            return done.view(*slices.shape[:2], *done.shape[1:]).transpose(1, 2)
        done = self.layer(x.flatten(1, -3))
        return done.reshape(*x.shape[:-2], *done.shape[-2:])


class OfSlices(nn.Module):
    """A 2D layer on every stride-th slice of (B, C, z, y, x); torch's own 3D mean refuses maps of less than its kernel."""

    def __init__(self, layer: nn.Module, stride: int) -> None:
        super().__init__()
        self.layer, self.stride = layer, stride

    def forward(self, x: Tensor) -> Tensor:
        slices = x[:, :, :: self.stride].transpose(1, 2)  # (B, z, C, y, x)
        done: Tensor = self.layer(slices.flatten(0, 1))
        return done.reshape(*slices.shape[:2], *done.shape[1:]).transpose(1, 2)


def fixed_grid_means(x: Tensor, edge: int) -> Tensor:
    """(B, C, [z,] y, x) -> (B, C * edge * edge): means over the boxes of an edge x edge grid, along z over all."""
    grid = nn.functional.adaptive_avg_pool3d(x, (1, edge, edge)) if x.dim() == 5 else (
        nn.functional.adaptive_avg_pool2d(x, edge))  # fmt: skip
    return grid.flatten(1)


class SqueezeExcite(nn.Module):
    """x * gate(W2 act(W1 mean(x))) with 1 x 1 convolutions; in 3D every slice has a gate of its own (Hu et al. 2018)."""

    def __init__(self, dims: int, channels: int, squeezed: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.fc1 = CONVOLUTION[dims](channels, squeezed, 1)
        self.fc2 = CONVOLUTION[dims](squeezed, channels, 1)
        self.act, self.gate = act, gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        means = x.mean((-2, -1), keepdim=True)
        gated: Tensor = self.gate(self.fc2(self.act(self.fc1(means)))) * x
        return gated


def divisible(channels: float, divisor: int) -> int:
    """The nearest multiple of a divisor, at least one of it, and not below nine tenths (Howard et al. 2017's code)."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"], linear_std: float | None) -> None:
    """He's normal distribution for convolutions, a narrow one (or torch's own) for linear layers, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0, linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def linear_steps(last: float, count: int) -> list[float]:
    """Probabilities of dropping branches 0 .. count - 1: from 0 linearly towards the last, which is not reached."""
    return [last * number / count for number in range(count)]


def even_steps(last: float, count: int) -> list[float]:
    """Probabilities of dropping branches: from 0 to the last, evenly."""
    return [last * number / (count - 1) for number in range(count)]
