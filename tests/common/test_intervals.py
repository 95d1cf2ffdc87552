"""Intervals against published figures, each other, and their promised coverage."""

import numpy as np
import pytest
from scipy.stats import norm

from common.metrics.detection import f_beta_of_counts
from common.metrics.intervals import (
    IntArray,
    bootstrap_interval,
    f_beta_interval,
    paired_bootstrap_difference,
)


def random_counts(seed: int, n: int, hit_rate: float) -> IntArray:
    """One answer per unit: a hit, or a miss that is a false alarm half the time; (n, 3)."""
    draw = np.random.default_rng(seed)
    hit = draw.random(n) < hit_rate
    return np.stack([hit, ~hit & (draw.random(n) < 0.5), ~hit], axis=1).astype(np.int64)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    interval = bootstrap_interval(lambda indices: float(values[indices].mean()), 400, 2000, 0.95, 1)
    half_width = norm.ppf(0.975) * values.std() / np.sqrt(400)
    assert interval.estimate == values.mean()
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.15 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.15 * half_width)


def test_the_vectorised_interval_equals_the_general_one() -> None:
    counts = random_counts(0, 50, 0.7)
    general = bootstrap_interval(lambda i: float(f_beta_of_counts(counts[i].sum(0), 2)), 50, 300, 0.9, 4)
    fast = f_beta_interval(counts, 2, 300, 0.9, 4)
    assert (fast.estimate, fast.low, fast.high) == pytest.approx((general.estimate, general.low, general.high))


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_show() -> None:
    counts = random_counts(0, 3000, 0.7)  # more than one chunk of resamples
    assert f_beta_interval(counts, 2, 1000, 0.9, 4) == f_beta_interval(counts, 2, 1000, 0.9, 4)
    assert f_beta_interval(counts, 2, 1000, 0.9, 4) != f_beta_interval(counts, 2, 1000, 0.9, 5)


def test_coverage_of_the_f_beta_interval_is_near_its_confidence() -> None:
    """True F2 at a hit rate of 0.7 with half of the misses false alarms: 3.5 / (3.5 + 4 * 0.3 + 0.15)."""
    truth = 5 * 0.7 / (5 * 0.7 + 4 * 0.3 + 0.15)
    intervals = [f_beta_interval(random_counts(seed, 120, 0.7), 2, 400, 0.9, seed) for seed in range(300)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.85 <= covered <= 0.94


def test_whole_units_are_drawn() -> None:
    """Ten picks of one tomogram are one unit: the interval is that of 20 units, far wider than that of 200 picks."""
    by_unit = random_counts(1, 20, 0.5)
    tenfold = f_beta_interval(10 * by_unit, 2, 1000, 0.95, 0)
    assert tenfold == f_beta_interval(by_unit, 2, 1000, 0.95, 0)
    as_picks = f_beta_interval(np.repeat(by_unit, 10, axis=0), 2, 1000, 0.95, 0)
    assert as_picks.high - as_picks.low < 0.5 * (tenfold.high - tenfold.low)


def test_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    first = random_counts(2, 150, 0.7)
    second = first.copy()
    second[np.flatnonzero(first[:, 0])[:10]] = [0, 0, 1]  # the same system, with ten hits lost
    difference = paired_bootstrap_difference(first, second, 2, 2000, 0.95, 0)
    alone = f_beta_interval(first, 2, 2000, 0.95, 0)
    assert difference.estimate == pytest.approx(
        float(f_beta_of_counts(first.sum(0), 2) - f_beta_of_counts(second.sum(0), 2))
    )
    assert 0 < difference.low < difference.estimate < difference.high
    assert difference.high - difference.low < 0.7 * (alone.high - alone.low)
    swapped = paired_bootstrap_difference(second, first, 2, 2000, 0.95, 0)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low))


def test_a_system_does_not_differ_from_itself() -> None:
    counts = random_counts(3, 40, 0.6)
    difference = paired_bootstrap_difference(counts, counts, 2, 500, 0.95, 0)
    assert (difference.estimate, difference.low, difference.high) == (0, 0, 0)


def test_undefined_resamples_are_left_out() -> None:
    """The share among positives does not exist where a resample holds none."""
    positive, hit = np.array([True, False, False, False]), np.array([True, True, False, False])

    def recall(indices: IntArray) -> float:
        chosen = positive[indices]
        return float(hit[indices][chosen].mean()) if chosen.any() else float("nan")

    interval = bootstrap_interval(recall, 4, 200, 0.95, 0)
    assert (interval.estimate, interval.low, interval.high) == (1, 1, 1)
    with pytest.raises(AssertionError, match="only NaN"):
        bootstrap_interval(lambda indices: float("nan"), 4, 20, 0.95, 0)
