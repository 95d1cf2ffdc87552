"""DenseNet: every layer reads the maps of all before it (Huang et al. 2017)."""

from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import avg_pool, convolution, initialise, plain_norm, pooled_stem

BOTTLENECK = 4  # times the growth, of a layer's 1 x 1 convolution


class DenseLayer(nn.Module):
    """norm-relu-1x1-norm-relu-3x3: (B, ins, n...) -> (B, growth, n...)."""

    def __init__(self, dims: int, ins: int, growth: int) -> None:
        super().__init__()
        norm, inner = plain_norm(dims), BOTTLENECK * growth
        self.norm1 = norm(ins)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = convolution(dims, ins, inner, 1, 1, 0, 1)
        self.norm2 = norm(inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = convolution(dims, inner, growth, 3, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(self.relu1(self.norm1(x)))
        new: Tensor = self.conv2(self.relu2(self.norm2(inner)))
        return new


class DenseBlock(nn.Module):
    """(B, ins, n...) -> (B, ins + depth * growth, n...)."""

    def __init__(self, dims: int, ins: int, growth: int, depth: int) -> None:
        super().__init__()
        for k in range(depth):
            self.add_module(f"denselayer{k + 1}", DenseLayer(dims, ins + k * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.children():
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


def transition(dims: int, ins: int) -> nn.Sequential:
    """Half the channels at half the resolution."""
    half = nn.Sequential()
    half.add_module("norm", plain_norm(dims)(ins))
    half.add_module("relu", nn.ReLU(inplace=True))
    half.add_module("conv", convolution(dims, ins, ins // 2, 1, 1, 0, 1))
    half.add_module("pool", avg_pool(dims, 2, 2, 0))
    return half


class DenseNet(Backbone):
    """Maps of strides 4, 8, 16 and 32, the last after the final norm and ReLU."""

    def __init__(
        self, growth: int, depths: tuple[int, int, int, int], dims: int, in_channels: int, num_classes: int
    ) -> None:
        stem, sizes = 2 * growth, []
        channels = stem
        for depth in depths:
            sizes.append(channels + depth * growth)
            channels = sizes[-1] // 2
        super().__init__(dims, in_channels, tuple(sizes), 1, 29)
        features = nn.Sequential()
        first, pool = pooled_stem(dims, in_channels, stem, 7)
        features.add_module("conv0", first)
        features.add_module("norm0", plain_norm(dims)(stem))
        features.add_module("relu0", nn.ReLU(inplace=True))
        features.add_module("pool0", pool)
        ins = stem
        for number, (depth, size) in enumerate(zip(depths, sizes, strict=True), 1):
            features.add_module(f"denseblock{number}", DenseBlock(dims, ins, growth, depth))
            if number < len(depths):
                features.add_module(f"transition{number}", transition(dims, size))
            ins = size // 2
        features.add_module("norm5", plain_norm(dims)(sizes[-1]))
        self.features = features
        if num_classes:
            self.classifier = nn.Linear(sizes[-1], num_classes)
        initialise(self, "fan_in", None)

    def maps(self, x: Tensor) -> list[Tensor]:
        found = []
        for name, stage in self.features.named_children():
            x = stage(x)
            if name.startswith("denseblock"):
                found.append(x)
        return [*found[:-1], torch.relu(x)]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.classifier(vector)
        return logits


DENSENETS: dict[str, Builder] = {
    "densenet121": partial(DenseNet, 32, (6, 12, 24, 16)),
    "densenet161": partial(DenseNet, 48, (6, 12, 36, 24)),
    "densenet169": partial(DenseNet, 32, (6, 12, 32, 32)),
    "densenet201": partial(DenseNet, 32, (6, 12, 48, 32)),
}
