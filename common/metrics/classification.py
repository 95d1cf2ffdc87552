"""Figures of a binary classifier from labels, probabilities and a threshold; NaN where a figure is not defined."""

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Criterion = Literal["f1", "balanced_accuracy"]  # of a threshold


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Counts of a decision; class 1 is positive."""

    true_negative: int
    false_positive: int
    false_negative: int
    true_positive: int

    @property
    def accuracy(self) -> float:
        return _share(self.true_negative + self.true_positive, sum(dataclasses.astuple(self)))

    @property
    def recall(self) -> float:
        """Sensitivity."""
        return _share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        return _share(self.true_negative, self.true_negative + self.false_positive)

    @property
    def precision(self) -> float:
        """0 where nothing was called positive though something is; NaN where nothing is either."""
        called = self.true_positive + self.false_positive
        return self.true_positive / called if called else (0.0 if self.false_negative else float("nan"))

    @property
    def f1(self) -> float:
        return _share(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of recall and specificity; NaN where a class is missing."""
        return (self.recall + self.specificity) / 2


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def confusion(labels: Ints, positive: npt.NDArray[np.bool_]) -> Confusion:
    """Counts from labels 0 or 1 (n,) and decisions (n,)."""
    assert labels.shape == positive.shape, f"Expected {labels.shape}, got {positive.shape}"
    counts = np.bincount(2 * labels + positive, minlength=4)
    return Confusion(*(int(count) for count in counts))


def roc_auc(labels: Ints, scores: Floats) -> float:
    """The chance that a positive scores above a negative, ties counting half (Mann and Whitney); NaN without either class."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank of ties, from 1
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    return float((rank[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def roc_curve(labels: Ints, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """False and true positive rates at falling thresholds (a score at least so high is positive), from (0, 0) on."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each run of equal scores
    true = np.cumsum(labels[order])[last]
    false = last + 1 - true
    thresholds = np.concatenate([[np.inf], scores[order][last]])
    with np.errstate(invalid="ignore"):
        rates = (np.concatenate([[0], counts]) / counts[-1:] for counts in (false, true))
        false_rate, true_rate = (np.asarray(rate, np.float64) for rate in rates)
    return false_rate, true_rate, thresholds


def best_threshold(labels: Ints, scores: Floats, criterion: Criterion) -> float:
    """The threshold on the precision-recall curve with the highest F1, or the highest balanced accuracy.

    It lies midway between two scores; of equally good ones the middle one counts. Both criteria follow from a curve's counts of
    true and false positives; F1 rewards calling everything the more frequent class, balanced accuracy does not. 0.5 where a
    class that the criterion asks for is missing.
    """
    positives, negatives = int(labels.sum()), int((labels == 0).sum())
    if positives == 0 or (negatives == 0 and criterion == "balanced_accuracy"):
        return 0.5
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    true = np.cumsum(labels[order])[last]
    false = last + 1 - true
    value = 2 * true / (last + 1 + positives) if criterion == "f1" else true / positives - false / max(1, negatives)
    equal = np.flatnonzero(value >= value.max() - 1e-12)
    best = int(equal[len(equal) // 2])
    above = float(scores[order][last[best]])
    below = float(scores[order][last[best + 1]]) if best + 1 < len(last) else 0.0
    return (above + below) / 2


def calibration(labels: Ints, probabilities: Floats, num_bins: int) -> tuple[Floats, Floats, Ints, float]:
    """Mean probability, share of positives and count of each bin of equal width that is not empty; and the expected error.

    The expected calibration error: mean distance of the two, weighted by count (Naeini et al. 2015).
    """
    bins = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    kept = count > 0
    said = np.bincount(bins, probabilities, num_bins)[kept] / count[kept]
    was = np.bincount(bins, labels, num_bins)[kept] / count[kept]
    error = float((np.abs(said - was) * count[kept]).sum() / max(1, len(labels)))
    return said, was, count[kept], error
