"""Losses between logits and targets, each a mean over a sample's valid voxels: (B, C, z, y, x) -> (B,).

Channels are either sigmoids of their own (binary) or one softmax (classes, where the target holds the class's number).
What is not valid is replaced before anything is computed, so it has no influence on value or gradient, not even as NaN;
a sample without valid voxels has loss 0. Logits may have any float type and are computed in float32 (float64 stays).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor

from em_segmentation.targets import Target

if TYPE_CHECKING:
    from em_segmentation.config import LossName, Model, TargetName, Targets

SURELY_NOT = -1e4  # the logit put where nothing is valid: with truth 0 its loss is exactly 0
SMOOTHING = 1e-5  # of Dice and Tversky: a quotient of empty sums is 1
BINARY: tuple["LossName", ...] = (
    "DiceLoss", "FocalLoss", "TverskyLoss", "DiceCELoss", "BCEWithLogitsLoss", "WeightedBCELoss",
)  # fmt: skip
CLASSES: tuple["LossName", ...] = ("DiceLoss", "FocalLoss", "TverskyLoss", "DiceCELoss", "CrossEntropyLoss")
REAL: tuple["LossName", ...] = ("MSELoss",)


def fitting_losses(name: "TargetName", settings: "Targets") -> tuple["LossName", ...]:
    """The loss functions that a target can be learnt with."""
    if name in ("distance", "centre", "lsd"):
        return REAL
    return CLASSES if name == "semantic" and settings.semantic_classes > 1 else BINARY


def fitting_problems(targets: "Targets", model: "Model") -> Iterator[str]:
    """One line per loss function of the config that does not fit its target."""
    own = len(targets.loss_functions) == len(targets.names)
    for number, name in enumerate(targets.names):
        for function in targets.loss_functions[number] if own else model.loss_functions:
            if function not in fitting_losses(name, targets):
                several = name == "semantic" and targets.semantic_classes > 1
                classes = f" of {targets.semantic_classes} classes" if several else ""
                yield (
                    f"{'targets' if own else 'model'}.loss_functions: {function} does not fit target {name}{classes}; "
                    f"expected {', '.join(fitting_losses(name, targets))} (targets.loss_functions: a list per target)"
                )
    if len(set(model.loss_functions)) < len(model.loss_functions):
        yield f"model.loss_functions: expected different ones, got {list(model.loss_functions)}"


def target_loss(
    name: "TargetName",
    logits: Tensor,
    target: Target,
    functions: tuple["LossName", ...],
    model: "Model",
    settings: "Targets",
) -> Tensor:
    """Weighted sum of loss functions per sample, (B,); logits (B, C, z, y, x) of any float type.

    A function weighs what model.loss_weights says where model.loss_functions names it, else 1.
    """
    weights = dict(zip(model.loss_functions, model.loss_weights, strict=True))
    with torch.autocast(logits.device.type, enabled=False):
        x = logits if logits.dtype == torch.float64 else logits.float()
        total = x.new_zeros(len(x))
        for function in functions:
            assert function in fitting_losses(name, settings), f"{function} does not fit {name}"
            weight = weights[function] if function in weights else 1.0
            total = total + weight * _loss(function, name, x, target, model)
    return total


def deep_supervision_loss(
    name: "TargetName",
    scales: list[Tensor],
    target: Target,
    functions: tuple["LossName", ...],
    model: "Model",
    settings: "Targets",
) -> Tensor:
    """target_loss of each scale's logits, finest first, each next one with half the weight; weights sum to 1; (B,)."""
    weights = [0.5**scale for scale in range(len(scales))]
    total = scales[0].new_zeros(len(scales[0]), dtype=torch.float32)
    for logits, weight in zip(scales, weights, strict=True):
        shape = logits.shape[2], logits.shape[3], logits.shape[4]
        loss = target_loss(name, logits, at_scale(target, shape), functions, model, settings)
        total = total + weight / sum(weights) * loss
    return total


def at_scale(target: Target, shape: tuple[int, int, int]) -> Target:
    """The target on a coarser grid (z, y, x): each cell takes the voxel that its centre falls into, so invents nothing.

    Where the centre lies between two voxels it is the later one.
    """
    values, valid = target.values, target.valid
    for axis, cells in enumerate(shape, start=2):
        n = values.shape[axis]
        if cells != n:
            chosen = (2 * torch.arange(cells, device=values.device) + 1) * n // (2 * cells)
            values, valid = values.index_select(axis, chosen), valid.index_select(axis, chosen)
    return Target(values, valid)


def _loss(function: "LossName", name: "TargetName", x: Tensor, target: Target, model: "Model") -> Tensor:
    """One loss function of logits x; (B,)."""
    t, valid = target.values, target.valid
    classes = x.shape[1] > 1 and name == "semantic"
    match function:
        case "MSELoss":
            return mean_squared_error(torch.where(valid, x, 0).tanh() if name == "distance" else x, t, valid)
        case "CrossEntropyLoss":
            return cross_entropy(x, t, valid)
        case "BCEWithLogitsLoss":
            return binary_cross_entropy(x, t, valid, 1.0)
        case "WeightedBCELoss":
            return binary_cross_entropy(x, t, valid, model.positive_weight)
        case "FocalLoss":
            focal = focal_loss_of_classes if classes else focal_loss
            return focal(x, t, valid, model.focal_gamma)
        case "DiceLoss":
            return dice_loss(*_probabilities(x, t, valid, classes), valid)
        case "TverskyLoss":
            alpha, beta = model.tversky_alpha, model.tversky_beta
            return tversky_loss(*_probabilities(x, t, valid, classes), valid, alpha, beta, SMOOTHING)
        case "DiceCELoss":
            entropy = cross_entropy(x, t, valid) if classes else binary_cross_entropy(x, t, valid, 1.0)
            return entropy + dice_loss(*_probabilities(x, t, valid, classes), valid)


