"""Branches of several kernels beside each other: GoogLeNet (Szegedy et al. 2015) and Inception v3 (Szegedy et al. 2016).

GoogLeNet's third branch has a 3 x 3 kernel where the paper has 5 x 5, as in the implementation that the weights come from.
"""

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import Kernel, avg_pool, batch_norm, convolution, max_pool

EPS = 1e-3  # of batch norms


class Unit(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, dims: int, ins: int, outs: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = convolution(dims, ins, outs, kernel, stride, padding, 1)
        self.bn = batch_norm(dims, EPS, 0.1)(outs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.bn(self.conv(x)))


def narrow(model: nn.Module, std: float) -> None:
    """A normal distribution cut at 2 for all weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.trunc_normal_(module.weight, 0, std, -2, 2)


class Branches(nn.Module):
    """Named chains of layers over the same map, their outputs side by side."""

    def __init__(self, chains: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, chain in chains.items():
            self.add_module(name, chain)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], 1)


def google_block(dims: int, ins: int, one: int, few3: int, three: int, few5: int, five: int, pooled: int) -> Branches:
    """(B, ins, n...) -> (B, one + three + five + pooled, n...)."""
    return Branches({
        "branch1": Unit(dims, ins, one, 1, 1, 0),
        "branch2": nn.Sequential(Unit(dims, ins, few3, 1, 1, 0), Unit(dims, few3, three, 3, 1, 1)),
        "branch3": nn.Sequential(Unit(dims, ins, few5, 1, 1, 0), Unit(dims, few5, five, 3, 1, 1)),
        "branch4": nn.Sequential(max_pool(dims, 3, 1, 1, True), Unit(dims, ins, pooled, 1, 1, 0)),
    })  # fmt: skip


class GoogleSideClassifier(nn.Module):
    """Weights alone: the side outputs served to train the original; nothing here reads them."""

    def __init__(self, dims: int, ins: int, num_classes: int) -> None:
        super().__init__()
        self.conv = Unit(dims, ins, 128, 1, 1, 0)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)


class GoogLeNet(Backbone):
    """Maps of strides 4, 8, 16 and 32."""

    BLOCKS = {
        "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64),
        "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
        "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
        "4e": (528, 256, 160, 320, 32, 128, 128),
        "5a": (832, 256, 160, 320, 32, 128, 128), "5b": (832, 384, 192, 384, 48, 128, 128),
    }  # fmt: skip

    def __init__(self, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(dims, in_channels, (192, 480, 832, 1024), 1, 15)
        self.conv1 = Unit(dims, in_channels, 64, 7, 2, 3)
        self.maxpool1 = max_pool(dims, 3, 2, 0, True)
        self.conv2 = Unit(dims, 64, 64, 1, 1, 0)
        self.conv3 = Unit(dims, 64, 192, 3, 1, 1)
        self.maxpool2 = max_pool(dims, 3, 2, 0, True)
        self.maxpool3 = max_pool(dims, 3, 2, 0, True)
        self.maxpool4 = max_pool(dims, 2, 2, 0, True)
        for name, widths in self.BLOCKS.items():
            self.add_module(f"inception{name}", google_block(dims, *widths))
        if num_classes:
            self.aux1 = GoogleSideClassifier(dims, 512, num_classes)
            self.aux2 = GoogleSideClassifier(dims, 528, num_classes)
            self.dropout = nn.Dropout(0.2)
            self.fc = nn.Linear(1024, num_classes)
        narrow(self, 0.01)

    def maps(self, x: Tensor) -> list[Tensor]:
        first = self.conv3(self.conv2(self.maxpool1(self.conv1(x))))
        found, x = [first], self.maxpool2(first)
        pools = {"3b": self.maxpool3, "4e": self.maxpool4}
        for name in self.BLOCKS:
            x = self.get_submodule(f"inception{name}")(x)
            if name in pools:
                found.append(x)
                x = pools[name](x)
        return [*found, x]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(vector))
        return logits

    def classifier_names(self) -> tuple[str, ...]:
        return ("aux1", "aux2", "fc")


class Mixed(nn.Module):
    """A block of Inception v3: units by name, and the chains of names whose outputs stand side by side.

    A chain's last place may hold two names that both read what comes before. pool: what the branch of pooling does, whose
    1 x 1 unit is branch_pool; without such a unit the pooled map itself stands last.
    """

    def __init__(
        self,
        dims: int,
        units: dict[str, tuple[int, int, Kernel, int, Kernel]],
        chains: list[list[tuple[str, ...]]],
        pool: nn.Module,
    ) -> None:
        super().__init__()
        for name, (ins, outs, kernel, stride, padding) in units.items():
            self.add_module(name, Unit(dims, ins, outs, kernel, stride, padding))
        self.chains, self.pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            branch = x
            for (name,) in chain[:-1]:
                branch = self.get_submodule(name)(branch)
            outputs += [self.get_submodule(name)(branch) for name in chain[-1]]
        pooled = self.pool(x)
        outputs.append(self.get_submodule("branch_pool")(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(outputs, 1)


def chains_of(*names: str) -> list[list[tuple[str, ...]]]:
    """'a b c|d': units a, b, then c and d side by side."""
    return [[tuple(place.split("|")) for place in chain.split()] for chain in names]


WIDE: tuple[Kernel, Kernel] = ((1, 7), (0, 3))  # kernel and padding
TALL: tuple[Kernel, Kernel] = ((7, 1), (3, 0))


def mixed_5(dims: int, ins: int, pooled: int) -> Mixed:
    """(B, ins, n...) -> (B, 224 + pooled, n...)."""
    units: dict[str, tuple[int, int, Kernel, int, Kernel]] = {
        "branch1x1": (ins, 64, 1, 1, 0),
        "branch5x5_1": (ins, 48, 1, 1, 0), "branch5x5_2": (48, 64, 5, 1, 2),
        "branch3x3dbl_1": (ins, 64, 1, 1, 0), "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 1, 1),
        "branch_pool": (ins, pooled, 1, 1, 0),
    }  # fmt: skip
    chains = chains_of("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")
    return Mixed(dims, units, chains, avg_pool(dims, 3, 1, 1))


def mixed_6a(dims: int) -> Mixed:
    """(B, 288, n...) -> (B, 768, about n / 2...)."""
    units: dict[str, tuple[int, int, Kernel, int, Kernel]] = {
        "branch3x3": (288, 384, 3, 2, 0),
        "branch3x3dbl_1": (288, 64, 1, 1, 0), "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 2, 0),
    }  # fmt: skip
    chains = chains_of("branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")
    return Mixed(dims, units, chains, max_pool(dims, 3, 2, 0, False))


def mixed_6(dims: int, inner: int) -> Mixed:
    """(B, 768, n...) -> the same shape."""
    units: dict[str, tuple[int, int, Kernel, int, Kernel]] = {
        "branch1x1": (768, 192, 1, 1, 0),
        "branch7x7_1": (768, inner, 1, 1, 0), "branch7x7_2": (inner, inner, WIDE[0], 1, WIDE[1]),
        "branch7x7_3": (inner, 192, TALL[0], 1, TALL[1]),
        "branch7x7dbl_1": (768, inner, 1, 1, 0), "branch7x7dbl_2": (inner, inner, TALL[0], 1, TALL[1]),
        "branch7x7dbl_3": (inner, inner, WIDE[0], 1, WIDE[1]), "branch7x7dbl_4": (inner, inner, TALL[0], 1, TALL[1]),
        "branch7x7dbl_5": (inner, 192, WIDE[0], 1, WIDE[1]),
        "branch_pool": (768, 192, 1, 1, 0),
    }  # fmt: skip
    chains = chains_of("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
                       "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5")  # fmt: skip
    return Mixed(dims, units, chains, avg_pool(dims, 3, 1, 1))


def mixed_7a(dims: int) -> Mixed:
    """(B, 768, n...) -> (B, 1280, about n / 2...)."""
    units: dict[str, tuple[int, int, Kernel, int, Kernel]] = {
        "branch3x3_1": (768, 192, 1, 1, 0), "branch3x3_2": (192, 320, 3, 2, 0),
        "branch7x7x3_1": (768, 192, 1, 1, 0), "branch7x7x3_2": (192, 192, WIDE[0], 1, WIDE[1]),
        "branch7x7x3_3": (192, 192, TALL[0], 1, TALL[1]), "branch7x7x3_4": (192, 192, 3, 2, 0),
    }  # fmt: skip
    chains = chains_of("branch3x3_1 branch3x3_2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4")
    return Mixed(dims, units, chains, max_pool(dims, 3, 2, 0, False))


def mixed_7(dims: int, ins: int) -> Mixed:
    """(B, ins, n...) -> (B, 2048, n...)."""
    units: dict[str, tuple[int, int, Kernel, int, Kernel]] = {
        "branch1x1": (ins, 320, 1, 1, 0),
        "branch3x3_1": (ins, 384, 1, 1, 0), "branch3x3_2a": (384, 384, (1, 3), 1, (0, 1)),
        "branch3x3_2b": (384, 384, (3, 1), 1, (1, 0)),
        "branch3x3dbl_1": (ins, 448, 1, 1, 0), "branch3x3dbl_2": (448, 384, 3, 1, 1),
        "branch3x3dbl_3a": (384, 384, (1, 3), 1, (0, 1)), "branch3x3dbl_3b": (384, 384, (3, 1), 1, (1, 0)),
        "branch_pool": (ins, 192, 1, 1, 0),
    }  # fmt: skip
    chains = chains_of("branch1x1", "branch3x3_1 branch3x3_2a|branch3x3_2b",
                       "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b")  # fmt: skip
    return Mixed(dims, units, chains, avg_pool(dims, 3, 1, 1))


class InceptionSideClassifier(nn.Module):
    """Weights alone, as GoogleSideClassifier."""

    def __init__(self, dims: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = Unit(dims, 768, 128, 1, 1, 0)
        self.conv1 = Unit(dims, 128, 768, 5, 1, 0)
        self.fc = nn.Linear(768, num_classes)


class InceptionV3(Backbone):
    """Maps of strides about 4, 8, 16 and 32; the convolutions of the stem do not pad."""

    def __init__(self, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(dims, in_channels, (192, 288, 768, 2048), 1, 75)
        stem: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": Unit(dims, in_channels, 32, 3, 2, 0), "Conv2d_2a_3x3": Unit(dims, 32, 32, 3, 1, 0),
            "Conv2d_2b_3x3": Unit(dims, 32, 64, 3, 1, 1), "maxpool1": max_pool(dims, 3, 2, 0, False),
            "Conv2d_3b_1x1": Unit(dims, 64, 80, 1, 1, 0), "Conv2d_4a_3x3": Unit(dims, 80, 192, 3, 1, 0),
        }  # fmt: skip
        blocks: dict[str, nn.Module] = {
            "maxpool2": max_pool(dims, 3, 2, 0, False),
            "Mixed_5b": mixed_5(dims, 192, 32), "Mixed_5c": mixed_5(dims, 256, 64), "Mixed_5d": mixed_5(dims, 288, 64),
            "Mixed_6a": mixed_6a(dims), "Mixed_6b": mixed_6(dims, 128), "Mixed_6c": mixed_6(dims, 160),
            "Mixed_6d": mixed_6(dims, 160), "Mixed_6e": mixed_6(dims, 192),
        }  # fmt: skip
        last: dict[str, nn.Module] = {
            "Mixed_7a": mixed_7a(dims), "Mixed_7b": mixed_7(dims, 1280), "Mixed_7c": mixed_7(dims, 2048)
        }  # fmt: skip
        for name, layer in (stem | blocks).items():
            self.add_module(name, layer)
        if num_classes:
            self.AuxLogits = InceptionSideClassifier(dims, num_classes)
        for name, layer in last.items():
            self.add_module(name, layer)
        if num_classes:
            self.dropout = nn.Dropout(0.5)
            self.fc = nn.Linear(2048, num_classes)
        self.order = (*stem, *blocks, *last)
        narrow(self, 0.1)

    def maps(self, x: Tensor) -> list[Tensor]:
        found = []
        for name in self.order:
            x = self.get_submodule(name)(x)
            if name in ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"):
                found.append(x)
        return found

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(vector))
        return logits

    def classifier_names(self) -> tuple[str, ...]:
        return ("AuxLogits", "fc")


INCEPTIONS: dict[str, Builder] = {"googlenet": GoogLeNet, "inception_v3": InceptionV3}
