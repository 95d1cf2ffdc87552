"""Convolutional networks with 3D weights of their own: R3D, MC3, R(2+1)D (Tran et al. 2018), S3D (Xie et al. 2018)."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder, maps_of
from common.backbones.layers import initialise, plain_norm
from common.convolution import Conv3d
from common.errors import config_error

WIDTHS = (64, 128, 256, 512)
Kind = Literal["r3d", "mc3", "r2plus1d"]
Triple = tuple[int, int, int]


def check_three(dims: int, name: str) -> None:
    if dims != 3:
        raise config_error(f"dims: expected 3 for {name}, got {dims}; resnet18 exists in both")


def conv3d(ins: int, outs: int, kernel: Triple, stride: Triple) -> Conv3d:
    """Without bias, padded by half the kernel."""
    return Conv3d(ins, outs, kernel, stride, (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2), bias=False)


def middle(kind: Kind, ins: int, outs: int, inner: int, stride: int) -> nn.Module:
    """The convolution of a block: 3 x 3 x 3, 1 x 3 x 3 (mc3), or 1 x 3 x 3 to `inner` channels and 3 x 1 x 1."""
    if kind == "r3d":
        return conv3d(ins, outs, (3, 3, 3), (stride, stride, stride))
    if kind == "mc3":
        return conv3d(ins, outs, (1, 3, 3), (1, stride, stride))
    return nn.Sequential(
        conv3d(ins, inner, (1, 3, 3), (1, stride, stride)), plain_norm(3)(inner), nn.ReLU(inplace=True),
        conv3d(inner, outs, (3, 1, 1), (stride, 1, 1)),
    )  # fmt: skip


class VideoBlock(nn.Module):
    """Two convolutions and a skip: (B, ins, z, y, x) -> (B, outs, z', y / stride, x / stride)."""

    def __init__(self, kind: Kind, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        norm, inner = plain_norm(3), ins * outs * 27 // (ins * 9 + 3 * outs)
        self.conv1 = nn.Sequential(middle(kind, ins, outs, inner, stride), norm(outs), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(middle(kind, outs, outs, inner, 1), norm(outs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or ins != outs:
            along_z = 1 if kind == "mc3" else stride
            self.downsample = nn.Sequential(conv3d(ins, outs, (1, 1, 1), (along_z, stride, stride)), norm(outs))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.conv1(x))
        branch += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(branch)
        return out


class VideoResNet(Backbone):
    """Maps of strides 2, 4, 8 and 16 along y and x, and 1, 2, 4 and 8 along z (mc3: 1)."""

    def __init__(self, kind: Kind, dims: int, in_channels: int, num_classes: int) -> None:
        check_three(dims, "video ResNets")
        super().__init__(dims, in_channels, WIDTHS, 1, 1)
        norm = plain_norm(3)
        layers: list[nn.Module] = [conv3d(in_channels, 64, (3, 7, 7), (1, 2, 2)), norm(64), nn.ReLU(inplace=True)]
        if kind == "r2plus1d":
            layers = [conv3d(in_channels, 45, (1, 7, 7), (1, 2, 2)), norm(45), nn.ReLU(inplace=True),
                      conv3d(45, 64, (3, 1, 1), (1, 1, 1)), norm(64), nn.ReLU(inplace=True)]  # fmt: skip
        self.stem = nn.Sequential(*layers)
        ins = 64
        for number, width in enumerate(WIDTHS):
            own: Kind = "r3d" if kind == "mc3" and number == 0 else kind
            blocks = [VideoBlock(own, ins, width, 2 if number else 1), VideoBlock(own, width, width, 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            ins = width
        if num_classes:
            self.fc = nn.Linear(512, num_classes)
        initialise(self, "fan_out", 0.01)

    def maps(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        found = []
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
            found.append(x)
        return found

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.fc(vector)
        return logits


def unit(ins: int, outs: int, kernel: Triple, stride: Triple) -> nn.Sequential:
    """Convolution, norm, ReLU of S3D."""
    norm = nn.BatchNorm3d(outs, eps=1e-3, momentum=1e-3)
    return nn.Sequential(conv3d(ins, outs, kernel, stride), norm, nn.ReLU(inplace=True))


def separable(ins: int, outs: int, kernel: int, stride: int) -> nn.Sequential:
    """Along y and x first, then along z."""
    return nn.Sequential(
        unit(ins, outs, (1, kernel, kernel), (1, stride, stride)), unit(outs, outs, (kernel, 1, 1), (stride, 1, 1))
    )


class SeparableInception(nn.Module):
    """Four branches side by side: (B, ins, n...) -> (B, one + three + five + pooled, n...)."""

    def __init__(self, ins: int, one: int, few3: int, three: int, few5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.branch0 = unit(ins, one, (1, 1, 1), (1, 1, 1))
        self.branch1 = nn.Sequential(unit(ins, few3, (1, 1, 1), (1, 1, 1)), separable(few3, three, 3, 1))
        self.branch2 = nn.Sequential(unit(ins, few5, (1, 1, 1), (1, 1, 1)), separable(few5, five, 3, 1))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), unit(ins, pooled, (1, 1, 1), (1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], 1)


class S3D(Backbone):
    """Maps of strides 4, 8, 16 and 32 along y and x, and 2, 2, 4 and 8 along z."""

    def __init__(self, dims: int, in_channels: int, num_classes: int) -> None:
        check_three(dims, "s3d")
        super().__init__(dims, in_channels, (192, 480, 832, 1024), 5, 17)
        self.features = nn.Sequential(
            separable(in_channels, 64, 7, 2), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            unit(64, 64, (1, 1, 1), (1, 1, 1)), separable(64, 192, 3, 1), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            SeparableInception(192, 64, 96, 128, 16, 32, 32), SeparableInception(256, 128, 128, 192, 32, 96, 64),
            nn.MaxPool3d(3, 2, 1),
            SeparableInception(480, 192, 96, 208, 16, 48, 64), SeparableInception(512, 160, 112, 224, 24, 64, 64),
            SeparableInception(512, 128, 128, 256, 24, 64, 64), SeparableInception(512, 112, 144, 288, 32, 64, 64),
            SeparableInception(528, 256, 160, 320, 32, 128, 128), nn.MaxPool3d(2, 2),
            SeparableInception(832, 256, 160, 320, 32, 128, 128), SeparableInception(832, 384, 192, 384, 48, 128, 128),
        )  # fmt: skip
        if num_classes:
            self.classifier = nn.Sequential(nn.Dropout(0.2), Conv3d(1024, num_classes, 1))

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, (3, 6, 12, 15), x)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean of the means of all boxes of 2 x 7 x 7 cells, as the reference has it; of smaller maps the plain mean."""
        box = [min(n, edge) for n, edge in zip(x.shape[2:], (2, 7, 7), strict=True)]
        return nn.functional.avg_pool3d(x, box, 1).flatten(2).mean(2)

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector[:, :, None, None, None]).flatten(1)
        return logits


VIDEOS: dict[str, Builder] = {
    "r3d_18": partial(VideoResNet, "r3d"),
    "mc3_18": partial(VideoResNet, "mc3"),
    "r2plus1d_18": partial(VideoResNet, "r2plus1d"),
    "s3d": S3D,
}
