"""Multiscale vision transformers: attention over pooled tokens (MViT, Fan et al. 2021; MViTv2, Li et al. 2022)."""

import dataclasses
import math
from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import even_steps
from common.blocks import DropPath
from common.convolution import Conv3d
from common.errors import config_error

EPS = 1e-6
HEAD = 96  # channels
CLIP = (16, 224, 224)  # voxels that the tables of positions were made for
STEM = (2, 4, 4)  # stride of a first token
Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Step:
    """One block: heads, channels before and after, and by how much queries, and keys and values, are pooled."""

    heads: int
    ins: int
    outs: int
    queries: Triple
    keys: Triple


class TokenPool(nn.Module):
    """A depthwise convolution over the grid of tokens, then a norm; the class token is only normed.

    (B, heads, 1 + cells, d) -> (B, heads, 1 + fewer cells, d), and the new grid.
    """

    def __init__(self, stride: Triple) -> None:
        super().__init__()
        self.pool = Conv3d(HEAD, HEAD, 3, stride, 1, groups=HEAD, bias=False)
        self.norm_act = nn.Sequential(nn.LayerNorm(HEAD, EPS))

    def forward(self, x: Tensor, grid: Triple) -> tuple[Tensor, Triple]:
        batch, heads = x.shape[:2]
        cells = x[:, :, 1:].reshape(batch * heads, *grid, HEAD).movedim(-1, 1)
        pooled = self.pool(cells)  # (B * heads, d, z, y, x)
        z, y, x_edge = pooled.shape[2:]
        tokens = torch.cat([x[:, :, :1], pooled.flatten(2).transpose(1, 2).reshape(batch, heads, -1, HEAD)], 2)
        return self.norm_act(tokens), (z, y, x_edge)


class PooledAttention(nn.Module):
    """Attention of pooled queries to pooled keys and values: (B, n, ins) -> (B, n', outs), and the new grid.

    relative: biases from the decomposed distances along each axis, and pooled queries added to the output (MViTv2).
    """

    def __init__(self, step: Step, outs: int, relative: bool, grid: Triple) -> None:
        super().__init__()
        self.relative = relative
        if relative:
            edge = max(grid[1:])
            length = 2 * max(edge // step.queries[1], edge // step.keys[1]) - 1
            for axis, size in (("h", length), ("w", length), ("t", 2 * grid[0] - 1)):
                table = nn.Parameter(torch.zeros(size, HEAD))
                nn.init.trunc_normal_(table, std=0.02)
                setattr(self, f"rel_pos_{axis}", table)
        self.heads = step.heads
        self.qkv = nn.Linear(step.ins, 3 * outs)
        self.project = nn.Sequential(nn.Linear(outs, outs))
        self.pool_q = TokenPool(step.queries) if relative or math.prod(step.queries) > 1 else None
        self.pool_k, self.pool_v = TokenPool(step.keys), TokenPool(step.keys)

    def forward(self, x: Tensor, grid: Triple) -> tuple[Tensor, Triple]:
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)  # (B, heads, n, d)
        (k, of_keys), (v, _) = self.pool_k(k, grid), self.pool_v(v, grid)
        of_queries = grid
        if self.pool_q is not None:
            q, of_queries = self.pool_q(q, grid)
        bias = self.bias(q, of_queries, of_keys) if self.relative else None
        out = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        if self.relative:
            out = torch.cat([out[:, :, :1], out[:, :, 1:] + q[:, :, 1:]], 2)
        return self.project(out.transpose(1, 2).flatten(2)), of_queries

    def bias(self, q: Tensor, of_queries: Triple, of_keys: Triple) -> Tensor:
        """(B, heads, 1 + queries, 1 + keys): what a query's content says of distances; 0 for the class token."""
        cells = q[:, :, 1:].reshape(*q.shape[:2], *of_queries, HEAD)
        total = torch.zeros((), dtype=q.dtype, device=q.device)
        for axis, (name, plan) in enumerate((("t", "bhzyxd,zkd->bhzyxk"), ("h", "bhzyxd,ykd->bhzyxk"),
                                             ("w", "bhzyxd,xkd->bhzyxk"))):  # fmt: skip
            table = distances(self.get_parameter(f"rel_pos_{name}"), of_queries[axis], of_keys[axis])
            along = torch.einsum(plan, cells, table)
            shape = [1, 1, 1]
            shape[axis] = of_keys[axis]
            total = total + along.view(*along.shape[:-1], *shape)
        flat = total.flatten(5).flatten(2, 4)  # (B, heads, queries, keys)
        return nn.functional.pad(flat, (1, 0, 1, 0))


def distances(table: Tensor, queries: int, keys: int) -> Tensor:
    """(queries, keys, d): the table's rows for the distances along one axis, in cells of the finer of both grids."""
    length = 2 * max(queries, keys) - 1
    if len(table) != length:
        table = nn.functional.interpolate(table.T[None], length, mode="linear")[0].T
    of_query, of_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q, k = torch.arange(queries, device=table.device), torch.arange(keys, device=table.device)
    place = q[:, None] * of_query - (k[None] - (keys - 1)) * of_key
    return table[place.long()]


