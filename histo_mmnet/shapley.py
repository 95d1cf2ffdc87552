"""Exact Shapley values of four magnifications: what each adds to a figure, averaged over every order in which they come."""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def shapley_values(of_sets: Floats) -> Floats:
    """Values of 2^k sets (..., 2^k), set s holding player m where bit m of s is 1 -> Shapley values (..., k).

    phi_m = sum over sets S without m of |S|! (k - |S| - 1)! / k! (v(S + m) - v(S)) (Shapley 1953). They sum to the value of
    all less that of none.
    """
    number = of_sets.shape[-1]
    players = number.bit_length() - 1
    assert number == 2**players, f"Expected a power of two of sets, got {number}"
    values = np.zeros((*of_sets.shape[:-1], players))
    for player in range(players):
        for own in range(number):
            if own >> player & 1:
                continue
            size = own.bit_count()
            weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            values[..., player] += weight * (of_sets[..., own | 1 << player] - of_sets[..., own])
    return values
