"""What the networks of this task share: images in slots, of which some are empty, through one backbone or one each.

A composite is S slots with an image each (B, S, 3, y, x), whose magnification number is told (B, S) and which is there or not
(B, S). Empty slots never reach a layer: whatever lies in them, no output and no gradient knows it.
"""

from typing import Self

import torch
from torch import Tensor, nn

from common.backbones.create import create_backbone
from histo_mmnet.names import MAGNIFICATIONS

NUM_MAGNIFICATIONS = len(MAGNIFICATIONS)


class Extractors(nn.Module):
    """Backbones by name: one for all magnifications, or one for each."""

    def __init__(self, name: str, stages: int, is_shared: bool) -> None:
        """stages: of the backbone that are used; 0 = all."""
        super().__init__()
        count = 1 if is_shared else NUM_MAGNIFICATIONS
        backbones = [create_backbone(name, 2, 3) for _ in range(count)]
        for backbone in backbones[: count if stages else 0]:
            backbone.keep_stages(stages)
        self.backbones = nn.ModuleList(backbones)
        self.channels = int(self.backbones[0].feature_channels[-1])  # type: ignore[index]
        self.is_frozen = False

    def freeze(self) -> None:
        """No weight changes from now on, nor what batch norm remembers: training mode does not reach the backbones."""
        self.is_frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool) -> Self:  # type: ignore[override]  # torch's own has a default
        """Training mode, but for frozen backbones."""
        return super().train(mode and not self.is_frozen)

    def forward(self, images: Tensor, magnification: Tensor) -> Tensor:
        """Images (N, 3, y, x) of magnifications (N,), N > 0 -> their last maps (N, C, h, w)."""
        images = images.contiguous(memory_format=torch.channels_last)
        if len(self.backbones) == 1:
            maps: Tensor = self.backbones[0].forward_features(images)[-1]  # type: ignore[operator]
            return maps
        found: Tensor | None = None
        for number, backbone in enumerate(self.backbones):
            own = magnification == number
            if own.any():
                part: Tensor = backbone.forward_features(images[own])[-1]  # type: ignore[operator]
                found = part.new_zeros(len(images), *part.shape[1:]) if found is None else found
                found = found.index_put((own.nonzero()[:, 0],), part)
        assert found is not None, "Expected at least one image"
        return found


class MagnificationFiLM(nn.Module):
    """Scale and shift of every channel by magnification, at first none (Perez et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Embedding(NUM_MAGNIFICATIONS, channels)
        self.shift = nn.Embedding(NUM_MAGNIFICATIONS, channels)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, features: Tensor, magnification: Tensor) -> Tensor:
        """(N, C) and (N,) -> (N, C)."""
        modulated: Tensor = features * (1 + self.scale(magnification)) + self.shift(magnification)
        return modulated


def into_slots(features: Tensor, present: Tensor) -> Tensor:
    """Features (N, ...) of the N slots that are there as (B, S, ...), 0 in the empty ones."""
    slots = features.new_zeros(*present.shape, *features.shape[1:])
    return slots.index_put(tuple(present.nonzero().T), features)


def check_slots(images: Tensor, magnification: Tensor, present: Tensor) -> None:
    """Shapes, and something to see in every composite."""
    assert images.dim() == 5 and images.shape[2] == 3, f"Expected (B, S, 3, y, x), got {tuple(images.shape)}"
    assert magnification.shape == present.shape == images.shape[:2], f"{magnification.shape}, {present.shape}"
    assert bool(present.any(1).all()), "Expected an image in every composite"
