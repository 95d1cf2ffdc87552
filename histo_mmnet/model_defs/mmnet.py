"""MMNet: one image of each magnification -> one logit of malignancy, from any of the 15 sets of magnifications.

Each image passes a backbone, attention over places at three scales and over channels; each magnification then attends to the
coarser ones, as an eye that zooms in keeps what it saw before; last, two fusions are mixed: attention over magnifications
weighted by an importance, and a perceptron on all of them side by side.
"""

import torch
from torch import Tensor, nn

from histo_mmnet.model_defs.slots import NUM_MAGNIFICATIONS, Extractors, check_slots, into_slots

POOL_SCALES = (1, 2, 4)  # cells along each axis in which places are looked at
REDUCTION = 12  # of channels in the gate
HEADS = 4  # of attention


def begin_with_nothing(layer: nn.Linear | nn.Conv2d) -> None:
    """Zero weights: what is gated by the layer begins ungated, what it adds begins as nothing."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


class MultiScaleAttentionPool(nn.Module):
    """A map (N, C, h, w) -> (N, C): its mean, places weighted by attention at three scales.

    At each scale the map is averaged into 1, 2 or 4 cells along an axis, each cell gets a weight, and the weights, brought
    back to the map's size, are fused into one per place.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 4)
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.SiLU(inplace=True), nn.Conv2d(hidden, 1, 1), nn.Sigmoid())
            for _ in POOL_SCALES
        )
        self.fuse = nn.Conv2d(len(POOL_SCALES), 1, 1)
        begin_with_nothing(self.fuse)

    def forward(self, x: Tensor) -> Tensor:
        weights = [
            nn.functional.interpolate(attend(cells_of(x, scale)), x.shape[2:], mode="nearest")
            for scale, attend in zip(POOL_SCALES, self.scales, strict=True)
        ]
        weight = 2 * torch.sigmoid(self.fuse(torch.cat(weights, 1)))  # (N, 1, h, w)
        return (x * weight).flatten(2).mean(2)