def binary_cross_entropy(logits: Tensor, t: Tensor, valid: Tensor, positive_weight: float) -> Tensor:
    """Mean of -(w t log p + (1 - t) log(1 - p)), p = sigmoid(logits); (B,)."""
    x, t = _masked(logits, t, valid, SURELY_NOT)
    weight = None if positive_weight == 1 else x.new_tensor(positive_weight)
    return _mean(functional.binary_cross_entropy_with_logits(x, t, reduction="none", pos_weight=weight), valid)


def focal_loss(logits: Tensor, t: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """Mean of (1 - p_t)^gamma (-log p_t), p_t the probability given to the truth; (B,).

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4. In logarithms, finite for every logit.
    """
    x, t = _masked(logits, t, valid, SURELY_NOT)
    entropy = functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    wrong = functional.logsigmoid(x * (1 - 2 * t))  # log(1 - p_t)
    return _mean((gamma * wrong).exp() * entropy, valid)


def focal_loss_of_classes(logits: Tensor, t: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """The focal loss of a softmax, a mean over voxels and channels (as in MONAI, 1 / C of the mean over voxels); (B,)."""
    right = _log_probability_of_truth(logits, t, valid)  # (B, 1, z, y, x)
    wrong = (-torch.expm1(right)).clamp(min=1e-12)  # a power below 1 has no slope at 0
    return _mean(-wrong.pow(gamma) * right, valid) / logits.shape[1]


def cross_entropy(logits: Tensor, t: Tensor, valid: Tensor) -> Tensor:
    """Mean of -log softmax(logits) at the true class t (B, 1, z, y, x); (B,)."""
    return _mean(-_log_probability_of_truth(logits, t, valid), valid)


def mean_squared_error(output: Tensor, t: Tensor, valid: Tensor) -> Tensor:
    """Mean of (output - t)^2 over valid voxels and all channels; (B,)."""
    x, t = _masked(output, t, valid, 0.0)
    return _mean((x - t).square(), valid)


def dice_loss(p: Tensor, t: Tensor, valid: Tensor) -> Tensor:
    """Mean over channels of 1 - 2 sum(p t) / (sum p + sum t); (B,).

    Source: Milletari et al. 2016, "V-Net", section 3, with plain sums in the denominator.
    """
    return tversky_loss(p, t, valid, 0.5, 0.5, SMOOTHING / 2)


def tversky_loss(p: Tensor, t: Tensor, valid: Tensor, alpha: float, beta: float, smoothing: float) -> Tensor:
    """Mean over channels of 1 - TP / (TP + alpha FP + beta FN) with soft counts over a sample's valid voxels; (B,).

    Source: Salehi et al. 2017, "Tversky loss function", eq. 3. p and t (B, C, z, y, x) are probability and truth, both 0 where
    invalid; channels without valid voxels are left out.
    """
    true_positive = (p * t).flatten(2).sum(2)  # (B, C)
    false_positive, false_negative = p.flatten(2).sum(2) - true_positive, t.flatten(2).sum(2) - true_positive
    union = true_positive + alpha * false_positive + beta * false_negative
    loss = 1 - (true_positive + smoothing) / (union + smoothing)
    judged = valid.flatten(2).any(2).expand_as(loss)
    return loss.sum(1) / judged.sum(1).clamp(min=1)  # where nothing is valid 1 - smoothing / smoothing is 0


def _probabilities(x: Tensor, t: Tensor, valid: Tensor, classes: bool) -> tuple[Tensor, Tensor]:
    """Probabilities and truth of each channel, both (B, C, z, y, x), 0 where invalid; classes become a channel each."""
    if not classes:
        x, t = _masked(x, t, valid, SURELY_NOT)
        return x.sigmoid(), t
    x, t = _masked(x, t, valid, 0.0)
    numbers = torch.arange(x.shape[1], device=x.device).view(-1, 1, 1, 1)
    return torch.where(valid, x.softmax(1), 0), ((t == numbers) & valid).to(x.dtype)


def _log_probability_of_truth(logits: Tensor, t: Tensor, valid: Tensor) -> Tensor:
    """log softmax at the true class, 0 where invalid; (B, 1, z, y, x)."""
    x, t = _masked(logits, t, valid, 0.0)
    return torch.where(valid, x.log_softmax(1).gather(1, t.long()), 0)


def _masked(x: Tensor, t: Tensor, valid: Tensor, filling: float) -> tuple[Tensor, Tensor]:
    """Output with `filling` and truth with 0 where invalid: the gradient forgets what stood there too, NaN included."""
    assert x.shape[2:] == t.shape[2:] == valid.shape[2:], f"{x.shape}, {t.shape}, {valid.shape}"
    assert {valid.shape[1], t.shape[1]} <= {1, x.shape[1]}, f"{x.shape}, {t.shape}, {valid.shape}"
    return torch.where(valid, x, filling), torch.where(valid, t, 0).to(x.dtype)


def _mean(cells: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid cells (B, C, z, y, x) of each sample, the others being 0; 0 where none is valid; (B,)."""
    count = valid.flatten(1).sum(1) * (cells.shape[1] // valid.shape[1])
    return cells.flatten(1).sum(1) / count.clamp(min=1)
