"""UNETR: a vision transformer over 16^3 patches whose hidden states are brought up to a convolutional decoder.

Hatamizadeh et al. 2022, "UNETR: Transformers for 3D medical image segmentation"; weight for weight the network that
MONAI calls UNETR (base size, 12 blocks of 768), without its 12 unused layer norms.
"""

import re

import torch
from torch import Tensor, nn

from common.convolution import channels_last
from em_segmentation.model_defs.convolution import Conv3d, Doubling, InstanceNorm, Pointwise

PATCH = 16  # voxels along each axis
WIDTH, HEADS, DEPTH, MLP = 768, 12, 12, 3072  # of ViT-B
TAPS = (3, 6, 9)  # numbers, from 0, of the blocks after which hidden states are taken: after 4, 7 and 10 blocks
SLOPE = 0.01  # of the leaky ReLU


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP: (B, tokens, width) -> the same (Dosovitskiy et al. 2021)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, MLP), nn.GELU(), nn.Dropout(dropout), nn.Linear(MLP, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.out(self.attend(self.norm1(x))))
        mixed: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return mixed

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            self.qkv(x).view(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        )  # (B, heads, tokens, d)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return heads.transpose(1, 2).reshape(batch, tokens, WIDTH)


class ResidualBlock(nn.Module):
    """Two 3^3 convolutions with instance norm beside an identity or a 1^3 convolution: (B, in, ...) -> (B, out, ...)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = InstanceNorm(out_channels, False)  # holds nothing: one serves all
        self.conv3: nn.Module | None = None
        if in_channels != out_channels:
            self.conv3 = Pointwise(in_channels, out_channels, False)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.leaky_relu(self.norm(self.conv1(x)), SLOPE, inplace=True)
        skip = x if self.conv3 is None else self.norm(self.conv3(x))
        return nn.functional.leaky_relu(self.norm(self.conv2(inner)) + skip, SLOPE, inplace=True)


def doubled(in_channels: int, out_channels: int) -> Doubling:
    """Twice the size along every axis."""
    return Doubling(in_channels, out_channels, False)


class Raise(nn.Module):
    """Hidden states brought up: one transposed convolution, then `times` more, each with a residual block."""

    def __init__(self, out_channels: int, times: int) -> None:
        super().__init__()
        self.first = doubled(WIDTH, out_channels)
        self.more = nn.ModuleList(
            nn.Sequential(doubled(out_channels, out_channels), ResidualBlock(out_channels, out_channels))
            for _ in range(times)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, n...) -> (B, out, n * 2^(times + 1)...)."""
        x = self.first(x)
        for step in self.more:
            x = step(x)
        return x


class UpBlock(nn.Module):
    """One decoder level: twice the size, the finer level behind it, a residual block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = doubled(in_channels, out_channels)
        self.block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        merged: Tensor = self.block(torch.cat([self.up(coarse), fine], 1))
        return merged


class UNETR(nn.Module):
    """(B, in, z, y, x) -> (B, out, z, y, x) for volumes of exactly `patch_size`, multiples of 16 (learned positions).

    feature_size: channels at full resolution, doubled per level.
    """

    def __init__(
        self, in_channels: int, out_channels: int, patch_size: tuple[int, int, int], feature_size: int, dropout: float
    ) -> None:
        super().__init__()
        assert all(n % PATCH == 0 for n in patch_size), f"Expected multiples of {PATCH}, got {patch_size}"
        self.grid = [n // PATCH for n in patch_size]
        self.embed = Conv3d(in_channels, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] * self.grid[2], WIDTH))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dropout) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        f = feature_size
        self.encoder1 = ResidualBlock(in_channels, f)
        self.raises = nn.ModuleList([Raise(2 * f, 2), Raise(4 * f, 1), Raise(8 * f, 0)])
        self.ups = nn.ModuleList(
            [UpBlock(WIDTH, 8 * f), UpBlock(8 * f, 4 * f), UpBlock(4 * f, 2 * f), UpBlock(2 * f, f)]
        )
        self.head = Pointwise(f, out_channels, True)

    def forward(self, volume: Tensor) -> Tensor:
        expected = [n * PATCH for n in self.grid]
        assert list(volume.shape[2:]) == expected, f"Expected {expected} voxels, got {list(volume.shape[2:])}"
        volume = channels_last(volume)
        x = self.dropout(self.embed(volume).flatten(2).transpose(1, 2) + self.position)  # (B, tokens, width)
        taps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in TAPS:
                taps.append(self.as_volume(x))
        levels = [
            self.encoder1(volume),
            *(step(tap) for step, tap in zip(self.raises, taps, strict=True)),
        ]  # finest first
        x = self.as_volume(self.norm(x))
        for up, level in zip(self.ups, reversed(levels), strict=True):
            x = up(x, level)
        logits: Tensor = self.head(x)
        return logits

    def as_volume(self, tokens: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, width, z/16, y/16, x/16)."""
        return tokens.transpose(1, 2).reshape(len(tokens), WIDTH, *self.grid)


def unetr_key(reference: str) -> str | None:
    """Our name of a weight of MONAI's UNETR; None for those that nothing uses."""
    if "norm_cross_attn" in reference:
        return None
    key = reference.removeprefix("vit.")
    key = key.replace("patch_embedding.position_embeddings", "position").replace(
        "patch_embedding.patch_embeddings", "embed"
    )
    key = key.replace("attn.out_proj.", "out.").replace("attn.qkv.", "qkv.")
    key = key.replace("mlp.linear1.", "mlp.0.").replace("mlp.linear2.", "mlp.3.")
    key = key.replace("encoder1.layer.", "encoder1.").replace("out.conv.conv.", "head.")
    key = re.sub(r"^encoder([234])\.", lambda m: f"raises.{int(m[1]) - 2}.", key)
    key = (
        key.replace("transp_conv_init.conv.", "first.").replace(".blocks.", ".more.")
        if key.startswith("raises")
        else key
    )
    key = re.sub(r"^decoder([2345])\.", lambda m: f"ups.{5 - int(m[1])}.", key)
    key = key.replace("transp_conv.conv.", "up.").replace("conv_block.", "block.")
    return re.sub(r"(conv[123]|more\.\d\.0)\.conv\.", r"\1.", key)
