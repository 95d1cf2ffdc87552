"""EfficientNet (Tan and Le 2019) and EfficientNetV2 (Tan and Le 2021)."""

import math
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder, maps_of
from common.backbones.layers import (
    NormMaker,
    SqueezeExcite,
    batch_norm,
    conv_norm,
    divisible,
    initialise,
    linear_steps,
)
from common.blocks import DropPath

DROP_PATH = 0.2  # of the last block; from 0 linearly over all


class Stage(NamedTuple):
    """Blocks of one kind; only the first has the stride."""

    fused: bool
    expand: int
    kernel: int
    stride: int
    ins: int
    outs: int
    depth: int


class Block(nn.Module):
    """Inverted residual: expand, filter, gate, project; fused: expand and filter in one convolution, without gate."""

    def __init__(self, dims: int, stage: Stage, norm: NormMaker, drop_path: float) -> None:
        super().__init__()
        ins, outs, inner = stage.ins, stage.outs, divisible(stage.ins * stage.expand, 8)
        layers: list[nn.Module] = []
        if stage.fused and inner == ins:
            layers = [conv_norm(dims, ins, outs, stage.kernel, stage.stride, 1, norm, silu())]
        elif stage.fused:
            layers.append(conv_norm(dims, ins, inner, stage.kernel, stage.stride, 1, norm, silu()))
            layers.append(conv_norm(dims, inner, outs, 1, 1, 1, norm, None))
        else:
            if inner != ins:
                layers.append(conv_norm(dims, ins, inner, 1, 1, 1, norm, silu()))
            layers.append(conv_norm(dims, inner, inner, stage.kernel, stage.stride, inner, norm, silu()))
            layers.append(SqueezeExcite(dims, inner, max(1, ins // 4), silu(), nn.Sigmoid()))
            layers.append(conv_norm(dims, inner, outs, 1, 1, 1, norm, None))
        self.block = nn.Sequential(*layers)
        self.has_skip = stage.stride == 1 and ins == outs
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ins, n...) -> (B, outs, ceil(n / stride)...)."""
        branch: Tensor = self.block(x)
        return x + self.drop_path(branch) if self.has_skip else branch


def silu() -> nn.Module:
    return nn.SiLU(inplace=True)


class EfficientNet(Backbone):
    """Maps of strides 2, 4, 8, 16 and 32, the last after the final 1 x 1 convolution."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        last: int,
        dropout: float,
        eps: float,
        momentum: float,
        dims: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        coarsened = [k for k, stage in enumerate(stages) if k and stage.stride == 2]  # in features: the place before it
        super().__init__(dims, in_channels, (*(stages[k - 1].outs for k in coarsened), last), 1, 1)
        self.ends = (*coarsened, len(stages) + 1)
        norm = batch_norm(dims, eps, momentum)
        layers = [conv_norm(dims, in_channels, stages[0].ins, 3, 2, 1, norm, silu())]
        rates = iter(linear_steps(DROP_PATH, sum(stage.depth for stage in stages)))
        for stage in stages:
            inner = stage._replace(ins=stage.outs, stride=1)
            blocks = [Block(dims, inner if k else stage, norm, next(rates)) for k in range(stage.depth)]
            layers.append(nn.Sequential(*blocks))
        layers.append(conv_norm(dims, stages[-1].outs, last, 1, 1, 1, norm, silu()))
        self.features = nn.Sequential(*layers)
        initialise(self, "fan_out", 0.01)
        if num_classes:
            linear = nn.Linear(last, num_classes)
            nn.init.uniform_(linear.weight, -(num_classes**-0.5), num_classes**-0.5)
            nn.init.zeros_(linear.bias)
            self.classifier = nn.Sequential(nn.Dropout(dropout), linear)

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, self.ends, x)

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


B0 = (
    Stage(False, 1, 3, 1, 32, 16, 1),
    Stage(False, 6, 3, 2, 16, 24, 2),
    Stage(False, 6, 5, 2, 24, 40, 2),
    Stage(False, 6, 3, 2, 40, 80, 3),
    Stage(False, 6, 5, 1, 80, 112, 3),
    Stage(False, 6, 5, 2, 112, 192, 4),
    Stage(False, 6, 3, 1, 192, 320, 1),
)
V2_S = (
    Stage(True, 1, 3, 1, 24, 24, 2),
    Stage(True, 4, 3, 2, 24, 48, 4),
    Stage(True, 4, 3, 2, 48, 64, 4),
    Stage(False, 4, 3, 2, 64, 128, 6),
    Stage(False, 6, 3, 1, 128, 160, 9),
    Stage(False, 6, 3, 2, 160, 256, 15),
)
V2_M = (
    Stage(True, 1, 3, 1, 24, 24, 3),
    Stage(True, 4, 3, 2, 24, 48, 5),
    Stage(True, 4, 3, 2, 48, 80, 5),
    Stage(False, 4, 3, 2, 80, 160, 7),
    Stage(False, 6, 3, 1, 160, 176, 14),
    Stage(False, 6, 3, 2, 176, 304, 18),
    Stage(False, 6, 3, 1, 304, 512, 5),
)
V2_L = (
    Stage(True, 1, 3, 1, 32, 32, 4),
    Stage(True, 4, 3, 2, 32, 64, 7),
    Stage(True, 4, 3, 2, 64, 96, 7),
    Stage(False, 4, 3, 2, 96, 192, 10),
    Stage(False, 6, 3, 1, 192, 224, 19),
    Stage(False, 6, 3, 2, 224, 384, 25),
    Stage(False, 6, 3, 1, 384, 640, 7),
)


def scaled(width: float, depth: float) -> tuple[tuple[Stage, ...], int]:
    """B0 with so many times its channels and blocks, and the channels after the last convolution."""
    stages = tuple(
        stage._replace(
            ins=divisible(stage.ins * width, 8),
            outs=divisible(stage.outs * width, 8),
            depth=math.ceil(stage.depth * depth),
        )
        for stage in B0
    )
    return stages, 4 * stages[-1].outs


EFFICIENTNETS: dict[str, Builder] = {
    "efficientnet_b0": partial(EfficientNet, *scaled(1.0, 1.0), 0.2, 1e-5, 0.1),
    "efficientnet_b1": partial(EfficientNet, *scaled(1.0, 1.1), 0.2, 1e-5, 0.1),
    "efficientnet_b2": partial(EfficientNet, *scaled(1.1, 1.2), 0.3, 1e-5, 0.1),
    "efficientnet_b3": partial(EfficientNet, *scaled(1.2, 1.4), 0.3, 1e-5, 0.1),
    "efficientnet_b4": partial(EfficientNet, *scaled(1.4, 1.8), 0.4, 1e-5, 0.1),
    "efficientnet_b5": partial(EfficientNet, *scaled(1.6, 2.2), 0.4, 1e-3, 0.01),
    "efficientnet_b6": partial(EfficientNet, *scaled(1.8, 2.6), 0.5, 1e-3, 0.01),
    "efficientnet_b7": partial(EfficientNet, *scaled(2.0, 3.1), 0.5, 1e-3, 0.01),
    "efficientnet_v2_s": partial(EfficientNet, V2_S, 1280, 0.2, 1e-3, 0.1),
    "efficientnet_v2_m": partial(EfficientNet, V2_M, 1280, 0.3, 1e-3, 0.1),
    "efficientnet_v2_l": partial(EfficientNet, V2_L, 1280, 0.4, 1e-3, 0.1),
}
