"""Addressed randomness: any draw is named by a purpose and numbers, so it can be replayed without its past."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def random_for(purpose: str, *numbers: int) -> np.random.Generator:
    """A fresh generator named by its purpose and numbers; equal names give equal draws on every machine and rank.

    The name is hashed as written, so no two names share a stream: not "ab" and ("a", 98), not 2**32 and (0, 1).
    """
    name = repr((purpose, [int(number) for number in numbers]))
    return np.random.default_rng(np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Reseed torch's generators (dropout, drop path) for one micro-batch, counted within its step over all ranks."""
    torch.manual_seed(int(random_for("dropout", seed, step, micro_batch).integers(2**63)))


def epoch_and_index(position: int, num_samples: int, seed: int) -> tuple[int, int]:
    """The epoch and the sample of a run's position: every epoch is a fresh permutation of all samples."""
    assert position >= 0 and num_samples > 0, f"Expected position >= 0 of > 0 samples, got {position} of {num_samples}"
    epoch, offset = divmod(position, num_samples)
    return epoch, int(random_for("epoch", seed, epoch).permutation(num_samples)[offset])


def micro_batches(
    first_step: int, last_step: int, batch_size: int, micro_batch_size: int, rank: int, num_ranks: int
) -> Iterator[list[int]]:
    """One rank's share of the run's positions, micro-batch by micro-batch, from any optimizer step to the last.

    A step covers positions [step * batch_size, (step + 1) * batch_size); rounds of num_ranks micro-batches are dealt
    out rank after rank, so the samples of a step do not depend on how many processes share it.
    """
    assert batch_size % (micro_batch_size * num_ranks) == 0, (
        f"Expected a batch of {batch_size} to divide into {num_ranks} ranks x {micro_batch_size}"
    )
    rounds = batch_size // (micro_batch_size * num_ranks)
    for step in range(first_step, last_step):
        for round_of_step in range(rounds):
            start = step * batch_size + (round_of_step * num_ranks + rank) * micro_batch_size
            yield list(range(start, start + micro_batch_size))
