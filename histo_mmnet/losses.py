"""The focal loss of composites, with smoothed labels and mixed images."""

import dataclasses

import torch
from torch import Tensor

from common.losses import focal_loss_with_logits
from common.precision import autocast
from common.streams import random_for
from histo_mmnet.config import Loss
from histo_mmnet.members import Network
from histo_mmnet.model_defs.slots import into_slots


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Images, which slots show something, and how malignant each composite is, 0..1."""

    images: Tensor  # (B, S, 3, y, x)
    present: Tensor  # (B, S)
    target: Tensor  # (B,)


def composite_loss(logits: Tensor, target: Tensor, settings: Loss) -> Tensor:
    """Focal loss (B,) of logits (B,) and targets 0..1 (B,): 2 a_t |t - p|^gamma BCE, a_t between 1 - alpha and alpha.

    Lin et al. 2017 (arXiv:1708.02002) for soft targets as Li et al. 2020; alpha = 0.5 and gamma = 0 give plain BCE.
    """
    smooth = target * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    weight = 2 * (settings.focal_alpha * target + (1 - settings.focal_alpha) * (1 - target))
    return weight * focal_loss_with_logits(logits[:, None], smooth[:, None], settings.focal_gamma, 0.0)


def training_loss(model: Network, shown: Mixed, magnification: Tensor, settings: Loss, precision: str) -> Tensor:
    """Losses (B,) of composites, and view_weight times the mean loss of each of their photographs by itself.

    The latter teaches every backbone from the first step on, and makes each of the 15 sets of magnifications a trained one.
    """
    with autocast(shown.images.device, precision):
        present = shown.present
        vectors = into_slots(model.vectors(shown.images[present], magnification[present]), present)
        logits = model.fused(vectors, present)[0]
        alone = settings.view_weight > 0 and present.shape[1] > 1
        rows, slots = present.nonzero().T
        one = torch.nn.functional.one_hot(slots, present.shape[1]).bool()
        by_itself = model.fused(vectors[rows], one)[0] if alone else None  # (N,)
    losses = composite_loss(logits, shown.target, settings)
    if by_itself is None:
        return losses
    views = composite_loss(by_itself, shown.target[rows], settings)
    mean = torch.zeros_like(losses).index_add(0, rows, views) / present.sum(1)
    return losses + settings.view_weight * mean


def mixed(
    images: Tensor,
    magnification: Tensor,
    present: Tensor,
    label: Tensor,
    alpha: float,
    seed: int,
    step: int,
    number: int,
) -> Mixed:
    """Mixup (Zhang et al. 2018): each composite with a partner, by one share for all views; alpha = 0 mixes nothing.

    Slots that only one of the two has, or has at another magnification (B, S), are left out; composites that share none stay.
    """
    target = label.to(images.dtype)
    if alpha == 0:
        return Mixed(images, present, target)
    random = random_for("mixup", seed, step, number)
    partner = torch.from_numpy(random.permutation(len(images))).to(images.device)
    share = torch.from_numpy(random.beta(alpha, alpha, len(images))).to(images)
    both = present & present[partner] & (magnification == magnification[partner])
    share = torch.where(both.any(1), share, 1.0)
    shown = torch.where(both.any(1)[:, None], both, present)
    own = share[:, None, None, None, None]
    return Mixed(own * images + (1 - own) * images[partner], shown, share * target + (1 - share) * target[partner])
