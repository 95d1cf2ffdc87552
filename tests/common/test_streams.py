"""Addressed randomness: known values, independence, and batches that do not depend on who computes them."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.streams import epoch_and_index, micro_batches, random_for, seed_dropout

LAYOUTS = [(1, 12), (1, 1), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]  # processes, samples of each at once


def test_known_values() -> None:
    """Another numpy or another spelling of names would silently repeat no run of before."""
    assert random_for("augment", 42, 7).integers(2**32, size=3).tolist() == [3463778049, 2554498791, 142225712]
    assert random_for("chance").integers(1000, size=5).tolist() == [984, 599, 339, 51, 807]
    assert [epoch_and_index(p, 5, 42)[1] for p in range(10)] == [4, 2, 1, 0, 3, 2, 0, 4, 3, 1]


def test_equal_names_give_equal_draws_and_every_part_of_a_name_counts() -> None:
    draw = random_for("augment", 1, 2).random(4).tolist()
    assert random_for("augment", 1, 2).random(4).tolist() == draw
    for purpose, *numbers in (("mixup", 1, 2), ("augment", 2, 2), ("augment", 1, 3), ("augment", 2, 1), ("augment", 1)):
        assert random_for(str(purpose), *map(int, numbers)).random(4).tolist() != draw


def test_no_two_names_of_a_run_share_a_stream() -> None:
    purposes = ("dropout", "epoch", "augment", "mixup", "chance", "motor scene", "motor clutter")
    names = [(p, *n) for p in purposes for k in range(4) for n in itertools.product((0, 1, 2, 255, 10**6), repeat=k)]
    first = {int(random_for(*name).integers(2**63)) for name in names}  # type: ignore[arg-type]
    assert len(first) == len(names)


@pytest.mark.parametrize(
    ("one", "other"), [(("ab",), ("a", 98)), (("a", 2**32), ("a", 0, 1)), (("a", 12), ("a", 1, 2)), (("a", 1), ("a1",))]
)
def test_names_that_look_alike_do_not_share_a_stream(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """Joined letter by letter, or number by number as the generator's seeding does, they would."""
    assert random_for(*one).random() != random_for(*other).random()


def test_whole_numbers_of_numpy_are_the_same_name() -> None:
    assert random_for("a", np.int64(3)).random() == random_for("a", 3).random()


def test_neighbouring_names_are_independent_and_uniform() -> None:
    one, two = (np.array([random_for(p, 42, i).random() for i in range(3000)]) for p in ("augment", "dropout"))
    assert stats.kstest(one, "uniform").pvalue > 1e-3
    for first, second in ((one[:-1], one[1:]), (one, two), (one[:-10], one[10:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(3000)


def test_no_global_generator_is_touched_or_asked() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    draw = random_for("augment", 3).random()
    epoch_and_index(11, 7, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert random_for("augment", 3).random() == draw


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64])
def test_every_epoch_is_a_permutation_of_all_samples(num_samples: int) -> None:
    drawn = [epoch_and_index(position, num_samples, 3) for position in range(5 * num_samples)]
    assert [epoch for epoch, _ in drawn] == [position // num_samples for position in range(5 * num_samples)]
    orders = [tuple(index for e, index in drawn if e == epoch) for epoch in range(5)]
    assert all(sorted(order) == list(range(num_samples)) for order in orders)
    if num_samples > 6:
        assert len({*orders, tuple(epoch_and_index(p, num_samples, 4)[1] for p in range(num_samples))}) == 6


def test_a_sample_is_as_likely_at_any_place_of_an_epoch() -> None:
    places = [next(p for p in range(8) if epoch_and_index(8 * e + p, 8, 0)[1] == 3) for e in range(800)]
    assert stats.chisquare(np.bincount(places, minlength=8)).pvalue > 1e-3


@pytest.mark.parametrize(("position", "num_samples"), [(-1, 5), (0, 0)])
def test_a_position_outside_any_run_is_refused(position: int, num_samples: int) -> None:
    with pytest.raises(AssertionError, match="Expected position"):
        epoch_and_index(position, num_samples, 0)


def steps_of(ranks: int, micro: int, first: int, last: int) -> list[list[int]]:
    """Each step's samples of a batch of 12, in the order in which the ranks deal them out."""
    shares = [list(micro_batches(first, last, 12, micro, rank, ranks)) for rank in range(ranks)]
    rounds = 12 // (ranks * micro)
    assert all(len(share) == rounds * (last - first) and {len(b) for b in share} == {micro} for share in shares)
    dealt = [list(itertools.chain.from_iterable(turn)) for turn in zip(*shares, strict=True)]
    return [sum(dealt[step * rounds : (step + 1) * rounds], []) for step in range(last - first)]


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_a_step_holds_the_same_samples_however_it_is_shared(ranks: int, micro: int) -> None:
    assert steps_of(ranks, micro, 0, 4) == [list(range(12 * step, 12 * step + 12)) for step in range(4)]


@pytest.mark.parametrize(("ranks", "micro"), LAYOUTS)
def test_from_any_step_a_run_continues_as_it_would_have(ranks: int, micro: int) -> None:
    for rank, first in itertools.product(range(ranks), range(6)):
        whole = list(micro_batches(0, 5, 12, micro, rank, ranks))
        assert list(micro_batches(first, 5, 12, micro, rank, ranks)) == whole[first * 12 // (ranks * micro) :]


@pytest.mark.parametrize(("ranks", "micro"), [(5, 1), (1, 5), (2, 4), (24, 1)])
def test_a_batch_that_does_not_divide_is_refused(ranks: int, micro: int) -> None:
    with pytest.raises(AssertionError, match="Expected a batch of 12 to divide"):
        next(micro_batches(0, 1, 12, micro, 0, ranks))


def mask(seed: int, step: int, micro_batch: int) -> list[bool]:
    seed_dropout(seed, step, micro_batch)
    kept: list[bool] = (torch.nn.functional.dropout(torch.ones(64), 0.5) > 0).tolist()
    return kept


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    with torch.random.fork_rng():
        names = list(itertools.product((0, 1, 42, 2**31), (0, 1, 19999), (0, 1, 2)))
        masks = [mask(*name) for name in names]
        torch.rand(100)  # whatever was drawn before
        assert [mask(*name) for name in reversed(names)] == masks[::-1]
        assert len({tuple(m) for m in masks}) == len(names)
        assert 0.4 < np.mean(masks) < 0.6
