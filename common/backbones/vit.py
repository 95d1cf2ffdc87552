"""Vision Transformer: an image is a sentence of patches (Dosovitskiy et al. 2021)."""

import math
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.convolution import CONVOLUTION
from common.errors import data_error

EDGE = 224  # of the images whose patches the table of positions was made for
EPS = 1e-6
INTERPOLATION = {2: "bicubic", 3: "trilinear"}


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, (B, n, C) -> the same; weights named as torch's MultiheadAttention's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, n, d)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP: (B, n, C) -> the same."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, EPS)
        self.self_attention = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, EPS)
        wide, narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Dropout(0.0), narrow, nn.Dropout(0.0))
        for layer in (wide, narrow):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.ln_1(x))
        mixed: Tensor = x + self.mlp(self.ln_2(x))
        return mixed


class Encoder(nn.Module):
    """Positions, layers, norm: (B, 1 + n, C) -> the same; the first token is the class's.

    The table of positions is of a square (cubic) grid; for other grids it is interpolated.
    """

    def __init__(self, dims: int, grid_edge: int, depth: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.grid = (grid_edge,) * dims
        self.pos_embedding = nn.Parameter(torch.empty(1, 1 + grid_edge**dims, width).normal_(std=0.02))
        self.layers = nn.Sequential()
        for number in range(depth):
            self.layers.add_module(f"encoder_layer_{number}", EncoderLayer(width, heads, hidden))
        self.ln = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        positions = self.pos_embedding if grid == self.grid else resized_positions(self.pos_embedding, self.grid, grid)
        out: Tensor = self.ln(self.layers(x + positions))
        return out


def resized_positions(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """(1, 1 + cells of the old grid, C) -> (1, 1 + cells of the new one, C); the class token keeps its own."""
    own, cells = table[:, :1], table[:, 1:]
    grid = cells.transpose(1, 2).reshape(1, -1, *old)  # (1, C, old...)
    resized = nn.functional.interpolate(grid, new, mode=INTERPOLATION[len(new)], align_corners=False)
    return torch.cat([own, resized.flatten(2).transpose(1, 2)], 1)


class VisionTransformer(Backbone):
    """One map, of the stride of a patch; the vector is the class token, not the map's mean."""

    def __init__(
        self, patch: int, depth: int, width: int, heads: int, hidden: int, dims: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__(dims, in_channels, (width,), patch, patch)
        self.patch = patch
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = CONVOLUTION[dims](in_channels, width, patch, patch)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_channels * patch**dims)))
        assert self.conv_proj.bias is not None
        nn.init.zeros_(self.conv_proj.bias)
        self.encoder = Encoder(dims, EDGE // patch, depth, width, heads, hidden)
        if num_classes:
            head = nn.Linear(width, num_classes)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads = nn.Sequential(OrderedDict(head=head))

    def check_images(self, x: Tensor) -> None:
        super().check_images(x)
        if any(n % self.patch for n in x.shape[2:]):
            raise data_error(
                f"VisionTransformer: expected edges that are multiples of {self.patch}, got {tuple(x.shape[2:])}; "
                "crop or pad them"
            )

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(B, in_channels, n...) -> (B, 1 + cells, C), and the grid of cells."""
        patches = self.conv_proj(x)
        grid = tuple(patches.shape[2:])
        words = torch.cat([self.class_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        return self.encoder(words, grid), grid

    def maps(self, x: Tensor) -> list[Tensor]:
        tokens, grid = self.tokens(x)
        return [tokens[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid)]

    def forward(self, x: Tensor) -> Tensor:
        self.check_images(x)
        return self.tokens(x)[0][:, 0]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.heads(vector)
        return logits


VITS: dict[str, Builder] = {
    "vit_b_16": partial(VisionTransformer, 16, 12, 768, 12, 3072),
    "vit_b_32": partial(VisionTransformer, 32, 12, 768, 12, 3072),
    "vit_l_16": partial(VisionTransformer, 16, 24, 1024, 16, 4096),
    "vit_l_32": partial(VisionTransformer, 32, 24, 1024, 16, 4096),
    "vit_h_14": partial(VisionTransformer, 14, 32, 1280, 16, 5120),
}