def cells_of(x: Tensor, number: int) -> Tensor:
    """Means (N, C, k, k) of k x k parts of a map (N, C, h, w), k at most its edges; parts of even size, the last ones cut."""
    rows, columns = min(number, x.shape[2]), min(number, x.shape[3])
    if number == 1:
        return x.mean((2, 3), keepdim=True)
    kernel = -(-x.shape[2] // rows), -(-x.shape[3] // columns)
    return nn.functional.avg_pool2d(x, kernel, kernel, ceil_mode=True, count_include_pad=False)


class ClinicalChannelAttention(nn.Module):
    """A gate per channel from its mean and its largest value: (N, C, h, w) -> (N, C, h, w) (Woo et al. 2018, CBAM)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        hidden = max(8, channels // REDUCTION)
        last = nn.Linear(hidden, channels)
        self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout), last)
        begin_with_nothing(last)

    def forward(self, x: Tensor) -> Tensor:
        weight = 2 * torch.sigmoid(self.gate(x.mean((2, 3))) + self.gate(x.amax((2, 3))))
        return x * weight[:, :, None, None]


class HierarchicalAttention(nn.Module):
    """Each magnification attends to all coarser ones that are there: (B, 4, C), (B, 4) -> (B, 4, C), and the weights.

    The weights (B, 4, 4): of slot i on slot j < i, mean over heads, 0 where there is nothing coarser.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(channels, HEADS, dropout, batch_first=True) for _ in range(1, NUM_MAGNIFICATIONS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(1, NUM_MAGNIFICATIONS))

    def forward(self, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [features[:, 0]]
        weights = features.new_zeros(len(features), NUM_MAGNIFICATIONS, NUM_MAGNIFICATIONS)
        for finer, (attend, norm) in enumerate(zip(self.attention, self.norms, strict=True), 1):
            coarser = torch.stack(outputs, 1)  # (B, finer, C)
            there = present[:, :finer]
            asks = present[:, finer] & there.any(1)  # (B,)
            # a row without keys would be NaN: it gets one, and what comes out is not used
            hidden = ~there | ~asks[:, None]
            hidden = torch.cat([hidden[:, :1] & asks[:, None], hidden[:, 1:]], 1)
            found, weight = attend(features[:, finer : finer + 1], coarser, coarser, key_padding_mask=hidden)
            mixed = norm(features[:, finer] + found[:, 0])
            outputs.append(torch.where(asks[:, None], mixed, features[:, finer]))
            weights[:, finer, :finer] = torch.where(asks[:, None], weight[:, 0].to(weights.dtype), 0.0)
        return torch.stack(outputs, 1), weights


class HybridCrossMagFusion(nn.Module):
    """Four vectors, some missing, as one: (B, 4, C), (B, 4) -> (B, width), and the importance (B, 4) of each, sum 1.

    A learned share of attention over the vectors weighted by importance, the rest a perceptron on all of them side by side.
    """

    def __init__(self, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width), nn.ReLU(inplace=True))
            for _ in range(NUM_MAGNIFICATIONS)
        )
        hidden = max(8, width // 4)
        self.importance = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.attention = nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)
        self.side_by_side = nn.Sequential(
            nn.Linear(NUM_MAGNIFICATIONS * width, width),
            nn.LayerNorm(width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )
        self.share = nn.Parameter(torch.tensor(0.0))  # of attention, before the sigmoid: a half

    def forward(self, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        projected = torch.stack([layer(features[:, slot]) for slot, layer in enumerate(self.project)], 1)
        projected = torch.where(present[..., None], projected, 0.0)
        score = self.importance(projected)[..., 0].masked_fill(~present, -torch.inf)
        importance = score.float().softmax(1)  # (B, 4)
        weighted = projected * (importance * present.sum(1, keepdim=True)).to(projected.dtype)[..., None]
        attended, _ = self.attention(weighted, weighted, weighted, key_padding_mask=~present, need_weights=False)
        count = present.sum(1, keepdim=True)
        mean = torch.where(present[..., None], attended, 0.0).sum(1) / count
        share = torch.sigmoid(self.share)
        return share * mean + (1 - share) * self.side_by_side(projected.flatten(1)), importance


class MMNet(nn.Module):
    """Composites (B, 4, 3, y, x) of 40X, 100X, 200X, 400X, present (B, 4) -> logits of malignancy (B,)."""

    def __init__(self, backbone: str, stages: int, is_shared: bool, width: int, dropout: float) -> None:
        super().__init__()
        self.extractors = Extractors(backbone, stages, is_shared)
        channels = self.extractors.channels
        count = 1 if is_shared else NUM_MAGNIFICATIONS
        self.gates = nn.ModuleList(ClinicalChannelAttention(channels, 0.1) for _ in range(count))
        self.pools = nn.ModuleList(MultiScaleAttentionPool(channels) for _ in range(count))
        self.narrow = nn.ModuleList(nn.Linear(channels, width) for _ in range(NUM_MAGNIFICATIONS))
        self.hierarchy = HierarchicalAttention(width, 0.1)
        self.fusion = HybridCrossMagFusion(width, width, 0.1)
        self.evidence = nn.ModuleList(nn.Linear(channels, 1) for _ in range(NUM_MAGNIFICATIONS))
        last = nn.Linear(width, 1)
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Dropout(dropout), last
        )
        begin_with_nothing(last)

    def forward(self, images: Tensor, magnification: Tensor, present: Tensor) -> Tensor:
        """magnification (B, 4) must be 0, 1, 2, 3 in each row."""
        return self.explained(images, magnification, present)[0]

    def explained(self, images: Tensor, magnification: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits (B,), the importance of each magnification (B, 4), and who attends to whom (B, 4, 4)."""
        check_slots(images, magnification, present)
        assert present.shape[1] == NUM_MAGNIFICATIONS, f"Expected 4 slots, got {present.shape[1]}"
        return self.fused(into_slots(self.vectors(images[present], magnification[present]), present), present)

    def fused(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """explained of vectors (B, 4, C), of which what is not present does not matter: any subset of what was computed."""
        features = torch.stack([layer(vectors[:, slot]) for slot, layer in enumerate(self.narrow)], 1)
        features = torch.where(present[..., None], features, 0.0)
        features, attention = self.hierarchy(features, present)
        fused, importance = self.fusion(features, present)
        alone = torch.stack([layer(vectors[:, slot])[:, 0] for slot, layer in enumerate(self.evidence)], 1)  # (B, 4)
        mean = torch.where(present, alone, 0.0).sum(1) / present.sum(1)
        return (mean + self.head(fused)[:, 0]).float(), importance, attention

    def vectors(self, images: Tensor, magnification: Tensor) -> Tensor:
        """Images (N, 3, y, x) of magnifications (N,) -> a vector each (N, C)."""
        maps = self.extractors(images, magnification)
        if len(self.pools) == 1:
            pooled: Tensor = self.pools[0](self.gates[0](maps))
            return pooled
        found: Tensor = maps.new_zeros(maps.shape[:2])
        for number, (gate, pool) in enumerate(zip(self.gates, self.pools, strict=True)):
            own = magnification == number
            if own.any():
                found = found.index_put((own.nonzero()[:, 0],), pool(gate(maps[own])))
        return found
