"""ConvNeXt: a residual network with the habits of a transformer (Liu et al. 2022)."""

from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder, maps_of
from common.backbones.layers import even_steps
from common.blocks import DropPath
from common.convolution import CONVOLUTION

EPS = 1e-6
LAYER_SCALE = 1e-6  # of a branch at the start


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, n...)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MoveChannels(nn.Module):
    """Channels last, or first again."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.target)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, norm, 1 x 1 to four times the channels, GELU, 1 x 1, scale, skip: (B, C, n...) -> the same."""

    def __init__(self, dims: int, channels: int, drop_path: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            CONVOLUTION[dims](channels, channels, 7, padding=3, groups=channels), MoveChannels(1, -1),
            nn.LayerNorm(channels, EPS), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels),
            MoveChannels(-1, 1),
        )  # fmt: skip
        self.layer_scale = nn.Parameter(torch.full((channels, *[1] * dims), LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.drop_path(self.layer_scale * self.block(x))
        return mixed


class ConvNeXt(Backbone):
    """Maps of strides 4, 8, 16 and 32."""

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        depths: tuple[int, int, int, int],
        drop_path: float,
        dims: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__(dims, in_channels, widths, 32, 32)
        stem = nn.Sequential(CONVOLUTION[dims](in_channels, widths[0], 4, 4), ChannelNorm(widths[0], EPS))
        layers = [stem]
        rates = iter(even_steps(drop_path, sum(depths)))
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers.append(nn.Sequential(*(ConvNeXtBlock(dims, width, next(rates)) for _ in range(depth))))
            if number < 3:
                down = CONVOLUTION[dims](width, widths[number + 1], 2, 2)
                layers.append(nn.Sequential(ChannelNorm(width, EPS), down))
        self.features = nn.Sequential(*layers)
        if num_classes:
            self.classifier = nn.Sequential(
                nn.LayerNorm(widths[-1], EPS), nn.Flatten(), nn.Linear(widths[-1], num_classes)
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, (1, 3, 5, 7), x)

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


CONVNEXTS: dict[str, Builder] = {
    "convnext_tiny": partial(ConvNeXt, (96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "convnext_small": partial(ConvNeXt, (96, 192, 384, 768), (3, 3, 27, 3), 0.4),
    "convnext_base": partial(ConvNeXt, (128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
    "convnext_large": partial(ConvNeXt, (192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
}
