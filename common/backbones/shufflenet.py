"""ShuffleNet V2: half of the channels pass by, then both halves are shuffled (Ma et al. 2018)."""

from functools import partial

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone, Builder
from common.backbones.layers import conv_norm, convolution, max_pool, plain_norm

DEPTHS = (4, 8, 4)


class ShuffleBlock(nn.Module):
    """(B, ins, n...) -> (B, outs, ceil(n / stride)...); with stride 2 both branches read all channels."""

    def __init__(self, dims: int, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        norm, half = plain_norm(dims), outs // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(
                convolution(dims, ins, ins, 3, stride, 1, ins), norm(ins),
                convolution(dims, ins, half, 1, 1, 0, 1), norm(half), nn.ReLU(inplace=True),
            )  # fmt: skip
        self.branch2 = nn.Sequential(
            convolution(dims, ins if stride == 2 else half, half, 1, 1, 0, 1), norm(half), nn.ReLU(inplace=True),
            convolution(dims, half, half, 3, stride, 1, half), norm(half),
            convolution(dims, half, half, 1, 1, 0, 1), norm(half), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride == 2 else x.chunk(2, 1)
        pair = torch.stack([self.branch1(left), self.branch2(right)], 2)  # (B, half, 2, n...)
        return pair.flatten(1, 2)


class ShuffleNetV2(Backbone):
    """Maps of strides 4, 8, 16 and 32, the last after the final 1 x 1 convolution."""

    def __init__(self, widths: tuple[int, int, int], last: int, dims: int, in_channels: int, num_classes: int) -> None:
        super().__init__(dims, in_channels, (24, *widths[:2], last), 1, 1)
        norm = plain_norm(dims)
        self.conv1 = conv_norm(dims, in_channels, 24, 3, 2, 1, norm, nn.ReLU(inplace=True))
        self.maxpool = max_pool(dims, 3, 2, 1, False)
        stages = []
        for ins, outs, depth in zip((24, *widths), widths, DEPTHS, strict=False):
            blocks = [ShuffleBlock(dims, ins, outs, 2), *(ShuffleBlock(dims, outs, outs, 1) for _ in range(depth - 1))]
            stages.append(nn.Sequential(*blocks))
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = conv_norm(dims, widths[-1], last, 1, 1, 1, norm, nn.ReLU(inplace=True))
        if num_classes:
            self.fc = nn.Linear(last, num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        first = self.maxpool(self.conv1(x))
        second = self.stage2(first)
        third = self.stage3(second)
        return [first, second, third, self.conv5(self.stage4(third))]

    def _classify(self, vector: Tensor) -> Tensor:
        logits: Tensor = self.fc(vector)
        return logits


SHUFFLENETS: dict[str, Builder] = {
    "shufflenet_v2_x0_5": partial(ShuffleNetV2, (48, 96, 192), 1024),
    "shufflenet_v2_x1_0": partial(ShuffleNetV2, (116, 232, 464), 1024),
    "shufflenet_v2_x1_5": partial(ShuffleNetV2, (176, 352, 704), 1024),
    "shufflenet_v2_x2_0": partial(ShuffleNetV2, (244, 488, 976), 2048),
}
