"""Small networks for phones: MobileNetV2 (Sandler et al. 2018), MobileNetV3 (Howard et al. 2019), MNASNet (Tan et al. 2019)."""

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder, maps_of
from common.backbones.layers import (
    NormMaker,
    SqueezeExcite,
    batch_norm,
    conv_norm,
    convolution,
    divisible,
    initialise,
    plain_norm,
)


def relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter, project without activation: (B, ins, n...) -> (B, outs, ceil(n / stride)...)."""

    def __init__(self, dims: int, ins: int, outs: int, stride: int, expand: int) -> None:
        super().__init__()
        norm, inner = plain_norm(dims), ins * expand
        layers: list[nn.Module] = [conv_norm(dims, ins, inner, 1, 1, 1, norm, relu6())] if expand > 1 else []
        layers.append(conv_norm(dims, inner, inner, 3, stride, inner, norm, relu6()))
        self.conv = nn.Sequential(*layers, convolution(dims, inner, outs, 1, 1, 0, 1), norm(outs))
        self.has_skip = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv(x)
        return x + branch if self.has_skip else branch


class MobileNetV2(Backbone):
    """Maps of strides 2, 4, 8, 16 and 32, the last after the final 1 x 1 convolution."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(dims, in_channels, (16, 24, 32, 96, 1280), 1, 1)
        layers: list[nn.Module] = [conv_norm(dims, in_channels, 32, 3, 2, 1, plain_norm(dims), relu6())]
        ins = 32
        for expand, outs, depth, stride in self.STAGES:
            for k in range(depth):
                layers.append(InvertedResidual(dims, ins, outs, 1 if k else stride, expand))
                ins = outs
        layers.append(conv_norm(dims, ins, 1280, 1, 1, 1, plain_norm(dims), relu6()))
        self.features = nn.Sequential(*layers)
        if num_classes:
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        initialise(self, "fan_out", 0.01)

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, (1, 3, 6, 13, 18), x)

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


class Row(NamedTuple):
    """One block of MobileNetV3's tables 1 and 2."""

    kernel: int
    expanded: int
    outs: int
    gated: bool
    hard: bool  # Hardswish instead of ReLU
    stride: int


class GatedResidual(nn.Module):
    """MobileNetV3's block: (B, ins, n...) -> (B, outs, ceil(n / stride)...)."""

    def __init__(self, dims: int, ins: int, row: Row, norm: NormMaker) -> None:
        super().__init__()
        inner = row.expanded
        layers: list[nn.Module] = []
        if inner != ins:
            layers.append(conv_norm(dims, ins, inner, 1, 1, 1, norm, activation(row.hard)))
        layers.append(conv_norm(dims, inner, inner, row.kernel, row.stride, inner, norm, activation(row.hard)))
        if row.gated:
            squeezed = divisible(inner // 4, 8)
            layers.append(SqueezeExcite(dims, inner, squeezed, nn.ReLU(inplace=True), nn.Hardsigmoid(inplace=True)))
        layers.append(conv_norm(dims, inner, row.outs, 1, 1, 1, norm, None))
        self.block = nn.Sequential(*layers)
        self.has_skip = row.stride == 1 and ins == row.outs

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.block(x)
        return x + branch if self.has_skip else branch


def activation(hard: bool) -> nn.Module:
    return nn.Hardswish(inplace=True) if hard else nn.ReLU(inplace=True)


LARGE = (
    Row(3, 16, 16, False, False, 1), Row(3, 64, 24, False, False, 2), Row(3, 72, 24, False, False, 1),
    Row(5, 72, 40, True, False, 2), Row(5, 120, 40, True, False, 1), Row(5, 120, 40, True, False, 1),
    Row(3, 240, 80, False, True, 2), Row(3, 200, 80, False, True, 1), Row(3, 184, 80, False, True, 1),
    Row(3, 184, 80, False, True, 1), Row(3, 480, 112, True, True, 1), Row(3, 672, 112, True, True, 1),
    Row(5, 672, 160, True, True, 2), Row(5, 960, 160, True, True, 1), Row(5, 960, 160, True, True, 1),
)  # fmt: skip
SMALL = (
    Row(3, 16, 16, True, False, 2), Row(3, 72, 24, False, False, 2), Row(3, 88, 24, False, False, 1),
    Row(5, 96, 40, True, True, 2), Row(5, 240, 40, True, True, 1), Row(5, 240, 40, True, True, 1),
    Row(5, 120, 48, True, True, 1), Row(5, 144, 48, True, True, 1), Row(5, 288, 96, True, True, 2),
    Row(5, 576, 96, True, True, 1), Row(5, 576, 96, True, True, 1),
)  # fmt: skip


class MobileNetV3(Backbone):
    """Maps of strides 2 (large: of the first block, small: of the stem), 4, 8, 16 and 32, the last after the final 1 x 1."""

    def __init__(self, rows: tuple[Row, ...], hidden: int, dims: int, in_channels: int, num_classes: int) -> None:
        ends = [k for k, row in enumerate(rows) if row.stride == 2]  # in features: the place before each stride
        widths = [16, *(row.outs for row in rows)]
        last = 6 * rows[-1].outs
        super().__init__(dims, in_channels, (*(widths[k] for k in ends), last), 1, 1)
        self.ends = (*ends, len(rows) + 1)
        norm = batch_norm(dims, 1e-3, 0.01)
        layers: list[nn.Module] = [conv_norm(dims, in_channels, 16, 3, 2, 1, norm, activation(True))]
        layers += [GatedResidual(dims, ins, row, norm) for ins, row in zip(widths[:-1], rows, strict=True)]
        layers.append(conv_norm(dims, rows[-1].outs, last, 1, 1, 1, norm, activation(True)))
        self.features = nn.Sequential(*layers)
        if num_classes:
            self.classifier = nn.Sequential(
                nn.Linear(last, hidden), activation(True), nn.Dropout(0.2), nn.Linear(hidden, num_classes)
            )
        initialise(self, "fan_out", 0.01)

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, self.ends, x)

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


