"""Swin UNETR: a transformer of shifted windows over 2^3 patches, brought up by UNETR's convolutional decoder.

Hatamizadeh et al. 2022, "Swin UNETR: Swin transformers for semantic segmentation of brain tumors in MRI images"; weight
for weight the network that MONAI calls SwinUNETR (first version): swin_unetr_key maps its state dict onto ours.
"""

import math
import re

import torch
from torch import Tensor, nn

from common.attention import Windows, relative_positions, window_attention
from common.convolution import channels_last
from em_segmentation.model_defs.convolution import Conv3d, Pointwise
from em_segmentation.model_defs.unetr import ResidualBlock, UpBlock

STEP = 32  # voxels that every edge is a multiple of
WINDOW = (7, 7, 7)  # cells; never wider than the map
HEADS = (3, 6, 12, 24)  # of the four stages
DEPTH = 2  # blocks of a stage: one with windows in place, one with shifted windows
MLP_RATIO = 4
MERGED = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))  # cells of 2^3


class SwinBlock(nn.Module):
    """Pre-norm attention inside windows and MLP: (B, z, y, x, C) -> the same (Liu et al. 2021)."""

    relative_position: Tensor

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.position_bias = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in WINDOW), heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)
        self.register_buffer("relative_position", relative_positions(WINDOW), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(MLP_RATIO * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + windows.join(self.dropout(self.out(self.attend(windows.split(self.norm1(x)), windows))))
        mixed: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return mixed

    def attend(self, x: Tensor, windows: Windows) -> Tensor:
        count, n, width = x.shape
        qkv = self.qkv(x).view(count, n, 3, self.heads, width // self.heads)
        # of smaller windows the reference takes the first n cells of the full one: kept, for its weights to mean the same
        bias = self.position_bias[self.relative_position[:n, :n].reshape(-1)].view(n, n, -1).permute(2, 0, 1)
        kinds = windows.kinds.repeat(count // len(windows.kinds))
        heads: Tensor = window_attention(qkv, bias.to(qkv.dtype).contiguous(), windows.masks.to(qkv.dtype), kinds)
        return heads


class Stage(nn.Module):
    """Two blocks, then 2^3 cells merged into one of twice the width: (B, z, y, x, C) -> (B, z/2, y/2, x/2, 2C)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(width, heads, dropout) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2], x.shape[3])
        for number, block in enumerate(self.blocks):
            x = block(x, Windows(size, WINDOW, number % 2 == 1, True, False, x.device))
        cells = torch.cat([x[:, dz::2, dy::2, dx::2] for dz, dy, dx in MERGED], -1)  # (B, z/2, y/2, x/2, 8C)
        merged: Tensor = self.reduction(self.norm(cells))
        return merged


class SwinUNETR(nn.Module):
    """(B, in, z, y, x) -> (B, out, z, y, x), every edge a multiple of 32.

    feature_size: channels at full resolution and of the first stage, a multiple of 12; dropout: of the transformer.
    """

    def __init__(self, in_channels: int, out_channels: int, feature_size: int, dropout: float) -> None:
        super().__init__()
        assert feature_size % 12 == 0, f"Expected a multiple of 12 features, got {feature_size}"
        f = feature_size
        self.embed = Conv3d(in_channels, f, 2, stride=2)
        self.dropout = nn.Dropout(dropout)
        self.stages = nn.ModuleList(Stage(f * 2**i, heads, dropout) for i, heads in enumerate(HEADS))
        self.encoder = ResidualBlock(in_channels, f)  # of the volume itself
        self.taps = nn.ModuleList(ResidualBlock(f * 2**i, f * 2**i) for i in range(3))
        self.bottom = ResidualBlock(16 * f, 16 * f)
        widths = (16 * f, 8 * f, 4 * f, 2 * f, f, f)
        self.ups = nn.ModuleList(UpBlock(widths[i], widths[i + 1]) for i in range(5))
        self.head = Pointwise(f, out_channels, True)

    def forward(self, volume: Tensor) -> Tensor:
        assert all(n % STEP == 0 for n in volume.shape[2:]), f"Expected multiples of {STEP}, got {tuple(volume.shape)}"
        volume = channels_last(volume)
        x = self.dropout(self.embed(volume).movedim(1, -1).contiguous())  # (B, z/2, y/2, x/2, f)
        hidden = [normalized(x)]  # finest first
        for stage in self.stages:
            x = stage(x)
            hidden.append(normalized(x))
        levels = [self.encoder(volume), *(tap(h) for tap, h in zip(self.taps, hidden, strict=False)), hidden[3]]
        x = self.bottom(hidden[4])
        for up, level in zip(self.ups, reversed(levels), strict=True):
            x = up(x, level)
        logits: Tensor = self.head(x)
        return logits


def normalized(x: Tensor) -> Tensor:
    """(B, z, y, x, C) -> (B, C, z, y, x), every cell's channels to mean 0 and variance 1."""
    return nn.functional.layer_norm(x, x.shape[-1:]).movedim(-1, 1)


def swin_unetr_key(reference: str) -> str | None:
    """Our name of a weight of MONAI's SwinUNETR; None for the table of relative positions, which holds no weight."""
    if reference.endswith("relative_position_index"):
        return None
    key = reference.removeprefix("swinViT.").replace("patch_embed.proj.", "embed.")
    key = re.sub(r"^layers(\d)\.0\.(downsample\.)?", lambda m: f"stages.{int(m[1]) - 1}.", key)
    key = key.replace("attn.relative_position_bias_table", "position_bias")
    key = key.replace("attn.qkv.", "qkv.").replace("attn.proj.", "out.")
    key = key.replace("mlp.linear1.", "mlp.0.").replace("mlp.linear2.", "mlp.3.")
    key = key.replace("encoder1.layer.", "encoder.").replace("encoder10.layer.", "bottom.")
    key = re.sub(r"^encoder([234])\.layer\.", lambda m: f"taps.{int(m[1]) - 2}.", key)
    key = re.sub(r"^decoder(\d)\.", lambda m: f"ups.{5 - int(m[1])}.", key)
    key = key.replace("transp_conv.conv.", "up.").replace("conv_block.", "block.").replace("out.conv.conv.", "head.")
    return re.sub(r"(conv[123])\.conv\.", r"\1.", key)
