"""The baseline: images of one magnification, a backbone, a mean, a line."""

from torch import Tensor, nn

from histo_mmnet.model_defs.slots import Extractors, check_slots, into_slots


class SingleMagNet(nn.Module):
    """Bags (B, S, 3, y, x) of one magnification, present (B, S) -> logits of malignancy (B,), the mean over the images."""

    def __init__(self, backbone: str, dropout: float) -> None:
        super().__init__()
        self.extractors = Extractors(backbone, True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.extractors.channels, 1))

    def forward(self, images: Tensor, magnification: Tensor, present: Tensor) -> Tensor:
        check_slots(images, magnification, present)
        maps = self.extractors(images[present], magnification[present])
        logits = self.head(maps.flatten(2).mean(2))  # (N, 1)
        mean: Tensor = into_slots(logits, present)[..., 0].sum(1) / present.sum(1)
        return mean.float()