class MNASBlock(nn.Module):
    """MNASNet's inverted residual: (B, ins, n...) -> (B, outs, ceil(n / stride)...)."""

    def __init__(self, dims: int, ins: int, outs: int, kernel: int, stride: int, expand: int, norm: NormMaker) -> None:
        super().__init__()
        inner = ins * expand
        self.layers = nn.Sequential(
            convolution(dims, ins, inner, 1, 1, 0, 1), norm(inner), nn.ReLU(inplace=True),
            convolution(dims, inner, inner, kernel, stride, kernel // 2, inner), norm(inner), nn.ReLU(inplace=True),
            convolution(dims, inner, outs, 1, 1, 0, 1), norm(outs),
        )  # fmt: skip
        self.has_skip = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.layers(x)
        return x + branch if self.has_skip else branch


class MNASNet(Backbone):
    """Maps of strides 2, 4, 8, 16 and 32, the last after the final 1 x 1 convolution."""

    STACKS = (
        (24, 3, 2, 3, 3),
        (40, 5, 2, 3, 3),
        (80, 5, 2, 6, 3),
        (96, 3, 1, 6, 2),
        (192, 5, 2, 6, 4),
        (320, 3, 1, 6, 1),
    )

    def __init__(self, width: float, dims: int, in_channels: int, num_classes: int) -> None:
        stem, first = divisible(32 * width, 8), divisible(16 * width, 8)
        widths = [first, *(divisible(stack[0] * width, 8) for stack in self.STACKS)]
        super().__init__(dims, in_channels, (first, widths[1], widths[2], widths[4], 1280), 1, 1)
        norm = batch_norm(dims, 1e-5, 3e-4)
        layers: list[nn.Module] = [
            convolution(dims, in_channels, stem, 3, 2, 1, 1), norm(stem), nn.ReLU(inplace=True),
            convolution(dims, stem, stem, 3, 1, 1, stem), norm(stem), nn.ReLU(inplace=True),
            convolution(dims, stem, first, 1, 1, 0, 1), norm(first),
        ]  # fmt: skip
        for (_, kernel, stride, expand, depth), ins, outs in zip(self.STACKS, widths[:-1], widths[1:], strict=True):
            blocks = [MNASBlock(dims, ins, outs, kernel, stride, expand, norm)]
            blocks += [MNASBlock(dims, outs, outs, kernel, 1, expand, norm) for _ in range(depth - 1)]
            layers.append(nn.Sequential(*blocks))
        layers += [convolution(dims, widths[-1], 1280, 1, 1, 0, 1), norm(1280), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        initialise(self, "fan_out", 0.01)
        if num_classes:
            linear = nn.Linear(1280, num_classes)
            nn.init.kaiming_uniform_(linear.weight, mode="fan_out", nonlinearity="sigmoid")
            nn.init.zeros_(linear.bias)
            self.classifier = nn.Sequential(nn.Dropout(0.2), linear)

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.layers, (7, 8, 9, 11, 16), x)

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


MOBILENETS: dict[str, Builder] = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": partial(MobileNetV3, LARGE, 1280),
    "mobilenet_v3_small": partial(MobileNetV3, SMALL, 1024),
    "mnasnet0_5": partial(MNASNet, 0.5),
    "mnasnet0_75": partial(MNASNet, 0.75),
    "mnasnet1_0": partial(MNASNet, 1.0),
    "mnasnet1_3": partial(MNASNet, 1.3),
}
