"""MaxViT: convolution, attention in windows, attention over a grid of distant cells, in every layer (Tu et al. 2022)."""

from functools import partial

import torch
from torch import Tensor, nn

from common.attention import FORBIDDEN, relative_positions, window_attention
from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import SqueezeExcite, avg_pool, batch_norm, conv_norm, even_steps
from common.blocks import DropPath
from common.convolution import CONVOLUTION

EDGE = 7  # cells of a window, and of the grid
HEAD = 32  # channels
EXPANSION, SQUEEZE = 4, 4
EPS, MOMENTUM = 1e-3, 0.01  # of batch norms


class MBConv(nn.Module):
    """Pre-norm inverted residual with gate: (B, ins, n...) -> (B, outs, ceil(n / stride)...)."""

    def __init__(self, dims: int, ins: int, outs: int, stride: int, drop_path: float) -> None:
        super().__init__()
        norm, inner = batch_norm(dims, EPS, MOMENTUM), outs * EXPANSION
        self.proj: nn.Module = nn.Identity()
        if stride != 1 or ins != outs:
            wide = CONVOLUTION[dims](ins, outs, 1)
            pool = avg_pool(dims, 3, stride, 1) if stride == 2 else nn.Identity()
            self.proj = nn.Sequential(pool, wide)
        self.layers = nn.Sequential()
        self.layers.add_module("pre_norm", norm(ins))
        self.layers.add_module("conv_a", conv_norm(dims, ins, inner, 1, 1, 1, norm, nn.GELU()))
        self.layers.add_module("conv_b", conv_norm(dims, inner, inner, 3, stride, inner, norm, nn.GELU()))
        gate = SqueezeExcite(dims, inner, outs // SQUEEZE, nn.SiLU(), nn.Sigmoid())
        self.layers.add_module("squeeze_excitation", gate)
        self.layers.add_module("conv_c", CONVOLUTION[dims](inner, outs, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x) + self.drop_path(self.layers(x))
        return out


class Partition:
    """Windows of neighbouring cells, or (grid) of cells as far apart as an EDGE-wide grid over the map puts them.

    A map whose edges are no multiples of EDGE is padded; nothing attends to the padding.
    """

    def __init__(self, size: tuple[int, ...], is_grid: bool, device: torch.device) -> None:
        self.size, self.is_grid = size, is_grid
        self.counts = [-(-n // EDGE) for n in size]
        self.padding = [count * EDGE - n for count, n in zip(self.counts, size, strict=True)]
        with torch.device("cpu"):  # so that no number waits for a GPU
            real = self.split(torch.ones(1, *size, 1))[..., 0] > 0  # (windows, n)
            patterns, number = torch.unique(real, dim=0, return_inverse=True)
            masks = torch.where(patterns[:, None], 0.0, FORBIDDEN).expand(-1, real.shape[1], -1)  # (M, n, n)
        self.masks, self.kinds = masks.to(device), torch.where(real.all(1), -1, number).to(device)

    def split(self, x: Tensor) -> Tensor:
        """(B, n..., C) -> (B * windows, EDGE^dims, C)."""
        dims = len(self.size)
        if any(self.padding):
            x = nn.functional.pad(x, (0, 0, *(n for pad in reversed(self.padding) for n in (0, pad))))
        pairs = [n for count in self.counts for n in ((EDGE, count) if self.is_grid else (count, EDGE))]
        of_windows, inside = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
        order = (0, *inside, *of_windows) if self.is_grid else (0, *of_windows, *inside)
        return x.reshape(len(x), *pairs, -1).permute(*order, 2 * dims + 1).reshape(-1, EDGE**dims, x.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of split."""
        dims = len(self.size)
        cells = windows.view(-1, *self.counts, *[EDGE] * dims, windows.shape[-1])
        of_windows, inside = range(1, dims + 1), range(dims + 1, 2 * dims + 1)
        couples = zip(inside, of_windows, strict=True) if self.is_grid else zip(of_windows, inside, strict=True)
        order = (0, *(axis for pair in couples for axis in pair), 2 * dims + 1)
        padded = [count * EDGE for count in self.counts]
        x = cells.permute(order).reshape(-1, *padded, windows.shape[-1])
        return x[(slice(None), *(slice(n) for n in self.size))]


class PositionedAttention(nn.Module):
    """Attention inside windows with a learnt bias for every offset; scores are scaled by all channels, not by a head's."""

    relative_position_index: Tensor

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * EDGE - 1) ** dims, width // HEAD))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions((EDGE,) * dims))
        self.to_qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Tensor, parts: Partition) -> Tensor:
        """(windows of all images, n, C) -> the same."""
        count, n, width = x.shape
        qkv = self.to_qkv(x).view(count, n, 3, width // HEAD, HEAD)
        q, k, v = qkv.unbind(2)
        q = q * (HEAD / width) ** 0.5  # window_attention divides by the root of HEAD
        index = self.relative_position_index.flatten()
        bias = self.relative_position_bias_table[index].view(n, n, -1).permute(2, 0, 1).contiguous()
        kinds = parts.kinds.repeat(count // len(parts.kinds))
        heads = window_attention(torch.stack([q, k, v], 2), bias.to(x.dtype), parts.masks.to(x.dtype), kinds)
        out: Tensor = self.merge(heads)
        return out


class PartitionAttention(nn.Module):
    """Attention and MLP inside the windows of a partition: (B, C, n...) -> the same."""

    def __init__(self, dims: int, width: int, is_grid: bool, drop_path: float) -> None:
        super().__init__()
        self.is_grid = is_grid
        self.attn_layer = nn.Sequential(nn.LayerNorm(width), PositionedAttention(dims, width), nn.Dropout(0.0))
        self.mlp_layer = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.0)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        parts = Partition(tuple(x.shape[2:]), self.is_grid, x.device)
        cells = parts.split(x.movedim(1, -1))
        norm, attention, _ = self.attn_layer
        cells = cells + self.dropped(attention(norm(cells), parts), len(x))
        cells = cells + self.dropped(self.mlp_layer(cells), len(x))
        return parts.join(cells).movedim(-1, 1)

    def dropped(self, branch: Tensor, images: int) -> Tensor:
        """drop_path of whole images, not of windows: (windows of all images, n, C) -> the same."""
        dropped: Tensor = self.drop_path(branch.view(images, -1, *branch.shape[1:]))
        return dropped.view_as(branch)


class Layer(nn.Module):
    """(B, ins, n...) -> (B, outs, ceil(n / stride)...)."""

    def __init__(self, dims: int, ins: int, outs: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("MBconv", MBConv(dims, ins, outs, stride, drop_path))
        self.layers.add_module("window_attention", PartitionAttention(dims, outs, False, drop_path))
        self.layers.add_module("grid_attention", PartitionAttention(dims, outs, True, drop_path))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Block(nn.Module):
    """Layers, the first of which has stride 2."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class MaxViT(Backbone):
    """Maps of strides 4, 8, 16 and 32; unlike the reference for images of any size."""

    def __init__(
        self,
        stem: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        drop_path: float,
        dims: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__(dims, in_channels, widths, 1, 1)
        norm = batch_norm(dims, EPS, MOMENTUM)
        first = conv_norm(dims, in_channels, stem, 3, 2, 1, norm, nn.GELU())
        self.stem = nn.Sequential(first, nn.Sequential(CONVOLUTION[dims](stem, stem, 3, 1, 1)))
        rates = iter(even_steps(drop_path, sum(depths)))
        blocks, ins = [], stem
        for width, depth in zip(widths, depths, strict=True):
            layers: list[nn.Module] = []
            for k in range(depth):
                layers.append(Layer(dims, ins, width, 1 if k else 2, next(rates)))
                ins = width
            blocks.append(Block(layers))
        self.blocks = nn.ModuleList(blocks)
        if num_classes:
            self.classifier = nn.Sequential(
                nn.Identity(), nn.Identity(), nn.LayerNorm(ins), nn.Linear(ins, ins), nn.Tanh(),
                nn.Linear(ins, num_classes, bias=False),
            )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


MAXVITS: dict[str, Builder] = {"maxvit_t": partial(MaxViT, 64, (64, 128, 256, 512), (2, 2, 5, 2), 0.2)}
