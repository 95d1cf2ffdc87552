"""The compact variant: one backbone, told the magnification, and attention over all images of a patient.

Gated attention over a bag (Ilse et al. 2018, arXiv:1802.04712), any number of images of any magnification; few weights besides
the backbone's, as there are few patients.
"""

import torch
from torch import Tensor, nn

from histo_mmnet.model_defs.slots import Extractors, MagnificationFiLM, check_slots, into_slots


class GatedAttentionPool(nn.Module):
    """Vectors (B, S, C), present (B, S) -> their weighted mean (B, C), and the weights (B, S), 0 where empty."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.value, self.gate, self.score = (
            nn.Linear(channels, hidden),
            nn.Linear(channels, hidden),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        gated = self.value(features).tanh() * self.gate(features).sigmoid()
        weight = self.score(gated)[..., 0].float().masked_fill(~present, float("-inf")).softmax(1)
        shown = torch.where(present[..., None], features, 0.0)
        return (weight.to(features.dtype)[..., None] * shown).sum(1), weight


class CompactMMNet(nn.Module):
    """Bags (B, S, 3, y, x) of magnifications (B, S), present (B, S) -> logits of malignancy (B,)."""

    def __init__(self, backbone: str, stages: int, width: int, dropout: float) -> None:
        super().__init__()
        self.extractors = Extractors(backbone, stages, True)
        channels = self.extractors.channels
        self.film = MagnificationFiLM(channels)
        self.narrow = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.ReLU(inplace=True))
        self.pool = GatedAttentionPool(width, max(8, width // 2))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, images: Tensor, magnification: Tensor, present: Tensor) -> Tensor:
        return self.explained(images, magnification, present)[0]

    def explained(self, images: Tensor, magnification: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B,), and the weight of each image (B, S), sum 1."""
        check_slots(images, magnification, present)
        return self.fused(into_slots(self.vectors(images[present], magnification[present]), present), present)

    def vectors(self, images: Tensor, magnification: Tensor) -> Tensor:
        """Images (N, 3, y, x) of magnifications (N,) -> a vector each (N, width)."""
        maps = self.extractors(images, magnification)
        vectors: Tensor = self.narrow(self.film(maps.flatten(2).mean(2), magnification))
        return vectors

    def fused(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """explained of vectors (B, S, width), of which what is not present does not matter."""
        pooled, weight = self.pool(vectors, present)
        return self.head(pooled)[:, 0].float(), weight
