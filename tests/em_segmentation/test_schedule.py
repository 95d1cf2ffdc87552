"""Learning rates, early stop and the order of epochs as pure functions of the step and of the figures so far."""

import itertools
import math

import pytest

from em_segmentation.config import BASE, Config
from em_segmentation.schedule import ends_early, learning_rate_share, ranked, total_steps
from tests.em_segmentation.small_runs import changed

Record = dict[str, float]


def run_of(*changes: str) -> Config:
    """10 epochs of 4 steps, no warm-up, a peak of 1 and an end of 0.01."""
    settings = ("training.max_epochs=10", "training.steps_per_epoch=4", "scheduler.warmup_epochs=0",
                "optimizer.lr=1", "scheduler.min_lr=0.01")  # fmt: skip
    return changed(BASE, *settings, *changes)


def shares(config: Config, records: list[Record]) -> list[float]:
    return [learning_rate_share(step, records, config) for step in range(total_steps(config))]


def epochs(*losses: float) -> list[Record]:
    """Records of validations after each epoch, with rows of single steps between them."""
    rows: list[list[Record]] = [
        [{"step": 4 * n + 2, "train_loss": 9.0}, {"step": 4 * n + 4, "epoch": n + 1, "val_loss": loss}]
        for n, loss in enumerate(losses)
    ]
    return list(itertools.chain(*rows))


def test_cosine_begins_at_the_peak_and_ends_at_min_lr() -> None:
    found = shares(run_of("scheduler.name=cosine"), [])
    assert found[0] == 1.0 and found[-1] == pytest.approx(0.01)
    assert found[13] == pytest.approx(0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * 13 / 39)))
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["cosine", "step", "plateau", "constant"])
def test_every_course_begins_with_the_linear_warm_up(name: str) -> None:
    found = shares(run_of(f"scheduler.name={name}", "scheduler.warmup_epochs=1.5"), [])
    assert found[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0])


def test_a_warm_up_longer_than_the_run_still_ends_at_the_peak() -> None:
    found = shares(run_of("scheduler.warmup_epochs=100", "training.max_epochs=1"), [])
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and found[3] == 1.0
    assert shares(run_of("scheduler.warmup_epochs=1", "training.max_epochs=1", "training.steps_per_epoch=1"), []) == [1]


def test_step_falls_to_its_share_after_every_so_many_epochs_and_never_below_min_lr() -> None:
    found = shares(run_of("scheduler.name=step", "scheduler.step_epochs=3", "scheduler.factor=0.1"), [])
    assert found == pytest.approx([1.0] * 12 + [0.1] * 12 + [0.01] * 16)


def test_constant_is_constant() -> None:
    assert shares(run_of("scheduler.name=constant"), epochs(3, 3, 3)) == [1.0] * 40


def test_plateau_falls_once_the_figure_of_early_stopping_stopped_improving() -> None:
    """The best is of epoch 2, so patience 1 is spent with epoch 4, and again with epoch 6."""
    config = run_of("scheduler.name=plateau", "scheduler.patience=1", "scheduler.factor=0.5")
    records = epochs(5, 4, 4.5, 4.2, 4.1, 4.0)
    by_epoch = shares(config, records)[::4]
    assert by_epoch == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert shares(config, epochs(5, 4, 3, 2, 1)) == [1] * 40
    rising = [record | ({"val_dice": record["val_loss"]} if "epoch" in record else {}) for record in records]
    config = run_of("scheduler.name=plateau", "scheduler.patience=1", "scheduler.factor=0.5",
                    "early_stopping.monitor=val_dice", "early_stopping.mode=max")  # fmt: skip
    assert shares(config, rising)[::4] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]


def test_a_plateau_is_the_same_whenever_it_is_asked_for() -> None:
    """Continued from a checkpoint, a run knows figures of epochs that a step before them must not look at."""
    config = run_of("scheduler.name=plateau", "scheduler.patience=1", "scheduler.factor=0.5")
    records = epochs(5, 6, 7, 8, 9)
    for step in range(20):
        known_then = [record for record in records if record["step"] <= step]
        assert learning_rate_share(step, known_then, config) == learning_rate_share(step, records, config)


def test_early_stopping_waits_for_its_patience_after_the_first_best() -> None:
    config = run_of("early_stopping.patience=2")
    falling, then_flat = epochs(3, 2, 1, 0.5), epochs(3, 2, 2, 2)
    assert not ends_early(falling, config)
    assert [ends_early(then_flat[: 2 * n], config) for n in range(5)] == [False, False, False, False, True]
    assert not ends_early(then_flat, run_of("early_stopping.patience=0")), "0 = never"
    assert not ends_early([{"step": 4, "epoch": 1, "train_loss": 1.0}] * 9, config), "nothing is validated"


def test_epochs_are_ranked_by_the_monitored_figure_and_of_equals_the_later_comes_first() -> None:
    records = epochs(3, 1, 2, 1)
    assert [record["epoch"] for record in ranked(records, run_of())] == [4, 2, 3, 1]
    highest = run_of("checkpoint.mode=max")
    assert [record["epoch"] for record in ranked(records, highest)] == [1, 3, 4, 2]


def test_without_validation_the_last_weights_are_best() -> None:
    records: list[Record] = [{"step": 4 * n, "epoch": n, "train_loss": float(n)} for n in (1, 2, 3)]
    assert [record["epoch"] for record in ranked(records, run_of())] == [3, 2, 1]
