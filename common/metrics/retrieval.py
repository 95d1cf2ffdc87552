"""Graded retrieval of items with several labels: precision, recall, average precision, NDCG, F1 at k, and their exact chance.

An item is as relevant to a query as their label vectors are alike: the Jaccard index of the labels that both know. Whoever asks
is never answered with the same patient's items. Everything but the order of items follows from the distinct label vectors, of
which there are few, so that memory does not grow with queries times items.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from common.metrics.intervals import Interval, bootstrap_intervals

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
UNKNOWN = 9
NAMES = ("precision", "recall", "map", "ndcg", "f1")


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """What is asked for, or searched."""

    labels: Ints  # (n, c): 0, 1, or 9 where unknown
    patients: Sequence[str]  # n names


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """Figures of every query at every k; NaN for queries to which nothing is relevant."""

    ks: tuple[int, ...]
    figures: dict[str, Floats]  # name -> (queries, len(ks))
    chance: dict[str, Floats]  # the same, expected of a random order
    patients: Sequence[str]  # of the queries
    labels: Ints  # (queries, c)


def jaccard(one: Ints, other: Ints) -> Floats:
    """Label vectors (n, c), (m, c) -> their Jaccard index (n, m), of labels that both know; 1 for two without any label.

    NaN where nothing is known of both.
    """
    known = (one[:, None] != UNKNOWN) & (other[None] != UNKNOWN)
    both = (known & (one[:, None] == 1) & (other[None] == 1)).sum(2)
    either = (known & ((one[:, None] == 1) | (other[None] == 1))).sum(2)
    found = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return np.asarray(np.where(known.any(2), found, np.nan), float)


Nearest = Callable[[Ints, npt.NDArray[np.bool_], int], Ints]  # see retrieval_figures


def retrieval_figures(queries: Items, items: Items, nearest: Nearest, ks: tuple[int, ...], rows: int) -> Retrieval:
    """Figures at each k of all queries.

    nearest(numbers (r,), excluded (r, items) bool, k) -> items (r, k) in order, best first, none that is excluded; -1 where
    there are fewer. rows: queries at once, so that memory is rows x items bytes. Items of the query's patient, and those of
    which nothing is known beside it, are excluded.
    """
    assert len(queries.labels) == len(queries.patients) and len(items.labels) == len(items.patients)
    codes, code_of = np.unique(items.labels, axis=0, return_inverse=True)
    query_codes, query_code_of = np.unique(queries.labels, axis=0, return_inverse=True)
    relevance = jaccard(query_codes, codes)  # (distinct queries, distinct items)
    names = {name: number for number, name in enumerate(dict.fromkeys([*items.patients, *queries.patients]))}
    item_patient = np.array([names[name] for name in items.patients], np.int64)
    query_patient = np.array([names[name] for name in queries.patients], np.int64)
    by_patient = np.argsort(item_patient, kind="stable")
    starts = np.searchsorted(item_patient[by_patient], np.arange(len(names) + 1))
    counts = np.bincount(code_of, minlength=len(codes))
    shape = (len(query_patient), len(ks))
    figures, chance = ({name: np.full(shape, np.nan) for name in NAMES} for _ in range(2))
    for first in range(0, len(query_patient), rows):
        own = np.arange(first, min(first + rows, len(query_patient)))
        of_codes = relevance[query_code_of[own]]  # (r, codes)
        excluded = np.isnan(of_codes)[:, code_of] | (item_patient[None] == query_patient[own, None])
        found = nearest(own, excluded, max(ks))
        for row, query in enumerate(own.tolist()):
            mine = by_patient[starts[query_patient[query]] : starts[query_patient[query] + 1]]
            left = counts - np.bincount(code_of[mine], minlength=len(codes))
            ranked = found[row][found[row] >= 0]
            one = of_query(of_codes[row], left, of_codes[row][code_of[ranked]], ks)
            for name in NAMES:
                figures[name][query], chance[name][query] = one[name]
    return Retrieval(ks, figures, chance, queries.patients, queries.labels)


def of_query(of_codes: Floats, counts: Ints, ranked: Floats, ks: tuple[int, ...]) -> dict[str, tuple[Floats, Floats]]:
    """Figures of one query and what chance gives, each (ks,).

    of_codes: relevance of each distinct label vector, NaN where unknown; counts: items that have it; ranked: relevance of the
    items found, best first. With J_i the i-th relevance, J*_i that of an ideal order, n items and T = sum of all J:
    precision sum J_i / k; recall sum J_i / T; average precision sum J_i P_i / sum J*_i P*_i with P_i the mean of the first i,
    for relevances of 0 and 1 the textbook's division by min(k, relevant items); NDCG with gains J and discounts
    1 / log2(i + 1) (Jarvelin & Kekalainen 2002); F1 the harmonic mean of precision and recall.
    """
    known = ~np.isnan(of_codes) & (counts > 0)
    values, numbers = of_codes[known], counts[known]
    total, n = float(values @ numbers), int(numbers.sum())
    nothing = {name: (np.full(len(ks), np.nan), np.full(len(ks), np.nan)) for name in NAMES}
    if total == 0:
        return nothing
    largest = max(ks)
    order = np.argsort(-values, kind="stable")
    ideal = np.repeat(values[order], np.minimum(numbers[order], largest))[:largest]
    ranks = np.arange(1, largest + 1)
    found = np.pad(ranked[:largest], (0, largest - len(ranked[:largest])))
    ideal = np.pad(ideal, (0, largest - len(ideal)))
    discount = 1 / np.log2(ranks + 1)
    mean = total / n
    squares = float(values**2 @ numbers)
    pairs = (total**2 - squares) / (n * (n - 1)) if n > 1 else 0.0  # mean of J J' of two items
    there = ranks <= n
    at = np.array(ks) - 1
    sums = np.cumsum(found)
    average = np.cumsum(found * sums / ranks)
    best = np.cumsum(ideal * np.cumsum(ideal) / ranks)
    expected = np.cumsum(np.where(there, (squares / n + (ranks - 1) * pairs) / ranks, 0))
    gain, best_gain = np.cumsum(found * discount), np.cumsum(ideal * discount)
    k = np.array(ks, float)
    drawn = np.minimum(k, n)  # of n items a random order gives at most n
    return {
        "precision": (sums[at] / k, mean * drawn / k),
        "recall": (sums[at] / total, drawn / n),
        "map": (average[at] / best[at], expected[at] / best[at]),
        "ndcg": (gain[at] / best_gain[at], mean * np.cumsum(np.where(there, discount, 0))[at] / best_gain[at]),
        "f1": (2 * sums[at] / (total + k), 2 * mean * drawn / (total + k)),
    }


def mean_figures(retrieval: Retrieval, confidence: float, num_resamples: int, seed: int) -> dict[str, Interval]:
    """Means over queries, called map_at_10 and chance_map_at_10, with intervals over patients drawn with replacement."""
    names = [(name, j) for name in NAMES for j in range(len(retrieval.ks))]
    values = np.stack(
        [table[name][:, j] for table in (retrieval.figures, retrieval.chance) for name, j in names], 1
    )  # (queries, figures)
    number = np.unique(np.array(retrieval.patients, object), return_inverse=True)[1]
    defined = np.isfinite(values)
    sums, counts = np.zeros((number.max() + 1, values.shape[1])), np.zeros((number.max() + 1, values.shape[1]))
    np.add.at(sums, number, np.where(defined, values, 0))
    np.add.at(counts, number, defined)

    def means(drawn: Ints) -> list[float]:
        with np.errstate(invalid="ignore"):
            found = sums[drawn].sum(0) / counts[drawn].sum(0)
        return [float(v) for v in found]

    found = bootstrap_intervals(means, len(sums), num_resamples, confidence, seed)
    titles = [f"{word}{name}_at_{retrieval.ks[j]}" for word in ("", "chance_") for name, j in names]
    return dict(zip(titles, found, strict=True))


def exact_nearest(queries: npt.NDArray[np.float32], items: npt.NDArray[np.float32]) -> Nearest:
    """The search of retrieval_figures by inner product of embeddings (n, d), (m, d)."""

    def nearest(numbers: Ints, excluded: npt.NDArray[np.bool_], k: int) -> Ints:
        similarity = queries[numbers] @ items.T
        similarity[excluded] = -np.inf
        k = min(k, similarity.shape[1])
        some = np.argpartition(-similarity, k - 1, 1)[:, :k]
        value = np.take_along_axis(similarity, some, 1)
        order = np.lexsort((some, -value), 1)
        found = np.take_along_axis(some, order, 1)
        return np.where(np.isfinite(np.take_along_axis(similarity, found, 1)), found, -1)

    return nearest
