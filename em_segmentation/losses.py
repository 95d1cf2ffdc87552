"""Losses between logits and targets, each a mean over a sample's valid voxels: (B, C, z, y, x) -> (B,).

Channels are either sigmoids of their own (binary) or one softmax (classes, where the target holds the class's number).
What is not valid is replaced before anything is computed, so it has no influence on value or gradient, not even as NaN;
a sample without valid voxels has loss 0. Logits may have any float type and are computed in float32 (float64 stays).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        known = known_part(name, x, target, name == "semantic" and settings.semantic_classes > 1)
        total = x.new_zeros(len(x))
        for function in functions:
            assert function in fitting_losses(name, settings), f"{function} does not fit {name}"
            weight = weights[function] if function in weights else 1.0
            total = total + weight * _loss(function, known, model)
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


class Sums(NamedTuple):
    """Over the valid cells of each channel, (B, C) each; p is sigmoid or softmax of the logits, t the truth."""

    both: Tensor  # of p t
    found: Tensor  # of p
    there: Tensor  # of t
    entropy: Tensor  # of the cross-entropy; of classes (B, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Output and target of a network, and where the target is known.

    What several functions ask for is computed once. What stands in cells that are not valid, NaN included, has no part in
    any value or gradient.
    """

    output: Tensor  # (B, C, z, y, x)
    target: Tensor  # the same; of classes (B, 1, z, y, x), the class's number
    valid: Tensor | None  # (B, C or 1, z, y, x) bool; None: every cell
    counts: Tensor  # (B, C): valid cells
    are_classes: bool
    is_bounded: bool  # tanh of the output is compared
    hidden: float  # the output's value where invalid, for losses of single cells

    def shown(self, cells: Tensor, otherwise: float) -> Tensor:
        """The cells, another value where invalid."""
        return cells if self.valid is None else torch.where(self.valid, cells, otherwise)

    def mean(self, cells: Tensor) -> Tensor:
        """Mean over the valid cells (B, C, z, y, x) of each sample, the others being 0; 0 where none is valid; (B,)."""
        return self.mean_of_sums(cells.flatten(2).sum(2))

    def mean_of_sums(self, sums: Tensor) -> Tensor:
        """The same of sums over cells (B, C) or (B, 1)."""
        count = self.counts.sum(1) * sums.shape[1] / self.counts.shape[1]
        return sums.sum(1) / count.clamp(min=1)

    @functools.cached_property
    def logits(self) -> Tensor:
        """The output, or its tanh, with the hidden value where invalid."""
        x = self.shown(self.output, self.hidden)
        return x.tanh() if self.is_bounded else x

    @functools.cached_property
    def truth(self) -> Tensor:
        """The target, 0 where invalid."""
        return self.shown(self.target, 0.0)

    @functools.cached_property
    def log_truth(self) -> Tensor:
        """log softmax at the true class, 0 where invalid; (B, 1, z, y, x)."""
        return self.shown(self.logits.log_softmax(1).gather(1, self.truth.long()), 0.0)

    @functools.cached_property
    def sums(self) -> Sums:
        """Of all of the losses that are made of sums, in one pass forth and back."""
        function = _ClassSums if self.are_classes else _BinarySums
        return Sums(*function.apply(self.output, self.target, self.valid))  # type: ignore[no-untyped-call]

    @functools.cached_property
    def cross_entropy(self) -> Tensor:
        """-(t log p + (1 - t) log(1 - p)) of each cell, p = sigmoid(logits); 0 where invalid."""
        return functional.binary_cross_entropy_with_logits(self.logits, self.truth, reduction="none")


def bits_of(valid: Tensor | None, cells: Tensor) -> Tensor | None:
    """All bits of a cell's type where valid, none elsewhere; a mask that `hide_` takes."""
    bits = torch.int64 if cells.dtype == torch.float64 else torch.int32
    return None if valid is None else valid.to(bits).neg_()


