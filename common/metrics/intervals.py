"""Confidence intervals over independent units (tomograms, patients) by the bootstrap."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.metrics.detection import f_beta_of_counts
from common.streams import random_for

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A figure on all units and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[[IntArray], float], n: int, num_resamples: int, confidence: float, seed: int
) -> Interval:
    """Percentile bootstrap of a statistic of unit indices (n,) out of 0..n-1 (Efron 1979).

    Whole units are drawn with replacement. Resamples on which the statistic is undefined (NaN) are left out; equal
    seeds give equal resamples, so two intervals from one seed are paired.
    """
    return bootstrap_intervals(lambda indices: (statistic(indices),), n, num_resamples, confidence, seed)[0]


def bootstrap_intervals(
    statistics: Callable[[IntArray], Sequence[float]], n: int, num_resamples: int, confidence: float, seed: int
) -> list[Interval]:
    """bootstrap_interval of several figures that are computed together, on the same resamples."""
    resampled = np.array(
        [statistics(indices) for chunk in _resample_indices(n, num_resamples, seed) for indices in chunk]
    )  # (num_resamples, figures)
    estimates = statistics(np.arange(n))
    return [_percentile_interval(*of_one, confidence) for of_one in zip(estimates, resampled.T, strict=True)]


def f_beta_interval(
    counts: NDArray[np.number], beta: float, num_resamples: int, confidence: float, seed: int
) -> Interval:
    """Percentile bootstrap of F-beta from TP, FP, FN per unit (n, 3): bootstrap_interval's resamples, vectorised."""
    resampled = [f_beta_of_counts(total, beta) for total in _resampled_totals(counts, num_resamples, seed)]
    estimate = float(f_beta_of_counts(counts.sum(axis=0), beta))
    return _percentile_interval(estimate, np.concatenate(resampled), confidence)


def paired_bootstrap_difference(
    counts_a: NDArray[np.number],
    counts_b: NDArray[np.number],
    beta: float,
    num_resamples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """Interval of F-beta(a) - F-beta(b) for two systems on the same units, TP, FP, FN each (n, 3).

    Both are scored on the same resampled units, so what makes a unit hard for both cancels; an interval without 0 is a
    difference at this confidence.
    """
    assert counts_a.shape == counts_b.shape, f"Expected the same units, got {counts_a.shape} and {counts_b.shape}"
    both = np.concatenate([counts_a, counts_b], axis=1)  # (n, 6)
    resampled = [
        f_beta_of_counts(total[:, :3], beta) - f_beta_of_counts(total[:, 3:], beta)
        for total in _resampled_totals(both, num_resamples, seed)
    ]
    all_units = both.sum(axis=0)
    estimate = float(f_beta_of_counts(all_units[:3], beta) - f_beta_of_counts(all_units[3:], beta))
    return _percentile_interval(estimate, np.concatenate(resampled), confidence)


def _resample_indices(n: int, num_resamples: int, seed: int) -> Iterator[IntArray]:
    """Yield chunks (rows, n) of unit indices, num_resamples rows in all, of about a million numbers each."""
    assert n > 0 and num_resamples > 0, f"Expected n and num_resamples > 0, got {n} and {num_resamples}"
    generator = random_for("bootstrap", seed)
    rows = max(1, 2**20 // n)
    for first in range(0, num_resamples, rows):
        yield generator.integers(n, size=(min(rows, num_resamples - first), n))


def _resampled_totals(counts: NDArray[np.number], num_resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield the column sums (rows, c) of resampled counts (n, c): how often each unit was drawn, times its counts."""
    n = len(counts)
    for indices in _resample_indices(n, num_resamples, seed):
        rows = len(indices)
        flat = (indices + n * np.arange(rows)[:, None]).ravel()
        times_drawn = np.bincount(flat, minlength=rows * n).reshape(rows, n)
        yield times_drawn.astype(np.float64) @ counts.astype(np.float64)


def _percentile_interval(estimate: float, resampled: FloatArray, confidence: float) -> Interval:
    """The central share of the resampled figures (num_resamples,), NaN left out."""
    assert 0 < confidence < 1, f"Expected a confidence between 0 and 1, got {confidence}"
    defined = resampled[~np.isnan(resampled)]
    assert len(defined) > 0, "Expected a statistic that is defined on some resample, got only NaN"
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(estimate), float(low), float(high))
