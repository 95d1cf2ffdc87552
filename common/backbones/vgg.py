"""Plain stacks of convolutions: AlexNet (Krizhevsky 2014), VGG (Simonyan 2015), SqueezeNet (Iandola et al. 2016)."""

from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder, maps_of
from common.backbones.layers import along, fixed_grid_means, initialise, max_pool, plain_norm
from common.convolution import CONVOLUTION

WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 4096  # units of the classifiers of AlexNet and VGG


def biased(dims: int, ins: int, outs: int, kernel: int, stride: int, padding: int) -> nn.Module:
    return CONVOLUTION[dims](ins, outs, kernel, stride, padding)


class VGG(Backbone):
    """Maps of strides 2, 4, 8, 16 and 32, after each pooling."""

    def __init__(self, depths: tuple[int, ...], has_norm: bool, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(dims, in_channels, WIDTHS, 1, 32)
        layers: list[nn.Module] = []
        ins, ends = in_channels, []
        for depth, width in zip(depths, WIDTHS, strict=True):
            for _ in range(depth):
                layers.append(biased(dims, ins, width, 3, 1, 1))
                if has_norm:
                    layers.append(plain_norm(dims)(width))
                layers.append(nn.ReLU(inplace=True))
                ins = width
            ends.append(len(layers))
            layers.append(max_pool(dims, 2, 2, 0, False))
        self.ends = tuple(ends)
        self.features = nn.Sequential(*layers)
        if num_classes:
            self.classifier = nn.Sequential(
                nn.Linear(WIDTHS[-1] * 7 * 7, HIDDEN), nn.ReLU(inplace=True), nn.Dropout(0.5),
                nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(HIDDEN, num_classes),
            )  # fmt: skip
        initialise(self, "fan_out", 0.01)

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, self.ends, x)

    def logits(self, x: Tensor) -> Tensor:
        self.check_classifier()
        logits: Tensor = self.classifier(fixed_grid_means(self.forward_features(x)[-1], 7))
        return logits


class AlexNet(Backbone):
    """Maps of strides 8, 16 and 32, after each pooling."""

    def __init__(self, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(dims, in_channels, (64, 192, 256), 7, 63)
        self.features = nn.Sequential(
            biased(dims, in_channels, 64, 11, 4, 2), nn.ReLU(inplace=True), max_pool(dims, 3, 2, 0, False),
            biased(dims, 64, 192, 5, 1, 2), nn.ReLU(inplace=True), max_pool(dims, 3, 2, 0, False),
            biased(dims, 192, 384, 3, 1, 1), nn.ReLU(inplace=True),
            biased(dims, 384, 256, 3, 1, 1), nn.ReLU(inplace=True),
            biased(dims, 256, 256, 3, 1, 1), nn.ReLU(inplace=True), max_pool(dims, 3, 2, 0, False),
        )  # fmt: skip
        if num_classes:
            self.classifier = nn.Sequential(
                nn.Dropout(0.5), nn.Linear(256 * 6 * 6, HIDDEN), nn.ReLU(inplace=True),
                nn.Dropout(0.5), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, num_classes),
            )  # fmt: skip

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, (2, 5, 12), x)

    def logits(self, x: Tensor) -> Tensor:
        self.check_classifier()
        logits: Tensor = self.classifier(fixed_grid_means(self.forward_features(x)[-1], 6))
        return logits


class Fire(nn.Module):
    """1 x 1 to few channels, then 1 x 1 and 3 x 3 beside each other: (B, ins, n...) -> (B, 2 outs, n...)."""

    def __init__(self, dims: int, ins: int, squeezed: int, outs: int) -> None:
        super().__init__()
        self.squeeze = biased(dims, ins, squeezed, 1, 1, 0)
        self.expand1x1 = biased(dims, squeezed, outs, 1, 1, 0)
        self.expand3x3 = biased(dims, squeezed, outs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        few = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.expand1x1(few), self.expand3x3(few)], 1))


class SqueezeNet(Backbone):
    """Maps of strides 4, 8 and 16, before the next pooling."""

    def __init__(self, version: str, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(
            dims,
            in_channels,
            (256, 512, 512) if version == "1.0" else (128, 256, 512),
            1,
            21 if version == "1.0" else 17,
        )
        pools = {"1.0": (3, 8), "1.1": (3, 6)}[version]
        fires = [Fire(dims, ins, squeezed, outs) for ins, squeezed, outs in (
            (64 if version == "1.1" else 96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192),
            (384, 48, 192), (384, 64, 256), (512, 64, 256))]  # fmt: skip
        stem = (96, 7) if version == "1.0" else (64, 3)
        layers = [
            CONVOLUTION[dims](in_channels, stem[0], stem[1], 2, along(dims, stem[1] // 2, 0)), nn.ReLU(inplace=True),
            max_pool(dims, 3, 2, 0, True), *fires,
        ]  # fmt: skip
        for place in pools:
            layers.insert(place + 3 if version == "1.0" else place + 2, max_pool(dims, 3, 2, 0, True))
        self.ends = (
            *(k - 1 for k, layer in enumerate(layers) if k > 2 and "Pool" in type(layer).__name__),
            len(layers) - 1,
        )
        self.features = nn.Sequential(*layers)
        if num_classes:
            self.classifier = nn.Sequential(
                nn.Dropout(0.5), CONVOLUTION[dims](512, num_classes, 1), nn.ReLU(inplace=True)
            )

    def maps(self, x: Tensor) -> list[Tensor]:
        return maps_of(self.features, self.ends, x)

    def logits(self, x: Tensor) -> Tensor:
        self.check_classifier()
        logits: Tensor = self.classifier(self.forward_features(x)[-1]).flatten(2).mean(2)
        return logits


VGGS: dict[str, Builder] = {
    "alexnet": AlexNet,
    "vgg11": partial(VGG, (1, 1, 2, 2, 2), False),
    "vgg11_bn": partial(VGG, (1, 1, 2, 2, 2), True),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2), False),
    "vgg13_bn": partial(VGG, (2, 2, 2, 2, 2), True),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3), False),
    "vgg16_bn": partial(VGG, (2, 2, 3, 3, 3), True),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4), False),
    "vgg19_bn": partial(VGG, (2, 2, 4, 4, 4), True),
    "squeezenet1_0": partial(SqueezeNet, "1.0"),
    "squeezenet1_1": partial(SqueezeNet, "1.1"),
}
