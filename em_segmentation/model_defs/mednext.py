"""MedNeXt: a U-Net of five levels made of depthwise k^3 convolutions and inverted bottlenecks.

Roy et al. 2023, "MedNeXt: transformer-driven scaling of ConvNets for medical image segmentation"; weight for weight
the network that MONAI calls MedNeXt with residual connections: mednext_key maps its state dict onto ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.convolution import channels_last
from common.errors import data_error
from em_segmentation.model_defs.convolution import DepthwiseConv3d, InstanceNorm, Pointwise, pointwise

LEVELS = 5
STEP = 2 ** (LEVELS - 1)  # voxels that every edge is a multiple of


@dataclass(frozen=True)
class Size:
    """One published size: expansion ratio and number of blocks of the nine stages, from the input to the output."""

    base_channels: int
    expansions: tuple[int, ...]
    blocks: tuple[int, ...]
    checkpointing: bool


B_EXPANSIONS = (2, 3, 4, 4, 4, 4, 4, 3, 2)
SIZES: Mapping[str, Size] = {
    "S": Size(32, (2,) * 9, (2,) * 9, False),
    "B": Size(32, B_EXPANSIONS, (2,) * 9, False),
    "M": Size(32, B_EXPANSIONS, (3, 4, 4, 4, 4, 4, 4, 4, 3), True),
    "L": Size(32, (3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3), True),
}


class Bottleneck(nn.Module):
    """Depthwise k^3 convolution, norm, expansion by 1^3, GELU, optional GRN, compression by 1^3; no residual.

    GRN is the global response normalisation of Woo et al. 2023 (ConvNeXt V2).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, expansion: int, grn: bool) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.depthwise = DepthwiseConv3d(in_channels, kernel_size)
        self.norm = InstanceNorm(in_channels, True)
        self.expand = Pointwise(in_channels, hidden, True)
        self.compress = Pointwise(hidden, out_channels, True)
        self.grn_scale = nn.Parameter(torch.zeros(1, hidden, 1, 1, 1)) if grn else None
        self.grn_shift = nn.Parameter(torch.zeros(1, hidden, 1, 1, 1)) if grn else None

    def mixed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What follows the depthwise convolution: (B, in, z, y, x) -> (B, out, z, y, x) + bias."""
        hidden = nn.functional.gelu(self.expand(self.norm(x)))  # (B, R * in, z, y, x)
        if self.grn_scale is not None and self.grn_shift is not None:
            energy = torch.linalg.vector_norm(hidden.float(), dim=(2, 3, 4), keepdim=True)
            ratio = energy / (energy.mean(1, keepdim=True) + 1e-6)
            hidden = torch.addcmul(self.grn_shift, hidden, 1 + self.grn_scale * ratio)
        assert self.compress.bias is not None
        total = self.compress.bias if bias is None else self.compress.bias + bias
        return pointwise(hidden, self.compress.weight.flatten(1), total)


class Block(Bottleneck):
    """A bottleneck beside the identity: (B, C, z, y, x) -> the same."""

    def __init__(self, channels: int, kernel_size: int, expansion: int, grn: bool) -> None:
        super().__init__(channels, channels, kernel_size, expansion, grn)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(self.depthwise(x), None)


class Down(Bottleneck):
    """Half the size, twice the channels: (B, C, 2n...) -> (B, 2C, n...), beside a 1^3 convolution of every other cell.

    Never with GRN, as in the reference.
    """

    def __init__(self, channels: int, kernel_size: int, expansion: int) -> None:
        super().__init__(channels, 2 * channels, kernel_size, expansion, False)
        self.residual = Pointwise(channels, 2 * channels, True)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.residual(x[:, :, ::2, ::2, ::2])
        return residual + self.mixed(self.depthwise.halving(x), None)


class Up(Bottleneck):
    """Twice the size, half the channels: (B, C, n...) -> (B, C / 2, 2n...).

    A transposed depthwise convolution to 2n - 1 cells per axis, beside a transposed 1^3 convolution, which adds to every
    other cell; then a plane of zeros in front of every axis.
    """

    def __init__(self, channels: int, kernel_size: int, expansion: int, grn: bool) -> None:
        super().__init__(channels, channels // 2, kernel_size, expansion, grn)
        self.residual = nn.ConvTranspose3d(channels, channels // 2, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        raised = nn.functional.pad(self.mixed(self.depthwise.doubling(x), self.residual.bias), (1, 0, 1, 0, 1, 0))
        raised[:, :, 1::2, 1::2, 1::2] += pointwise(x, self.residual.weight.flatten(1).t(), None)
        return raised


class Head(nn.Module):
    """Logits by a 1^3 convolution, its weight transposed as in the reference: (B, C, z, y, x) -> (B, out, z, y, x)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        drawn = nn.ConvTranspose3d(in_channels, out_channels, 1)
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight.flatten(1).t(), self.bias)


