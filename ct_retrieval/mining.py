"""Triplets within a batch, all anchors at once: which pairs are alike, which are not, and which negative each pair gets.

Labels are vectors (B, C) of findings, 0, 1 or 9 (unknown), and "no finding" is one more label. Positives are identical vectors,
negatives share no label; pairs that share some and not all are neither. The graded variant takes any two pairs and asks for a
distance in proportion to how much more alike one of them is.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ct_retrieval.losses import UNKNOWN

Mining = Literal["hardest", "random_hard", "semi_hard"]


@dataclasses.dataclass(frozen=True)
class Triplets:
    """Numbers of anchors, positives and negatives (T,) in a batch, and the margin of each (T,)."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    margin: Tensor


def with_no_finding(labels: Tensor) -> Tensor:
    """Findings (B, C) with "none of them" in front (B, C + 1): 9 where an unknown one leaves it open."""
    some, unknown = (labels == 1).any(1), (labels == UNKNOWN).any(1)
    none = torch.where(some, 0, torch.where(unknown, UNKNOWN, 1))
    return torch.cat([none[:, None].to(labels.dtype), labels], 1)


def pairs_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs (B, B) are identical and which disjoint; a vector with an unknown label is neither to any, itself apart."""
    whole = with_no_finding(labels)
    known = (whole != UNKNOWN).all(1)
    both = known[:, None] & known[None]
    same = (whole[:, None] == whole[None]).all(2) & both
    shared = ((whole[:, None] == 1) & (whole[None] == 1)).any(2)
    return same.fill_diagonal_(False), ~shared & both


def jaccard_of(labels: Tensor) -> Tensor:
    """The Jaccard index (B, B) of vectors with "no finding" among them; NaN where an unknown label leaves it open."""
    whole = with_no_finding(labels)
    known = (whole != UNKNOWN).all(1)
    one = (whole == 1).float()
    both = one @ one.T
    either = one.sum(1)[:, None] + one.sum(1)[None] - both
    open_ = ~(known[:, None] & known[None])
    return (both / either.clamp(min=1)).masked_fill(open_, torch.nan)


def squared_distances(embeddings: Tensor) -> Tensor:
    """|a - b|^2 (B, B), at least 0."""
    squares = embeddings.pow(2).sum(1)
    return (squares[:, None] + squares[None] - 2 * embeddings @ embeddings.T).clamp(min=0)


@torch.no_grad()
def mine(embeddings: Tensor, labels: Tensor, margin: float, mining: Mining, generator: torch.Generator) -> Triplets:
    """For every pair of identical labels one negative that costs something; pairs without any have no triplet.

    hardest: the negative of the largest loss. random_hard: any with a loss. semi_hard: any whose loss lies between 0 and the
    margin (farther than the positive and still too near), where there is none any with a loss.
    """
    same, disjoint = pairs_of(labels)
    distance = squared_distances(embeddings.float())
    anchor, positive = same.nonzero().T  # (P,)
    loss = distance[anchor, positive][:, None] - distance[anchor] + margin  # (P, B)
    allowed = disjoint[anchor] & (loss > 0)
    if mining == "semi_hard":
        semi = allowed & (loss < margin)
        allowed = torch.where(semi.any(1, keepdim=True), semi, allowed)
    if mining == "hardest":
        score = loss
    else:
        score = torch.rand(loss.shape, generator=generator, device=generator.device).to(loss.device)
    negative = score.masked_fill(~allowed, -torch.inf).argmax(1)
    there = allowed.any(1)
    anchor, positive, negative = anchor[there], positive[there], negative[there]
    return Triplets(anchor, positive, negative, distance.new_full(anchor.shape, margin))


@torch.no_grad()
def mine_graded(embeddings: Tensor, labels: Tensor, margin: float) -> Triplets:
    """For every anchor and candidate the hardest item that is less alike; the margin grows with how much less.

    margin (J(a, p) - J(a, n)): what is alike in part is neither thrown out nor taken for different.
    """
    alike = jaccard_of(labels)
    distance = squared_distances(embeddings.float())
    size = len(labels)
    difference = alike[:, :, None] - alike[:, None, :]  # (a, p, n)
    loss = distance[:, :, None] - distance[:, None, :] + margin * difference
    itself = torch.eye(size, dtype=torch.bool, device=labels.device)
    allowed = (difference > 0) & (loss > 0) & ~itself[:, :, None] & ~itself[:, None, :]
    negative = torch.where(allowed, loss, -torch.inf).argmax(2)
    anchor, positive = allowed.any(2).nonzero().T
    chosen = negative[anchor, positive]
    return Triplets(anchor, positive, chosen, margin * difference[anchor, positive, chosen])
