"""The baseline: images of one magnification, a backbone, a mean, a line."""

import torch
from torch import Tensor, nn

from histo_mmnet.model_defs.slots import Extractors, check_slots, into_slots


class SingleMagNet(nn.Module):
    """Bags (B, S, 3, y, x) of one magnification, present (B, S) -> logits of malignancy (B,), the mean over the images."""

    def __init__(self, backbone: str, stages: int, dropout: float) -> None:
        super().__init__()
        self.extractors = Extractors(backbone, stages, True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.extractors.channels, 1))

    def forward(self, images: Tensor, magnification: Tensor, present: Tensor) -> Tensor:
        check_slots(images, magnification, present)
        return self.fused(into_slots(self.vectors(images[present], magnification[present]), present), present)[0]

    def vectors(self, images: Tensor, magnification: Tensor) -> Tensor:
        """Images (N, 3, y, x) of magnifications (N,) -> a vector each (N, C)."""
        maps: Tensor = self.extractors(images, magnification)
        return maps.flatten(2).mean(2)

    def fused(self, vectors: Tensor, present: Tensor) -> tuple[Tensor]:
        """Logits (B,) of vectors (B, S, C), of which what is not present does not matter."""
        logits = torch.where(present, self.head(vectors)[..., 0], 0.0)
        return ((logits.sum(1) / present.sum(1)).float(),)
