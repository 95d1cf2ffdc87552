"""The loss of a heat map by its name in config; the formulas and sources stand in common.losses."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from common import losses

if TYPE_CHECKING:
    from motor_detection.config import Loss

LossName = Literal[
    "weighted_bce", "focal", "topk_bce", "combined_focal", "adapted_corner_net", "fuzzy_corner_net",
    "regression_corner_net", "mse",
]  # fmt: skip


def heatmap_loss(logits: Tensor, targets: Tensor, settings: "Loss") -> Tensor:
    """Loss of each sample (B,) in float32; logits and targets (B, 1, z, y, x)."""
    corner = (settings.positive_threshold, settings.alpha, settings.beta)
    match settings.name:
        case "weighted_bce":
            return losses.weighted_bce_with_logits(logits, targets, settings.positive_weight)
        case "focal":
            return losses.focal_loss_with_logits(logits, targets, settings.gamma, settings.positive_weight)
        case "topk_bce":
            return losses.topk_bce_with_logits(logits, targets, settings.topk)
        case "combined_focal":
            return losses.combined_focal_with_logits(logits, targets, settings.alpha, settings.beta)
        case "adapted_corner_net":
            return losses.adapted_corner_net_with_logits(logits, targets, *corner)
        case "fuzzy_corner_net":
            return losses.fuzzy_corner_net_with_logits(logits, targets, *corner)
        case "regression_corner_net":
            return losses.regression_corner_net_with_logits(logits, targets, *corner)
        case "mse":
            return losses.mse_with_logits(logits, targets)
