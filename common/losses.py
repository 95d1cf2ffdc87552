"""Losses between logits and heat maps, each the mean over a sample's cells: shapes (B, 1, z, y, x) -> (B,).

Logits x may have any dtype and are computed in float32 (float64 stays); targets t lie in [0, 1]; p = sigmoid(x). All
are written in log-sigmoids, which stay finite and exact where p rounds to 0 or 1. The mean over (B,) is the mean over
cells. Invalid constants raise a UserError.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from common.errors import config_error


def weighted_bce_with_logits(logits: Tensor, targets: Tensor, positive_weight: float) -> Tensor:
    """Mean of (1 + w t) BCE, BCE = -(t log p + (1 - t) log(1 - p)); w = 0 is plain BCE. Shape (B,)."""
    x, t = _in_single_precision(logits, targets)
    return ((1 + positive_weight * t) * _bce(x, t)).flatten(1).mean(1)


def focal_loss_with_logits(logits: Tensor, targets: Tensor, gamma: float, positive_weight: float) -> Tensor:
    """Mean of (1 + w t) |t - p|^gamma BCE; shape (B,).

    With w = 0 the quality focal loss (Li et al. 2020, "Generalized Focal Loss"), the focal loss for soft targets; with
    gamma = 0 the weighted BCE. gamma is 0 or at least 1: between them the gradient is infinite at p = t.
    """
    _check_exponent("gamma", gamma)
    x, t = _in_single_precision(logits, targets)
    return ((1 + positive_weight * t) * _residual(x, t).abs().pow(gamma) * _bce(x, t)).flatten(1).mean(1)


def topk_bce_with_logits(logits: Tensor, targets: Tensor, k: float) -> Tensor:
    """Mean of the k largest BCE cells of each sample, shape (B,).

    Source: Wu et al. 2016, "Bridging Category-level and Instance-level Semantic Image Segmentation", section 3.
    k >= 1 is a number of cells (whole, cut to the cells there are); 0 < k < 1 is a share of the cells, at least one.
    """
    if not (0 < k < 1 or (k >= 1 and float(k).is_integer())):
        raise config_error(
            f"top-k BCE: k = {k}; expected a share of the cells in (0, 1) or a whole number of cells >= 1"
        )
    x, t = _in_single_precision(logits, targets)
    cells = _bce(x, t).flatten(1)
    num_kept = min(int(k), cells.shape[1]) if k >= 1 else max(1, round(k * cells.shape[1]))
    return cells.topk(num_kept, dim=1, sorted=False).values.mean(1)


def combined_focal_with_logits(logits: Tensor, targets: Tensor, alpha: float, beta: float) -> Tensor:
    """Mean of -(t^b |t - p|^a log p + (1 - t)^b p^a log(1 - p)), shape (B,).

    Source: github.com/jahsef/3d-medical-tomography-fpn (CombinedFocal, a = 2, b = 6), there with p clamped. Its optimum
    is p = t only for t of 0 or 1.
    """
    _check_corner_exponents(alpha, beta)
    x, t = _in_single_precision(logits, targets)
    positive = t.pow(beta) * _residual(x, t).abs().pow(alpha) * functional.logsigmoid(x)
    return -(positive + _far_from_peaks(x, t, alpha, beta)).flatten(1).mean(1)


def adapted_corner_net_with_logits(
    logits: Tensor, targets: Tensor, threshold: float, alpha: float, beta: float
) -> Tensor:
    """Mean of -(1 - p)^a log p where t >= threshold, else of -(1 - t)^b p^a log(1 - p); shape (B,).

    CornerNet's focal loss (Law and Deng 2018, eq. 1: threshold 1, a = 2, b = 4, divided by the number of objects) with
    a ball of positives around each peak and a mean over cells.
    """
    _check_corner_exponents(alpha, beta)
    x, t = _in_single_precision(logits, targets)
    positive = torch.exp(alpha * functional.logsigmoid(-x)) * functional.logsigmoid(x)
    return _corner_net(positive, x, t, threshold, alpha, beta)


def fuzzy_corner_net_with_logits(
    logits: Tensor, targets: Tensor, threshold: float, alpha: float, beta: float
) -> Tensor:
    """Mean of -|t - p|^a log p where t >= threshold, else of -(1 - t)^b p^a log(1 - p); shape (B,).

    The positive part vanishes at p = t and again at p = 1, so a saturated map is not corrected; the regression form
    below has the single zero p = t. Source: github.com/jahsef/3d-medical-tomography-fpn.
    """
    _check_corner_exponents(alpha, beta)
    x, t = _in_single_precision(logits, targets)
    positive = _residual(x, t).abs().pow(alpha) * functional.logsigmoid(x)
    return _corner_net(positive, x, t, threshold, alpha, beta)


def regression_corner_net_with_logits(
    logits: Tensor, targets: Tensor, threshold: float, alpha: float, beta: float
) -> Tensor:
    """Mean of -|t - p|^a log(1 - |t - p|) where t >= threshold, else of -(1 - t)^b p^a log(1 - p); shape (B,).

    Source: github.com/jahsef/3d-medical-tomography-fpn. 1 - |t - p| is (1 - t) + p below the target and t + (1 - p)
    above it, summed in logarithms.
    """
    _check_corner_exponents(alpha, beta)
    x, t = _in_single_precision(logits, targets)
    residual = _residual(x, t)
    below = torch.logaddexp(torch.log1p(-t), functional.logsigmoid(x))
    above = torch.logaddexp(torch.log(t), functional.logsigmoid(-x))
    positive = residual.abs().pow(alpha) * torch.where(residual > 0, below, above)
    return _corner_net(positive, x, t, threshold, alpha, beta)


def mse_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of (t - p)^2, the Brier score of a soft target; shape (B,)."""
    x, t = _in_single_precision(logits, targets)
    return _residual(x, t).square().flatten(1).mean(1)


