"""How well a predicted heat map (B, 1, z, y, x) agrees with its target, one figure per sample (B,).

Predictions are probabilities in [0, 1] and targets lie in [0, 1]. Where a figure needs a true peak, samples whose
target stays below `min_peak` (published: 0.1) give NaN, to be left out by `torch.nanmean`. The formulas follow
github.com/jahsef/3d-medical-tomography-fpn, with its distances and tie rules corrected where stated.
"""

import torch
from torch import Tensor


def soft_dice_score(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Dice overlap without threshold, (2 sum pt + 1e-6) / (sum p + sum t + 1e-6); 1 for two empty maps; (B,)."""
    p, t = _cells(probabilities, targets)
    return (2 * (p * t).sum(1) + 1e-6) / (p.sum(1) + t.sum(1) + 1e-6)


def peak_distance_cells(probabilities: Tensor, targets: Tensor, min_peak: float) -> Tensor:
    """Euclidean distance in cells between the highest cells of both maps, (B,); NaN without a true peak.

    Where several target cells share the maximum (two equal objects) the nearest counts; where several predicted cells
    do, the farthest, so that a flat map earns nothing.
    """
    p, t = _cells(probabilities, targets)
    z, y, x = targets.shape[2:]
    grid = torch.cartesian_prod(
        *(torch.arange(size, device=t.device, dtype=t.dtype) for size in (z, y, x))
    )  # (cells, 3)
    distances = [
        torch.cdist(grid[p_row == p_row.max()], grid[t_row == t_row.max()]).amin(1).amax()
        if bool(t_row.max() >= min_peak)
        else t_row.new_tensor(torch.nan)
        for p_row, t_row in zip(p, t, strict=True)
    ]
    return torch.stack(distances)


def comprehensive_heatmap_metric(
    probabilities: Tensor, targets: Tensor, distance_scale_cells: float, min_peak: float
) -> Tensor:
    """0.5 Pearson + 0.3 max(0, 1 - d / scale) + 0.2 min(1, (max p / mean p) / 10), clamped to [0, 1]; (B,).

    d is the Euclidean peak distance in cells (the published code subtracts flat indices, so that one step along z
    costs a whole slice); its scale is 60 as published. A constant prediction has Pearson 0; NaN without a true peak.
    """
    p, t = _cells(probabilities, targets)
    p_centred, t_centred = p - p.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    norms = (p_centred.square().sum(1) * t_centred.square().sum(1)).sqrt().clamp_min(torch.finfo(p.dtype).tiny)
    pearson = (p_centred * t_centred).sum(1) / norms
    distance = peak_distance_cells(probabilities, targets, min_peak)
    closeness = (1 - distance / distance_scale_cells).clamp_min(0)
    prominence = p.amax(1) / p.mean(1).clamp_min(torch.finfo(p.dtype).tiny)
    return (0.5 * pearson + 0.3 * closeness + 0.2 * (prominence / 10).clamp_max(1)).clamp(0, 1)


def topk_accuracy(probabilities: Tensor, targets: Tensor, k: int, min_peak: float) -> Tensor:
    """1 where the target's highest cell is among the k highest predicted cells, else 0; NaN without a true peak; (B,).

    Ties count against the prediction: a flat map is a hit only if k covers all cells.
    """
    p, t = _cells(probabilities, targets)
    assert k >= 1, f"Expected k >= 1, got {k}"
    peak = t.amax(1, keepdim=True)
    at_peak = p.masked_fill(t < peak, -torch.inf).amax(1, keepdim=True)
    rank = (p >= at_peak).sum(1)  # the peak's own cell included
    hit = (rank <= k).to(p.dtype)
    return hit.masked_fill(peak[:, 0] < min_peak, torch.nan)


def peak_sharpness(probabilities: Tensor) -> Tensor:
    """1 - mean / max of each map, (B,): 0 for a flat map, towards 1 for a single bright cell."""
    p = probabilities.float().flatten(1)
    highest = p.amax(1)
    return torch.where(highest > 0, 1 - p.mean(1) / highest, 0)


def _cells(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps as float32 rows of cells (B, cells)."""
    assert probabilities.ndim == 5 and probabilities.shape[1] == 1, (
        f"Expected (B, 1, z, y, x), got {tuple(probabilities.shape)}"
    )
    assert probabilities.shape == targets.shape, f"Expected {tuple(probabilities.shape)}, got {tuple(targets.shape)}"
    return probabilities.float().flatten(1), targets.float().flatten(1)
