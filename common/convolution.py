"""Convolutions as torch's own, for the maps where those are wrong or slow on a CPU.

Thin maps, no wider than the kernel: torch 2.13's (oneDNN with AVX-512) write beyond their buffers or leave part of a result
unset: weight gradients in float32 for 3D kernels of 7 on maps of 5 slices and the like, in bfloat16 also those of 2D kernels
of 7, and outputs. With the zeros put around the map beforehand, and in float32 instead of bfloat16, every such case that
was tried is right. In 2D such a map is unfolded instead: one matrix product, right in bfloat16 too and three times faster.

Small maps of a single volume: torch unfolds them into columns, three to six times slower than oneDNN. As a batch of two
half volumes they are convolved by oneDNN.
"""

import torch
from torch import Tensor, nn

FEW_CELLS = 20480  # channels x z x y of one float32 volume up to which torch 2.13 unfolds it
LEAST_DEPTH = 8  # output slices from which two halves are faster; below, the kernel's overlap costs more


def channels_last(x: Tensor) -> Tensor:
    """(B, C, z, y, x), the same values, the channels of a cell side by side in memory; no copy where they are."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def computed_type(x: Tensor) -> torch.dtype:
    """The type that a convolution of x computes in: autocast's, where that is on."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def zeros_around(layer: nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Cells of zeros before and behind the map, per axis."""
    assert not isinstance(layer.padding, str), f"Expected numbers, got {layer.padding}"
    assert layer.padding_mode == "zeros" and set(layer.dilation) == {1}, f"Expected zeros and no dilation, got {layer}"
    return tuple(layer.padding)


def is_thin(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Whether torch's own result for this map (B, C, n...) could be wrong."""
    return x.device.type == "cpu" and any(k > 1 and n <= k for n, k in zip(x.shape[2:], layer.kernel_size, strict=True))


def is_unfolded(layer: nn.Conv3d, x: Tensor) -> bool:
    """Whether torch would be slow with this map (B, C, z, y, x), and two halves of it would not."""
    depth, (_, high, wide) = x.shape[2] + 2 * zeros_around(layer)[0] - layer.kernel_size[0], layer.kernel_size
    return (
        x.device.type == "cpu"
        and len(x) == layer.groups == 1
        and x.shape[1] * x.shape[2] * x.shape[3] <= FEW_CELLS
        and max(high, wide) > 1
        and min(high, wide) <= 3  # others do not go by this
        and depth // layer.stride[0] + 1 >= LEAST_DEPTH
        and computed_type(x) == torch.float32
    )


def on_thin_map(layer: nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output for these weights, of the type that torch's own would have."""
    given = computed_type(x)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return unfolded(layer, x.to(given), weight.to(given), None if bias is None else bias.to(given))
    working = torch.float32 if given == torch.bfloat16 else given
    convolve = nn.functional.conv3d if isinstance(layer, nn.Conv3d) else nn.functional.conv2d
    with torch.autocast("cpu", enabled=False):
        padded = nn.functional.pad(x.to(working), [n for p in reversed(zeros_around(layer)) for n in (p, p)])
        bias = None if bias is None else bias.to(working)
        result: Tensor = convolve(padded, weight.to(working), bias, layer.stride, groups=layer.groups)
    return result.to(given)


def unfolded(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output (B, out, y', x') as a matrix product of what its kernel sees at every place."""
    padding, stride = zeros_around(layer), layer.stride
    size = [
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, layer.kernel_size, stride, strict=True)
    ]
    with torch.autocast("cpu", enabled=False):
        seen = nn.functional.unfold(x, layer.kernel_size, padding=padding, stride=stride)  # (B, in * k * k, places)
        result: Tensor = nn.functional.linear(seen.transpose(1, 2), weight.flatten(1), bias)  # (B, places, out)
    return result.transpose(1, 2).reshape(len(x), -1, *size)


def in_halves(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output for one volume (1, C, z, y, x) and these weights, as that of its halves along z; channels last."""
    kernel, stride, depth = layer.kernel_size[0], layer.stride[0], x.shape[2]
    padding, *around = zeros_around(layer)
    slices = (depth + 2 * padding - kernel) // stride + 1  # of the output
    half = -(-slices // 2)
    reach, second = (half - 1) * stride + kernel, half * stride  # slices that a half sees; where the second one's begin
    padded = nn.functional.pad(x, (0, 0, 0, 0, padding, max(padding, second + reach - padding - depth)))
    halves = torch.cat([padded[:, :, :reach], padded[:, :, second : second + reach]])
    found = nn.functional.conv3d(channels_last(halves), weight, bias, layer.stride, (0, *around))
    return channels_last(torch.cat([found[:1], found[1:, :, : slices - half]], 2))


class Conv2d(nn.Conv2d):
    """torch's, (B, ins, y, x) -> (B, outs, y', x'), safe on thin maps."""

    def forward(self, x: Tensor) -> Tensor:
        return on_thin_map(self, x, self.weight, self.bias) if is_thin(self, x) else super().forward(x)


class Conv3d(nn.Conv3d):
    """torch's, (B, ins, z, y, x) -> (B, outs, z', y', x'), safe on thin maps and fast on small ones."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x, self.weight, self.bias)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with other weights of this kernel and stride, (outs, ins / groups, k, k, k)."""
        if is_thin(self, x):
            return on_thin_map(self, x, weight, bias)
        if is_unfolded(self, x):
            return in_halves(self, x, weight, bias)
        result: Tensor = self._conv_forward(x, weight, bias)
        return result


CONVOLUTION: dict[int, type[Conv2d] | type[Conv3d]] = {2: Conv2d, 3: Conv3d}