class MultiscaleBlock(nn.Module):
    """Attention and MLP: (B, n, ins) -> (B, n', outs), and the new grid; channels grow in the MLP (v1) or in attention (v2)."""

    def __init__(self, step: Step, relative: bool, grid: Triple, drop_path: float) -> None:
        super().__init__()
        inner = step.outs if relative else step.ins
        self.grows_first = relative
        self.norm1, self.norm2 = nn.LayerNorm(step.ins, EPS), nn.LayerNorm(inner, EPS)
        self.attn = PooledAttention(step, inner, relative, grid)
        hidden = 4 * inner
        self.mlp = nn.Sequential(
            nn.Linear(inner, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, step.outs), nn.Dropout(0.0)
        )
        self.project = nn.Linear(step.ins, step.outs) if step.ins != step.outs else None
        self.skip_stride = step.queries
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Triple) -> tuple[Tensor, Triple]:
        normed = self.norm1(x)
        attended, new_grid = self.attn(normed, grid)
        if self.project is not None and self.grows_first:
            x = self.project(normed)
        x = self.pooled_skip(x, grid) + self.drop_path(attended)
        normed = self.norm2(x)
        if self.project is not None and not self.grows_first:
            x = self.project(normed)
        return x + self.drop_path(self.mlp(normed)), new_grid

    def pooled_skip(self, x: Tensor, grid: Triple) -> Tensor:
        """The maximum over neighbours where queries are pooled; the class token stays."""
        if math.prod(self.skip_stride) == 1:
            return x
        kernel = tuple(s + 1 if s > 1 else s for s in self.skip_stride)
        cells = x[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid)
        pooled = nn.functional.max_pool3d(cells, kernel, self.skip_stride, tuple(k // 2 for k in kernel))
        return torch.cat([x[:, :1], pooled.flatten(2).transpose(1, 2)], 1)


class Positions(nn.Module):
    """The class token in front and, for MViT, positions along z and in the plane added: (B, n, C) -> (B, 1 + n, C)."""

    def __init__(self, width: int, grid: Triple, absolute: bool) -> None:
        super().__init__()
        self.grid, self.absolute = grid, absolute
        self.class_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        if absolute:
            self.spatial_pos = nn.Parameter(torch.zeros(grid[1] * grid[2], width))
            self.temporal_pos = nn.Parameter(torch.zeros(grid[0], width))
            self.class_pos = nn.Parameter(torch.zeros(width))
            for table in (self.spatial_pos, self.temporal_pos, self.class_pos):
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, grid: Triple) -> Tensor:
        tokens = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        if not self.absolute:
            return tokens
        spatial: Tensor = self.spatial_pos
        temporal: Tensor = self.temporal_pos
        if grid != self.grid:
            plane = spatial.T.reshape(1, -1, *self.grid[1:])
            spatial = nn.functional.interpolate(plane, grid[1:], mode="bicubic")[0].flatten(1).T
            temporal = nn.functional.interpolate(temporal.T[None], grid[0], mode="linear")[0].T
        cells = (temporal[:, None] + spatial[None]).flatten(0, 1)
        return tokens + torch.cat([self.class_pos[None], cells])


class MViT(Backbone):
    """Four maps, of the stride 2 along z and 4, 8, 16 and 32 along y and x; the vector is the class token."""

    def __init__(
        self, steps: tuple[Step, ...], relative: bool, drop_path: float, dims: int, in_channels: int, num_classes: int
    ) -> None:
        if dims != 3:
            raise config_error(f"dims: expected 3 for MViT, got {dims}; vit_b_16 and swin_t exist in both")
        ends = [k for k in range(len(steps)) if k + 1 == len(steps) or steps[k + 1].queries != (1, 1, 1)]
        super().__init__(dims, in_channels, tuple(steps[k].outs for k in ends), 1, 1)
        self.ends = ends
        width = steps[0].ins
        self.conv_proj = Conv3d(in_channels, width, (3, 7, 7), STEM, (1, 3, 3))
        grid = (CLIP[0] // STEM[0], CLIP[1] // STEM[1], CLIP[2] // STEM[2])
        self.pos_encoding = Positions(width, grid, not relative)
        blocks = []
        for step, rate in zip(steps, even_steps(drop_path, len(steps)), strict=True):
            blocks.append(MultiscaleBlock(step, relative, grid, rate))
            z, y, x = (n // s for n, s in zip(grid, step.queries, strict=True))
            grid = (z, y, x)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(steps[-1].outs, EPS)
        if num_classes:
            self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(steps[-1].outs, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def tokens(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The class token (B, C) after the last norm, and the maps."""
        cells = self.conv_proj(x)
        z, y, x_edge = cells.shape[2:]
        grid: Triple = (z, y, x_edge)
        words = self.pos_encoding(cells.flatten(2).transpose(1, 2), grid)
        found = []
        for number, block in enumerate(self.blocks):
            words, grid = block(words, grid)
            if number + 1 == len(self.blocks):
                words = self.norm(words)
            if number in self.ends:
                found.append(words[:, 1:].transpose(1, 2).reshape(len(words), -1, *grid))
        return words[:, 0], found

    def maps(self, x: Tensor) -> list[Tensor]:
        return self.tokens(x)[1]

    def forward(self, x: Tensor) -> Tensor:
        self.check_images(x)
        return self.tokens(x)[0]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.head(vector)
        return logits


def steps_of(widens_in_attention: bool) -> tuple[Step, ...]:
    """The sixteen blocks; queries are halved before blocks 1, 3 and 14, channels double with them (v1: a block before)."""
    halved, steps = (1, 3, 14), []
    for k in range(16):
        stage = sum(k >= h for h in halved)
        before, after = HEAD * 2**stage, HEAD * 2**stage
        if widens_in_attention and k in halved:
            before //= 2
        if not widens_in_attention and k + 1 in halved:
            after *= 2
        keys = 8 // 2**stage
        queries = 2 if k in halved else 1
        steps.append(Step(2**stage, before, after, (1, queries, queries), (1, keys, keys)))
    return tuple(steps)


MVITS: dict[str, Builder] = {
    "mvit_v1_b": partial(MViT, steps_of(False), False, 0.2),
    "mvit_v2_s": partial(MViT, steps_of(True), True, 0.2),
}
