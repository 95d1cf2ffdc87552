"""Swin transformers: V1 (Liu et al. 2021), V2 (Liu et al. 2022) and the video one, Swin3D (Liu et al. 2022, CVPR).

Maps are channels-last inside. In 3D windows, patches and merges are cubic, and no cell sees what is padded along z; Swin3D
merges in the plane alone, and its windows shrink to the map.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.attention import Windows, relative_positions, window_attention
from common.backbones.backbone import Backbone, Builder, maps_of
from common.backbones.convnext import MoveChannels
from common.backbones.layers import even_steps
from common.blocks import DropPath
from common.convolution import CONVOLUTION, Conv3d
from common.errors import config_error

EPS = 1e-5
PATCH = 4
LARGEST_SCALE = math.log(100.0)
HIDDEN = 512  # units of V2's network of positions


class TableAttention(nn.Module):
    """V1: a learnt bias for every offset between two cells of a window; (B, n..., C) -> the same."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: tuple[int, ...], flat: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in window), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        index = relative_positions(window)
        self.register_buffer("relative_position_index", index.flatten() if flat else index)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        cells = windows.split(x)
        count, n, width = cells.shape
        qkv = self.qkv(cells).view(count, n, 3, self.heads, width // self.heads)
        return windows.join(self.proj(attend(qkv, self.bias(n), windows)))

    def bias(self, n: int) -> Tensor:
        """(heads, n, n); of smaller windows the first n cells of the full one, as the reference does."""
        full = math.prod(self.window)
        index = self.relative_position_index.view(full, full)[:n, :n]
        return self.relative_position_bias_table[index.flatten()].view(n, n, -1).permute(2, 0, 1).contiguous()


class CosineAttention(nn.Module):
    """V2: cosines of queries and keys, and a bias from a small network over the logarithms of offsets."""

    relative_position_index: Tensor
    relative_coords_table: Tensor

    def __init__(self, width: int, heads: int, window: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.register_buffer("relative_coords_table", offsets_table(window))
        self.register_buffer("relative_position_index", relative_positions(window).flatten())
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.cpb_mlp = nn.Sequential(
            nn.Linear(len(window), HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, heads, bias=False)
        )

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        cells = windows.split(x)
        count, n, width = cells.shape
        of_q, of_k, of_v = self.qkv.bias.chunk(3)
        bias = torch.cat([of_q, torch.zeros_like(of_k), of_v])  # the bias of keys does not exist
        qkv = nn.functional.linear(cells, self.qkv.weight, bias).view(count, n, 3, self.heads, width // self.heads)
        wide = qkv[:, :, :2].to(torch.promote_types(qkv.dtype, torch.float32))  # half has no room for the least norm
        q, k = nn.functional.normalize(wide, dim=-1).to(qkv.dtype).unbind(2)  # (windows, n, heads, d)
        scale = self.logit_scale.clamp(max=LARGEST_SCALE).exp().view(self.heads, 1)
        q = q * (scale * math.sqrt(width // self.heads))  # window_attention divides by this root
        return windows.join(self.proj(attend(torch.stack([q, k, qkv[:, :, 2]], 2), self.bias(n), windows)))

    def bias(self, n: int) -> Tensor:
        """(heads, n, n)."""
        by_offset = self.cpb_mlp(self.relative_coords_table).view(-1, self.heads)
        return 16 * torch.sigmoid(by_offset[self.relative_position_index].view(n, n, -1).permute(2, 0, 1)).contiguous()


def attend(qkv: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """(windows of all images, n, 3, heads, d) -> (windows of all images, n, C)."""
    kinds = windows.kinds.repeat(len(qkv) // len(windows.kinds))
    return window_attention(qkv, bias.to(qkv.dtype), windows.masks.to(qkv.dtype), kinds)


def offsets_table(window: tuple[int, ...]) -> Tensor:
    """(1, 2 w - 1 ..., dims): sign(o) log2(1 + |o|) / 3 of offsets o scaled to -8 .. 8 (Liu et al. 2022, equation 4)."""
    axes = [torch.arange(1.0 - edge, edge) / (edge - 1) * 8 for edge in window]  # in this order: to the last bit
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
    return torch.sign(grid) * torch.log2(grid.abs() + 1) / 3


class SwinBlock(nn.Module):
    """Attention inside windows and MLP, normed before (V1) or after (V2): (B, n..., C) -> the same."""

    def __init__(self, attention: nn.Module, width: int, normed_after: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * width, width), nn.Dropout(0.0)
        )
        self.normed_after = normed_after

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        if self.normed_after:
            x = x + self.drop_path(self.norm1(self.attn(x, windows)))
            x = x + self.drop_path(self.norm2(self.mlp(x)))
        else:
            x = x + self.drop_path(self.attn(self.norm1(x), windows))
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Sequential):
    """Blocks with windows in place and shifted windows in turns: (B, n..., C) -> the same."""

    def __init__(self, blocks: list[nn.Module], window: tuple[int, ...], shrinks: bool) -> None:
        super().__init__(*blocks)
        self.window, self.shrinks = window, shrinks

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:-1])
        hides = len(size) == 3 and not self.shrinks
        windows = [Windows(size, self.window, shifted, self.shrinks, hides, x.device) for shifted in (False, True)]
        for number, block in enumerate(self):
            x = block(x, windows[number % 2])
        return x


class Merge(nn.Module):
    """2 x 2 (x 2) cells into one of twice the width: (B, n..., C) -> (B, ceil(n / 2)..., 2C); odd edges get zeros.

    flat: cells are merged along y and x alone.
    """

    def __init__(self, dims: int, width: int, normed_after: bool, flat: bool) -> None:
        super().__init__()
        self.axes = 2 if flat else dims
        joined = 2**self.axes * width
        self.reduction = nn.Linear(joined, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width if normed_after else joined, EPS)
        self.normed_after = normed_after

    def forward(self, x: Tensor) -> Tensor:
        odd = [n % 2 for n in x.shape[-1 - self.axes : -1]]
        if any(odd):
            x = nn.functional.pad(x, (0, 0, *(n for pad in reversed(odd) for n in (0, pad))))
        parts, whole = [], [slice(None)] * (x.dim() - 1 - self.axes)
        for place in itertools.product((0, 1), repeat=self.axes):  # (dx, dy) or (dz, dx, dy): y first of all
            steps = [slice(step, None, 2) for step in (*place[:-2], place[-1], place[-2])]
            parts.append(x[(*whole, *steps)])
        cells = torch.cat(parts, -1)
        merged: Tensor = self.norm(self.reduction(cells)) if self.normed_after else self.reduction(self.norm(cells))
        return merged


class PatchEmbedding(nn.Module):
    """Boxes of 2 x 4 x 4 voxels as cells, zeros behind the last: (B, in, z, y, x) -> (B, z/2, y/4, x/4, C)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = Conv3d(in_channels, width, (2, PATCH, PATCH), (2, PATCH, PATCH))
        self.norm = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        z, y, x_edge = x.shape[2:]
        x = nn.functional.pad(x, (0, -x_edge % PATCH, 0, -y % PATCH, 0, -z % 2))
        cells: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return cells


@dataclasses.dataclass(frozen=True)
class Shape:
    """kind: 1, 2 (versions) or "video"; depths and heads of the four stages; drop_path: of the last block."""

    kind: Literal[1, 2, "video"]
    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    drop_path: float

    def window(self, dims: int) -> tuple[int, ...]:
        return {1: (7,) * dims, 2: (8,) * dims, "video": (8, 7, 7)}[self.kind]

    def stage(self, number: int, dims: int, rates: list[float]) -> Stage:
        """Its blocks, which drop their branches at these rates."""
        width, heads, window = self.width * 2**number, self.heads[number], self.window(dims)
        blocks: list[nn.Module] = []
        for rate in rates:
            attention: nn.Module = (
                CosineAttention(width, heads, window)
                if self.kind == 2
                else TableAttention(width, heads, window, self.kind == 1)
            )
            blocks.append(SwinBlock(attention, width, self.kind == 2, rate))
        return Stage(blocks, window, self.kind == "video")


class Swin(Backbone):
    """Maps of strides 4, 8, 16 and 32 (video: 2 along z in all of them), the last after the final norm."""

    def __init__(self, shape: Shape, dims: int, in_channels: int, num_classes: int) -> None:
        widths = tuple(shape.width * 2**k for k in range(4))
        is_video = shape.kind == "video"
        if is_video and dims != 3:
            raise config_error("dims: expected 3 for the video Swin, got 2; its 2D sisters are swin_t, swin_s, swin_b")
        super().__init__(dims, in_channels, widths, 1 if is_video else PATCH, 1 if is_video else PATCH)
        layers: list[nn.Module] = []
        if is_video:
            self.patch_embed = PatchEmbedding(in_channels, shape.width)
        else:
            embed = CONVOLUTION[dims](in_channels, shape.width, PATCH, PATCH)
            layers.append(nn.Sequential(embed, MoveChannels(1, -1), nn.LayerNorm(shape.width, EPS)))
        rates = even_steps(shape.drop_path, sum(shape.depths))
        for number, depth in enumerate(shape.depths):
            layers.append(shape.stage(number, dims, rates[:depth]))
            rates = rates[depth:]
            if number < 3:
                layers.append(Merge(dims, widths[number], shape.kind == 2, is_video))
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], EPS)
        if num_classes:
            self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, x: Tensor) -> list[Tensor]:
        is_video = hasattr(self, "patch_embed")
        cells = maps_of(self.features, (0, 2, 4, 6), self.patch_embed(x)) if is_video else (
            maps_of(self.features, (1, 3, 5, 7), x))  # fmt: skip
        return [one.movedim(-1, 1) for one in (*cells[:-1], self.norm(cells[-1]))]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.head(vector)
        return logits


TINY, DEEP = (2, 2, 6, 2), (2, 2, 18, 2)
OF_96, OF_128 = (3, 6, 12, 24), (4, 8, 16, 32)
SWINS: dict[str, Builder] = {
    "swin_t": partial(Swin, Shape(1, 96, TINY, OF_96, 0.2)),
    "swin_s": partial(Swin, Shape(1, 96, DEEP, OF_96, 0.3)),
    "swin_b": partial(Swin, Shape(1, 128, DEEP, OF_128, 0.5)),
    "swin_v2_t": partial(Swin, Shape(2, 96, TINY, OF_96, 0.2)),
    "swin_v2_s": partial(Swin, Shape(2, 96, DEEP, OF_96, 0.3)),
    "swin_v2_b": partial(Swin, Shape(2, 128, DEEP, OF_128, 0.5)),
    "swin3d_t": partial(Swin, Shape("video", 96, TINY, OF_96, 0.1)),
    "swin3d_s": partial(Swin, Shape("video", 96, DEEP, OF_96, 0.1)),
    "swin3d_b": partial(Swin, Shape("video", 128, DEEP, OF_128, 0.1)),
}
