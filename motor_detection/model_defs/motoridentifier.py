"""MotorIdentifier: a 3D feature pyramid network with one logit map (Lin et al. 2017, feature pyramid networks).

A strided 5x5x5 stem brings the volume to half resolution, pre-activation residual stages halve it further (to /32 with
five levels). The pyramid comes down from the deepest level to the heat map's own, a strided lateral brings the next
finer level up, and a small head turns the fused map into one logit per cell of `stride` voxels.

The network is two parts in a row, `fine` (voxels -> the finest level that fusion needs) and `coarse` (the rest). Nearly
all voxels and little reach are in the first, nearly all reach and few cells in the second: inference tiles them apart.
"""

import dataclasses
import math

from torch import Tensor, nn

from common.blocks import NormName, norm_layer
from motor_detection.model_defs.nnblock import PreActResBlock3d, Stem, TopDownMerge3d

PRIOR = 0.01  # initial probability of a motor per cell, so that training starts at the base rate (Lin et al. 2017b)


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far a network part sees: stride in to out, alignment and halo, all in cells of its input."""

    stride: int
    alignment: int
    halo: int


class MotorIdentifier(nn.Module):
    """(B, 1, z, y, x) normalised volumes -> (B, 1, ceil(z/s), ceil(y/s), ceil(x/s)) logits, s = stride.

    channels: of levels /2, /4, /8 ...; stride: 2, 4, 8 or 16 voxels per heat-map cell, a level of its own.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        fusion_channels: int,
        stride: int,
        norm: NormName,
        squeeze_excitation: bool,
        drop_path: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.out_level = int(math.log2(stride)) - 1
        self.split_level = max(0, self.out_level - 1)
        self.split_channels = channels[self.split_level]
        self.deepest_stride = 2 ** len(channels)  # voxels per cell of the deepest level
        self.is_local = norm == "batch" and not squeeze_excitation
        assert 2 ** (self.out_level + 1) == stride and 0 <= self.out_level < len(channels), f"stride {stride}"
        self.stem = Stem(channels[0])
        rates = [drop_path * level / max(1, len(channels) - 1) for level in range(len(channels))]
        self.stages = nn.ModuleList(
            PreActResBlock3d(channels[level - 1], channels[level], 2, norm, squeeze_excitation, rates[level])
            for level in range(1, len(channels))
        )
        self.deepest = nn.Conv3d(channels[-1], fusion_channels, 1)
        self.merges = nn.ModuleList(
            TopDownMerge3d(channels[level], fusion_channels, norm, squeeze_excitation)
            for level in range(len(channels) - 2, self.out_level - 1, -1)
        )
        self.finer: nn.Module | None = None
        if self.split_level < self.out_level:
            self.finer = nn.Conv3d(channels[self.split_level], fusion_channels, 3, stride=2, padding=1)
        self.head = PreActResBlock3d(fusion_channels, fusion_channels, 1, norm, squeeze_excitation, 0.0)
        self.head_norm = norm_layer(norm, 3, fusion_channels)
        self.dropout = nn.Dropout3d(dropout)
        self.logit = nn.Conv3d(fusion_channels, 1, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.constant_(self.logit.bias, math.log(PRIOR / (1 - PRIOR)))  # type: ignore[arg-type]

    def forward(self, volume: Tensor) -> Tensor:
        assert volume.dim() == 5 and volume.shape[1] == 1, f"Expected (B, 1, z, y, x), got {tuple(volume.shape)}"
        return self.coarse(self.fine(volume))

    def fine(self, volume: Tensor) -> Tensor:
        """(B, 1, z, y, x) -> the split level's map (B, C, ceil(z/f), ...), f = fine_reach().stride."""
        x: Tensor = self.stem(volume)
        for stage in self.stages[: self.split_level]:
            x = stage(x)
        return x

    def coarse(self, x: Tensor) -> Tensor:
        """The split level's map -> logits."""
        levels = [x]
        for stage in self.stages[self.split_level :]:
            levels.append(stage(levels[-1]))
        fused = self.deepest(levels[-1])
        for merge, level in zip(self.merges, reversed(levels[self.out_level - self.split_level : -1]), strict=True):
            fused = merge(fused, level)
        if self.finer is not None:
            fused = fused + self.finer(levels[0])
        fused = nn.functional.silu(self.head_norm(self.head(fused)))
        logits: Tensor = self.logit(self.dropout(fused))  # (B, 1, cells...)
        return logits

    def fine_reach(self) -> Reach:
        """Of `fine`, in voxels: the stem's 5^3 kernel at stride 2, then a strided and a plain 3^3 kernel per stage."""
        halo, stride = 2, 2
        for _ in range(self.split_level):
            halo, stride = halo + stride + 2 * stride, 2 * stride
        return Reach(stride, stride, halo)

    def coarse_reach(self) -> Reach:
        """Of `coarse`, in cells of the split level: down the stages, up the merges, two kernels of the head."""
        halo, stride = 0, 1
        for _ in self.stages[self.split_level :]:
            halo, stride = halo + stride + 2 * stride, 2 * stride
        deepest = stride
        for _ in self.merges:
            halo, stride = halo + stride // 2, stride // 2  # nearest upsampling looks at most half a coarse cell away
            halo += 2 * stride
        return Reach(stride, deepest, halo + 2 * stride)

    def groups_of_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter in exactly one of "backbone" (stem and stages) and "head" (fusion and logit)."""
        backbone = [*self.stem.parameters(), *self.stages.parameters()]
        taken = {id(parameter) for parameter in backbone}
        return {"backbone": backbone, "head": [p for p in self.parameters() if id(p) not in taken]}


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