def _corner_net(positive: Tensor, x: Tensor, t: Tensor, threshold: float, alpha: float, beta: float) -> Tensor:
    """The negative mean of the positive part where t >= threshold and of CornerNet's negative part elsewhere; (B,)."""
    return -torch.where(t >= threshold, positive, _far_from_peaks(x, t, alpha, beta)).flatten(1).mean(1)


def _far_from_peaks(x: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 - t)^b p^a log(1 - p) of each cell: the nearer to a peak, the cheaper a false alarm."""
    return (1 - t).pow(beta) * torch.exp(alpha * functional.logsigmoid(x)) * functional.logsigmoid(-x)


def _bce(x: Tensor, t: Tensor) -> Tensor:
    """Binary cross-entropy of each cell."""
    return functional.binary_cross_entropy_with_logits(x, t, reduction="none")


def _residual(x: Tensor, t: Tensor) -> Tensor:
    """t - p as t (1 - p) - (1 - t) p, exact also where p rounds to 1."""
    return t * torch.sigmoid(-x) - (1 - t) * torch.sigmoid(x)


def _in_single_precision(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in float32, or in float64 if the logits are."""
    assert logits.shape == targets.shape, f"Expected {tuple(logits.shape)}, got {tuple(targets.shape)}"
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(dtype), targets.to(dtype)


def _check_exponent(name: str, exponent: float) -> None:
    """Raise a UserError for an exponent of |t - p| whose gradient is undefined at p = t."""
    if exponent != 0 and not exponent >= 1:
        raise config_error(f"focal loss: {name} = {exponent}; expected 0 or at least 1")


def _check_corner_exponents(alpha: float, beta: float) -> None:
    """Raise a UserError for exponents of |t - p| or p (alpha) and of the targets (beta) that make the loss infinite."""
    _check_exponent("alpha", alpha)
    if not beta >= 0:
        raise config_error(f"focal loss: beta = {beta}; expected at least 0")
