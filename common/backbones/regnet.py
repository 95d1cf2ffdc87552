"""RegNet X and Y: widths of blocks from a quantised line (Radosavovic et al. 2020, equations 2 to 4)."""

import math
from functools import partial

import numpy as np
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import SqueezeExcite, conv_norm, divisible, initialise, plain_norm

STEM = 32


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


class RegBlock(nn.Module):
    """1 x 1, grouped 3 x 3 with the stride, gate (Y only), 1 x 1, skip: (B, ins, n...) -> (B, width, ceil(n / stride)...)."""

    def __init__(self, dims: int, ins: int, width: int, stride: int, group: int, gated: bool) -> None:
        super().__init__()
        norm = plain_norm(dims)
        is_same = stride == 1 and ins == width
        self.proj = nn.Identity() if is_same else conv_norm(dims, ins, width, 1, stride, 1, norm, None)
        self.f = nn.Sequential()
        self.f.add_module("a", conv_norm(dims, ins, width, 1, 1, 1, norm, relu()))
        self.f.add_module("b", conv_norm(dims, width, width, 3, stride, width // group, norm, relu()))
        if gated:
            self.f.add_module("se", SqueezeExcite(dims, width, round(0.25 * ins), relu(), nn.Sigmoid()))
        self.f.add_module("c", conv_norm(dims, width, width, 1, 1, 1, norm, None))
        self.activation = relu()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.proj(x) + self.f(x))
        return out


def stages_of(depth: int, first: int, slope: float, ratio: float, group: int) -> list[tuple[int, int, int]]:
    """(width, blocks, group width) of each stage, from the line first + slope * k of the blocks k = 0 .. depth - 1."""
    line = first + slope * np.arange(depth)
    powers = np.round(np.log(line / first) / math.log(ratio))
    widths = (np.round(first * ratio**powers / 8) * 8).astype(int)
    stages = []
    for width in np.unique(widths).tolist():
        of_group = min(group, width)
        stages.append((divisible(width, of_group), int((widths == width).sum()), of_group))
    return stages


class RegNet(Backbone):
    """Maps of strides 4, 8, 16 and 32."""

    def __init__(
        self,
        gated: bool,
        depth: int,
        first: int,
        slope: float,
        ratio: float,
        group: int,
        dims: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        stages = stages_of(depth, first, slope, ratio, group)
        super().__init__(dims, in_channels, tuple(width for width, _, _ in stages), 1, 1)
        self.stem = conv_norm(dims, in_channels, STEM, 3, 2, 1, plain_norm(dims), relu())
        self.trunk_output = nn.Sequential()
        ins = STEM
        for number, (width, blocks, of_group) in enumerate(stages, 1):
            stage = nn.Sequential()
            for k in range(blocks):
                stage.add_module(f"block{number}-{k}", RegBlock(dims, ins, width, 1 if k else 2, of_group, gated))
                ins = width
            self.trunk_output.add_module(f"block{number}", stage)
        if num_classes:
            self.fc = nn.Linear(ins, num_classes)
        initialise(self, "fan_out", 0.01)

    def maps(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        found = []
        for stage in self.trunk_output:
            x = stage(x)
            found.append(x)
        return found

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.fc(vector)
        return logits


REGNETS: dict[str, Builder] = {
    "regnet_y_400mf": partial(RegNet, True, 16, 48, 27.89, 2.09, 8),
    "regnet_y_800mf": partial(RegNet, True, 14, 56, 38.84, 2.4, 16),
    "regnet_y_1_6gf": partial(RegNet, True, 27, 48, 20.71, 2.65, 24),
    "regnet_y_3_2gf": partial(RegNet, True, 21, 80, 42.63, 2.66, 24),
    "regnet_y_8gf": partial(RegNet, True, 17, 192, 76.82, 2.19, 56),
    "regnet_y_16gf": partial(RegNet, True, 18, 200, 106.23, 2.48, 112),
    "regnet_y_32gf": partial(RegNet, True, 20, 232, 115.89, 2.53, 232),
    "regnet_y_128gf": partial(RegNet, True, 27, 456, 160.83, 2.52, 264),
    "regnet_x_400mf": partial(RegNet, False, 22, 24, 24.48, 2.54, 16),
    "regnet_x_800mf": partial(RegNet, False, 16, 56, 35.73, 2.28, 16),
    "regnet_x_1_6gf": partial(RegNet, False, 18, 80, 34.01, 2.25, 24),
    "regnet_x_3_2gf": partial(RegNet, False, 25, 88, 26.31, 2.25, 48),
    "regnet_x_8gf": partial(RegNet, False, 23, 80, 49.56, 2.88, 120),
    "regnet_x_16gf": partial(RegNet, False, 22, 216, 55.59, 2.1, 128),
    "regnet_x_32gf": partial(RegNet, False, 23, 320, 69.86, 2.0, 168),
}
