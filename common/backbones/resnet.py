"""ResNet (He et al. 2016), ResNeXt (Xie et al. 2017) and Wide ResNet (Zagoruyko and Komodakis 2016)."""

from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import convolution, initialise, plain_norm, pooled_stem
from common.errors import config_error

WIDTHS = (64, 128, 256, 512)


class Basic(nn.Module):
    """Two 3 x 3 convolutions and a skip: (B, ins, n...) -> (B, width, ceil(n / stride)...)."""

    expansion = 1

    def __init__(self, dims: int, ins: int, width: int, stride: int, groups: int, base_width: int) -> None:
        super().__init__()
        assert (groups, base_width) == (1, 64), "Basic blocks are neither grouped nor widened"
        norm = plain_norm(dims)
        self.conv1 = convolution(dims, ins, width, 3, stride, 1, 1)
        self.bn1 = norm(width)
        self.conv2 = convolution(dims, width, width, 3, 1, 1, 1)
        self.bn2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(dims, ins, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        branch += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(branch)
        return out


class Bottleneck(nn.Module):
    """1 x 1, grouped 3 x 3 with the stride, 1 x 1, and a skip: (B, ins, n...) -> (B, 4 width, ceil(n / stride)...)."""

    expansion = 4

    def __init__(self, dims: int, ins: int, width: int, stride: int, groups: int, base_width: int) -> None:
        super().__init__()
        norm = plain_norm(dims)
        inner, outs = width * base_width // 64 * groups, width * self.expansion
        self.conv1 = convolution(dims, ins, inner, 1, 1, 0, 1)
        self.bn1 = norm(inner)
        self.conv2 = convolution(dims, inner, inner, 3, stride, 1, groups)
        self.bn2 = norm(inner)
        self.conv3 = convolution(dims, inner, outs, 1, 1, 0, 1)
        self.bn3 = norm(outs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(dims, ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        branch += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(branch)
        return out


def shortcut(dims: int, ins: int, outs: int, stride: int) -> nn.Sequential | None:
    """A strided 1 x 1 convolution where a skip changes shape."""
    if stride == 1 and ins == outs:
        return None
    return nn.Sequential(convolution(dims, ins, outs, 1, stride, 0, 1), plain_norm(dims)(outs))


class ResNet(Backbone):
    """Maps of strides 4, 8, 16 and 32."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        groups: int,
        base_width: int,
        dims: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        channels = tuple(width * block.expansion for width in WIDTHS)
        super().__init__(dims, in_channels, channels, 1, 1)
        self.conv1, self.maxpool = pooled_stem(dims, in_channels, 64, 7)
        self.bn1 = plain_norm(dims)(64)
        self.relu = nn.ReLU(inplace=True)
        ins = 64
        for number, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True), 1):
            blocks = []
            for k in range(depth):
                stride = 2 if number > 1 and k == 0 else 1
                blocks.append(block(dims, ins, width, stride, groups, base_width))
                ins = width * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        if num_classes:
            self.fc = nn.Linear(ins, num_classes)
        initialise(self, "fan_out", None)
        if dims == 3 and groups == 1:  # grouped convolutions are slower so
            self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def maps(self, x: Tensor) -> list[Tensor]:
        pooled = self.maxpool(self.bn1(self.conv1(x)))
        x = nn.functional.relu(pooled)  # the same as before pooling, of a quarter of the values
        found = []
        for number in range(1, 1 + len(self.feature_channels)):
            x = self.get_submodule(f"layer{number}")(x)
            found.append(x)
        return found

    def keep_stages(self, number: int) -> None:
        if not 1 <= number <= len(self.feature_channels) or "fc" in dict(self.named_children()):
            raise config_error(
                f"stages: expected 1 to {len(self.feature_channels)} of a network without classifier, got {number}"
            )
        for later in range(number + 1, 1 + len(self.feature_channels)):
            delattr(self, f"layer{later}")
        self.feature_channels = self.feature_channels[:number]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.fc(vector)
        return logits


RESNETS: dict[str, Builder] = {
    "resnet18": partial(ResNet, Basic, (2, 2, 2, 2), 1, 64),
    "resnet34": partial(ResNet, Basic, (3, 4, 6, 3), 1, 64),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": partial(ResNet, Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": partial(ResNet, Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": partial(ResNet, Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": partial(ResNet, Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": partial(ResNet, Bottleneck, (3, 4, 23, 3), 1, 128),
}