def hide_(cells: Tensor, bits: Tensor | None) -> Tensor:
    """Zero where invalid, in place: six times as fast as torch.where, and NaN vanishes too."""
    if bits is not None:
        cells.view(bits.dtype).bitwise_and_(bits)
    return cells


class _BinarySums(torch.autograd.Function):
    """Sums of channels with a sigmoid each: of logits x and truth t (B, C, z, y, x), valid (B, C or 1, z, y, x) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bits = bits_of(valid, x)
        p, t = hide_(x.sigmoid(), bits), t if bits is None else hide_(t.clone(), bits)
        ctx.save_for_backward(p, t)
        entropy = x.abs().neg_().exp_().add_(1).log_()  # log(1 + exp x) = max(x, 0) + log(1 + exp -|x|)
        entropy = hide_(entropy.add_(x.clamp(min=0)).addcmul_(x, t, value=-1), bits)
        both = torch.linalg.vecdot(p.flatten(2), t.flatten(2))
        found, there, entropy_sum = (cells.flatten(2).sum(2) for cells in (p, t, entropy))
        ctx.mark_non_differentiable(there)
        return both, found, there, entropy_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d p = p (1 - p) dx; d entropy = (p - t) dx; both are 0 where p = t = 0."""
        p, t = ctx.saved_tensors
        by_both, by_found, _, by_entropy = (gradient[:, :, None, None, None] for gradient in gradients)
        by_x = (t * by_both).add_(by_found).mul_(torch.addcmul(p, p, p, value=-1))
        return by_x.addcmul_(p - t, by_entropy), None, None


class _ClassSums(torch.autograd.Function):
    """Sums of channels with one softmax: of logits x (B, C, z, y, x), the class's number (B, 1, z, y, x), valid or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bits = bits_of(valid, x)
        index = hide_(number.clone(), bits).long()
        logarithm = x.log_softmax(1)
        entropy = hide_(logarithm.gather(1, index).neg_(), bits).flatten(2).sum(2)
        p = hide_(logarithm.exp_(), bits)
        t = hide_(torch.zeros_like(p).scatter_(1, index, 1.0), bits)
        ctx.save_for_backward(p, t)
        there = t.flatten(2).sum(2)
        ctx.mark_non_differentiable(there)
        return torch.linalg.vecdot(p.flatten(2), t.flatten(2)), p.flatten(2).sum(2), there, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d p_k = p_k (dx_k - sum_c p_c dx_c); d entropy = sum_k (p_k - t_k) dx_k."""
        p, t = ctx.saved_tensors
        by_both, by_found, _, by_entropy = (gradient[:, :, None, None, None] for gradient in gradients)
        by_x = (t * by_both).add_(by_found).mul_(p)
        by_x.addcmul_(p, by_x.sum(1, keepdim=True), value=-1)
        return by_x.addcmul_(p - t, by_entropy), None, None


def known_part(name: "TargetName", output: Tensor, target: Target, are_classes: bool) -> Known:
    """Output and target of a loss; output (B, C, z, y, x) float32 or float64."""
    t, valid = target.values, target.valid
    assert output.shape[2:] == t.shape[2:] == valid.shape[2:], f"{output.shape}, {t.shape}, {valid.shape}"
    assert {valid.shape[1], t.shape[1]} <= {1, output.shape[1]}, f"{output.shape}, {t.shape}, {valid.shape}"
    counts = valid.flatten(2).sum(2)
    is_whole = output.device.type == "cpu" and int(counts.sum()) == valid.numel()  # elsewhere asking would cost more
    counts, valid_or_none = counts.expand(output.shape[:2]), None if is_whole else valid
    hidden = 0.0 if are_classes or name in ("distance", "centre", "lsd") else SURELY_NOT
    return Known(output, t.to(output.dtype), valid_or_none, counts, are_classes, name == "distance", hidden)


