"""What a network is asked for: which output channels belong to which target, and the loss over all of them."""

import torch
from torch import Tensor, nn

from common.precision import autocast
from em_segmentation.augmentation import Patch
from em_segmentation.config import Config, Targets
from em_segmentation.losses import deep_supervision_loss, target_loss
from em_segmentation.regions import VoxelSize
from em_segmentation.targets import Target, build_target, num_channels

PRECISIONS = {"32": "float32", "16-mixed": "float16", "bf16-mixed": "bfloat16"}


def channel_ranges(settings: Targets) -> dict[str, slice]:
    """The output channels of each target."""
    ranges: dict[str, slice] = {}
    first = 0
    for name in settings.names:
        ranges[name] = slice(first, first + num_channels(name, settings))
        first = ranges[name].stop
    return ranges


def build_targets(batch: Patch, settings: Targets, voxel_size_nm: VoxelSize) -> list[Target]:
    """The targets of a batch in the order of settings.names."""
    return [
        build_target(name, batch.labels[:, channel], batch.annotated[:, 0], settings, voxel_size_nm)
        for name, channel in zip(settings.names, settings.label_channels, strict=True)
    ]


def forward(model: nn.Module, image: Tensor, precision: str) -> list[Tensor]:
    """Logits of a batch in a working precision, one tensor per scale, finest first."""
    with autocast(image.device, PRECISIONS[precision]):
        logits = model(image.contiguous(memory_format=torch.channels_last_3d))
    return logits if isinstance(logits, list) else [logits]


def loss_of(scales: list[Tensor], targets: list[Target], config: Config) -> Tensor:
    """The weighted sum of all targets' losses, (B,)."""
    settings, total = config.targets, scales[0].new_zeros(len(scales[0]), dtype=torch.float32)
    widths = [num_channels(name, settings) for name in settings.names]
    parts = [torch.split(logits, widths, 1) for logits in scales]  # back, their gradients are put together at once
    for number, own in enumerate(zip(*parts, strict=True)):
        functions = settings.loss_functions[number] if settings.loss_functions else config.model.loss_functions
        kind = settings.names[number]
        if len(own) > 1:
            losses = deep_supervision_loss(kind, list(own), targets[number], functions, config.model, settings)
        else:
            losses = target_loss(kind, own[0], targets[number], functions, config.model, settings)
        total = total + settings.weights[number] * losses
    return total


def training_loss(model: nn.Module, batch: Patch, config: Config, voxel_size_nm: VoxelSize) -> Tensor:
    """Losses (B,) of a batch as it is: targets are computed here, after all augmentation."""
    with torch.no_grad():
        targets = build_targets(batch, config.targets, voxel_size_nm)
    return loss_of(forward(model, batch.image, config.training.precision), targets, config)