class MedNeXt(nn.Module):
    """(B, in, z, y, x) -> (B, out, z, y, x), every edge a multiple of 16.

    In training mode with deep supervision: a list of five logits, finest first, (B, out, z / 2^i, y / 2^i, x / 2^i) for
    i = 0..4; in eval mode the finest alone. expansions, blocks: of the nine stages, from the input to the output, five
    down and four up. base_channels: at full resolution, doubled per level. checkpointing: while training, activations
    inside a block are computed again in the backward pass instead of being kept.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        kernel_size: int,
        expansions: tuple[int, ...],
        blocks: tuple[int, ...],
        grn: bool,
        deep_supervision: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        stages = 2 * LEVELS - 1
        for name, values in (("expansions", expansions), ("blocks", blocks)):
            assert len(values) == stages, f"Expected {stages} {name}, got {values}"
        levels = [*range(LEVELS), *reversed(range(LEVELS - 1))]  # of the nine stages
        widths = [base_channels * 2**level for level in levels]
        self.stem = Pointwise(in_channels, base_channels, True)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width, kernel_size, expansion, grn) for _ in range(count))
            for width, expansion, count in zip(widths, expansions, blocks, strict=True)
        )
        self.downs = nn.ModuleList(Down(widths[i], kernel_size, expansions[i]) for i in range(LEVELS - 1))
        self.ups = nn.ModuleList(Up(widths[i - 1], kernel_size, expansions[i], grn) for i in range(LEVELS, stages))
        self.heads = nn.ModuleList(
            Head(base_channels * 2**level, out_channels) for level in range(LEVELS if deep_supervision else 1)
        )
        self.checkpointing = checkpointing

    def forward(self, volume: Tensor) -> Tensor | list[Tensor]:
        assert all(n % STEP == 0 for n in volume.shape[2:]), f"Expected multiples of {STEP}, got {tuple(volume.shape)}"
        x = self.stem(channels_last(volume))
        levels = []
        for stage, down in zip(self.stages, self.downs, strict=False):
            levels.append(self._through(stage, x))
            x = self._run(down, levels[-1])
        x = self._through(self.stages[LEVELS - 1], x)
        scales = [x]
        for up, stage in zip(self.ups, self.stages[LEVELS:], strict=True):
            x = self._through(stage, self._run(up, x) + levels.pop())
            scales.append(x)
        if not self.training or len(self.heads) == 1:
            return self.heads[0](x)  # type: ignore[no-any-return]
        return [head(scale) for head, scale in zip(self.heads, reversed(scales), strict=True)]

    def _through(self, stage: nn.Module, x: Tensor) -> Tensor:
        for block in stage.children():
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.checkpointing or not self.training:
            return block(x)  # type: ignore[no-any-return]
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def size_arguments(size: str) -> dict[str, Any]:
    """The arguments of MedNeXt that a published size fixes: base_channels, expansions, blocks, grn, checkpointing."""
    chosen = SIZES[size]
    return {"base_channels": chosen.base_channels, "expansions": chosen.expansions, "blocks": chosen.blocks, "grn": False,
            "checkpointing": chosen.checkpointing}  # fmt: skip


def up_kernel(weights_of_small: Mapping[str, Tensor], model: MedNeXt) -> None:
    """Give a model the weights of one with smaller kernels: depthwise ones resized trilinearly, all others copied.

    UpKern of Roy et al. 2023, section 2.3. Raises a data error if the two differ in anything but their kernels.
    """
    own = model.state_dict()
    strange = sorted(own.keys() ^ weights_of_small.keys())
    if strange:
        raise data_error(f"up_kernel: {len(strange)} weights are in one model only, such as {strange[0]}; "
                         "give the weights of a MedNeXt that differs in kernel_size alone")  # fmt: skip
    resized = {}
    for name, weight in weights_of_small.items():
        wanted = own[name].shape
        is_kernel = (
            name.endswith("depthwise.weight") and weight.shape[:2] == wanted[:2] and weight.shape[2] <= wanted[2]
        )
        if weight.shape != wanted and not is_kernel:
            raise data_error(f"up_kernel: {name} is {tuple(weight.shape)}, expected {tuple(wanted)}; "
                             "give the weights of a MedNeXt that differs in kernel_size alone")  # fmt: skip
        resized[name] = weight
        if is_kernel:
            resized[name] = nn.functional.interpolate(weight, tuple(wanted[2:]), mode="trilinear", align_corners=False)
    model.load_state_dict(resized)


def mednext_key(reference: str) -> str:
    """Our name of a weight of MONAI's MedNeXt (five levels); the weights keep their shapes."""
    key = re.sub(r"^enc_stages\.", "stages.", reference).replace("bottleneck.", f"stages.{LEVELS - 1}.")
    key = re.sub(r"^dec_stages\.(\d)", lambda m: f"stages.{LEVELS + int(m[1])}", key)
    key = key.replace("down_blocks.", "downs.").replace("up_blocks.", "ups.").replace("res_conv.", "residual.")
    key = re.sub(r"^out_blocks\.(\d)\.conv_out", lambda m: f"heads.{LEVELS - 1 - int(m[1])}", key)
    key = key.replace("out_0.conv_out", "heads.0").replace("conv1.", "depthwise.").replace("conv2.", "expand.")
    key = key.replace("conv3.", "compress.")
    return key.replace("global_resp_gamma", "grn_scale").replace("global_resp_beta", "grn_shift")