def _loss(function: "LossName", known: Known, model: "Model") -> Tensor:
    """One loss function; (B,)."""
    match function:
        case "MSELoss":
            return mean_squared_error(known)
        case "CrossEntropyLoss":
            return cross_entropy(known)
        case "BCEWithLogitsLoss":
            return binary_cross_entropy(known)
        case "WeightedBCELoss":
            return weighted_binary_cross_entropy(known, model.positive_weight)
        case "FocalLoss":
            return (
                focal_loss_of_classes(known, model.focal_gamma)
                if known.are_classes
                else focal_loss(known, model.focal_gamma)
            )
        case "DiceLoss":
            return dice_loss(known)
        case "TverskyLoss":
            return tversky_loss(known, model.tversky_alpha, model.tversky_beta, SMOOTHING)
        case "DiceCELoss":
            entropy = cross_entropy(known) if known.are_classes else binary_cross_entropy(known)
            return entropy + dice_loss(known)


def binary_cross_entropy(known: Known) -> Tensor:
    """Mean of -(t log p + (1 - t) log(1 - p)), p = sigmoid(logits); (B,)."""
    return known.mean_of_sums(known.sums.entropy)


def weighted_binary_cross_entropy(known: Known, positive_weight: float) -> Tensor:
    """Mean of -(w t log p + (1 - t) log(1 - p)); (B,)."""
    weight = known.logits.new_tensor(positive_weight)
    x, t = known.logits, known.truth
    return known.mean(functional.binary_cross_entropy_with_logits(x, t, reduction="none", pos_weight=weight))


def focal_loss(known: Known, gamma: float) -> Tensor:
    """Mean of (1 - p_t)^gamma (-log p_t), p_t the probability given to the truth; (B,).

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4. In logarithms, finite for every logit.
    """
    wrong = functional.logsigmoid(known.logits * (1 - 2 * known.truth))  # log(1 - p_t)
    return known.mean((gamma * wrong).exp() * known.cross_entropy)


def focal_loss_of_classes(known: Known, gamma: float) -> Tensor:
    """The focal loss of a softmax, a mean over voxels and channels (as in MONAI, 1 / C of the mean over voxels); (B,)."""
    wrong = (-torch.expm1(known.log_truth)).clamp(min=1e-12)  # a power below 1 has no slope at 0
    return known.mean(-wrong.pow(gamma) * known.log_truth) / known.logits.shape[1]


def cross_entropy(known: Known) -> Tensor:
    """Mean of -log softmax(logits) at the true class; (B,)."""
    return known.mean_of_sums(known.sums.entropy)


def mean_squared_error(known: Known) -> Tensor:
    """Mean of (output - t)^2 over valid voxels and all channels; (B,)."""
    return known.mean((known.logits - known.truth).square())


def dice_loss(known: Known) -> Tensor:
    """Mean over channels of 1 - 2 sum(p t) / (sum p + sum t); (B,).

    Source: Milletari et al. 2016, "V-Net", section 3, with plain sums in the denominator.
    """
    return tversky_loss(known, 0.5, 0.5, SMOOTHING / 2)


def tversky_loss(known: Known, alpha: float, beta: float, smoothing: float) -> Tensor:
    """Mean over channels of 1 - TP / (TP + alpha FP + beta FN) with soft counts over a sample's valid voxels; (B,).

    Source: Salehi et al. 2017, "Tversky loss function", eq. 3. Channels without valid voxels are left out.
    """
    true_positive = known.sums.both  # (B, C)
    false_positive, false_negative = known.sums.found - true_positive, known.sums.there - true_positive
    union = true_positive + alpha * false_positive + beta * false_negative
    loss = 1 - (true_positive + smoothing) / (union + smoothing)
    return loss.sum(1) / (known.counts > 0).sum(1).clamp(min=1)  # where nothing is valid 1 - smoothing / smoothing is 0
