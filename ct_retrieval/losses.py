"""Losses of label vectors that may hold unknowns, and of triplets of embeddings."""

import torch
import torch.nn.functional as functional
from torch import Tensor

UNKNOWN = 9


def known_of(labels: Tensor) -> Tensor:
    """Which labels (B, C) are known."""
    return labels != UNKNOWN


def micro_f1_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - soft F1 of all known labels of a batch pooled, a scalar: 1 - 2 tp / (2 tp + fp + fn), p = sigmoid(x) for decisions.

    The pooled one is micro-F1; the mean of each sample's own (sample_f1_loss) is another figure under the same name elsewhere.
    """
    tp, wrong = _counts(logits, labels)
    return 1 - 2 * tp.sum() / (2 * tp.sum() + wrong.sum()).clamp(min=1e-8)


def sample_f1_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples of 1 - soft F1 of a sample's own known labels, a scalar."""
    tp, wrong = _counts(logits, labels)
    return (1 - 2 * tp / (2 * tp + wrong).clamp(min=1e-8)).mean()


def _counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Soft true positives, and false positives and negatives, of each sample (B,)."""
    known = known_of(labels)
    p, t = torch.sigmoid(logits.float()), torch.where(known, labels, 0).float()
    tp = torch.where(known, p * t, 0.0).sum(1)
    wrong = torch.where(known, p * (1 - t) + (1 - p) * t, 0.0).sum(1)
    return tp, wrong


def bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean binary cross-entropy of known labels, a scalar; 0 where none is."""
    known = known_of(labels)
    t = torch.where(known, labels, 0).float()
    losses = functional.binary_cross_entropy_with_logits(logits.float(), t, reduction="none")
    return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)


def hybrid_loss(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha BCE + beta micro-F1 loss, a scalar."""
    return alpha * bce_loss(logits, labels) + beta * micro_f1_loss(logits, labels)


def triplet_losses(anchor: Tensor, positive: Tensor, negative: Tensor, margin: Tensor) -> Tensor:
    """relu(|a - p|^2 - |a - n|^2 + margin) of triplets (T, d) and margins (T,) or one: (T,) (Schroff et al. 2015, eq. 3)."""
    near, far = ((anchor - other).pow(2).sum(1) for other in (positive, negative))
    return functional.relu(near - far + margin)
