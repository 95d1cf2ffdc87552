"""Batches from a loader: errors come as items, and a reading process that dies is told in one line."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, Dataset

from common.errors import BAD_DATA, UserError, data_error
from common.loading import lost_readers_told, next_batch


class Numbers(Dataset[int | UserError]):
    """0, 1, 2 ...; items that are damaged are errors, and some kill the process that reads them."""

    def __init__(self, damaged: tuple[int, ...], deadly: tuple[int, ...]) -> None:
        self.damaged, self.deadly = damaged, deadly

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int | UserError:
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(5)
        return data_error(f"patch_{index}: damaged", "and more") if index in self.damaged else index


def first_of(items: list[int | UserError]) -> int | UserError:
    return items[0]


def batches(numbers: Numbers, workers: int) -> Iterator[int]:
    return next_batch(DataLoader(numbers, 1, num_workers=workers, collate_fn=first_of), "data.num_workers")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_until_one_is_an_error(workers: int) -> None:
    assert list(batches(Numbers((), ()), workers)) == [0, 1, 2, 3, 4, 5]
    stream = batches(Numbers((3,), ()), workers)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(stream)
    assert caught.value.exit_code == BAD_DATA
    assert caught.value.problems == ["patch_3: damaged", "and more"], "as it was, from another process too"


def test_a_reading_process_that_was_killed_is_told() -> None:
    with pytest.raises(UserError, match="data.num_workers: a reading process died .* fewer workers") as caught:
        list(batches(Numbers((), (1,)), 1))
    assert caught.value.exit_code == BAD_DATA


def test_a_reading_process_that_dies_while_the_main_one_works_is_told_by_whoever_holds_the_loop() -> None:
    """torch's handler raises in the middle of whatever the main process does."""
    with pytest.raises(UserError, match="a reading process died"), lost_readers_told("train.workers"):
        for _ in batches(Numbers((), (3,)), 1):
            time.sleep(5)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"), lost_readers_told("train.workers"):
        raise RuntimeError("a fault of ours")

    def broken() -> Iterator[int]:
        yield 1
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(next_batch(broken(), "train.workers"))
