"""Graded retrieval: textbook values, an ideal order scores 1, chance is exact, a patient never answers itself."""

import itertools

import numpy as np
import pytest
import sklearn.metrics

from common.metrics.retrieval import NAMES, Items, exact_nearest, jaccard, mean_figures, of_query, retrieval_figures

KS = (1, 3, 5, 10)


def drawn(seed: int, n: int, labels: int, patients: int, dimensions: int) -> tuple[Items, np.ndarray]:
    random = np.random.default_rng(seed)
    vectors = (random.random((n, labels)) < 0.4).astype(np.int64)
    vectors[random.random((n, labels)) < 0.05] = 9
    names = [f"p{k}" for k in random.integers(patients, size=n)]
    points = random.normal(size=(n, dimensions)).astype(np.float32)
    return Items(vectors, names), points / np.linalg.norm(points, axis=1, keepdims=True)


def test_jaccard_of_label_vectors() -> None:
    vectors = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [9, 1, 0], [9, 9, 9]])
    found = jaccard(vectors, vectors)
    assert found[0, 1] == 0.5 and found[0, 0] == 1 and found[2, 2] == 1 and found[0, 2] == 0
    assert found[1, 3] == 1, "of what both know"
    assert np.isnan(found[4]).all() and np.isnan(found[:, 4]).all()


def by_hand(relevance: np.ndarray, order: np.ndarray, k: int) -> dict[str, float]:
    """The formulas, item by item."""
    got, best = relevance[order][:k], np.sort(relevance)[::-1][:k]

    def average(values: np.ndarray) -> float:
        return sum(v * values[: i + 1].mean() for i, v in enumerate(values))

    def gain(values: np.ndarray) -> float:
        return sum(v / np.log2(i + 2) for i, v in enumerate(values))

    precision, recall = got.sum() / k, got.sum() / relevance.sum()
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "precision": precision,
        "recall": recall,
        "map": average(got) / average(best),
        "ndcg": gain(got) / gain(best),
        "f1": f1,
    }


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_the_formulas(seed: int) -> None:
    items, points = drawn(seed, 40, 3, 15, 6)
    found = retrieval_figures(items, items, exact_nearest(points, points), KS, 7)
    relevance = jaccard(items.labels, items.labels)
    for query in range(40):
        others = [
            k for k in range(40) if items.patients[k] != items.patients[query] and np.isfinite(relevance[query, k])
        ]
        if not others or relevance[query, others].sum() == 0:
            assert all(np.isnan(found.figures[name][query]).all() for name in NAMES)
            continue
        order = np.argsort(-(points[others] @ points[query]), kind="stable")
        for j, k in enumerate(KS):
            expected = by_hand(relevance[query, others], order, k)
            for name in NAMES:
                assert found.figures[name][query, j] == pytest.approx(expected[name], abs=1e-9), (query, name, k)


def test_an_ideal_order_scores_one() -> None:
    """Also where the best is alike by half only."""
    codes, counts = np.array([0.5, 0.25, 0.0]), np.array([3, 4, 90])
    ranked = np.repeat(codes, counts)[:10]
    figures = of_query(codes, counts, ranked, KS)
    assert figures["ndcg"][0] == pytest.approx(1) and figures["map"][0] == pytest.approx(1)


def test_one_hit_at_the_top_is_not_perfect() -> None:
    """Division by the relevant items that were found would say 1."""
    figures = of_query(np.array([1.0, 0.0]), np.array([5, 95]), np.array([1.0, *[0.0] * 9]), (10,))
    assert figures["map"][0][0] == pytest.approx(1 / 5)


def test_binary_relevance_gives_scikit_learns_ndcg() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        relevance, score = (random.random(30) < 0.3).astype(float), random.normal(size=30)
        if not relevance.any():
            continue
        order = np.argsort(-score)
        codes, counts = np.unique(relevance, return_counts=True)
        found = of_query(codes, counts, relevance[order], (10,))
        assert found["ndcg"][0][0] == pytest.approx(sklearn.metrics.ndcg_score(relevance[None], score[None], k=10))


def test_chance_is_the_mean_over_all_orders() -> None:
    relevance = np.array([1.0, 0.5, 0.5, 0.0, 0.25, 0.0])
    codes, counts = np.unique(relevance, return_counts=True)
    ks = (1, 2, 4, 6)
    orders = [of_query(codes, counts, relevance[list(order)], ks) for order in itertools.permutations(range(6))]
    for name in NAMES:
        mean = np.mean([found[name][0] for found in orders], 0)
        np.testing.assert_allclose(orders[0][name][1], mean, atol=1e-12, err_msg=name)


def test_a_patient_never_answers_itself() -> None:
    """Embeddings that find only the patient are worth no more than chance."""
    random = np.random.default_rng(1)
    patient = np.repeat(np.arange(60), 4)
    own = np.eye(60, dtype=np.float32)[patient]
    labels = (random.random((60, 3)) < 0.5).astype(np.int64)[patient]
    items = Items(labels, [f"p{k}" for k in patient])
    found = mean_figures(retrieval_figures(items, items, exact_nearest(own, own), (10,), 64), 0.95, 200, 0)
    assert abs(found["map_at_10"].estimate - found["chance_map_at_10"].estimate) < 0.12


def test_random_embeddings_are_at_chance_and_labels_themselves_far_above() -> None:
    items, points = drawn(3, 1500, 3, 1500, 8)
    found = mean_figures(retrieval_figures(items, items, exact_nearest(points, points), KS, 256), 0.95, 200, 0)
    for name, k in itertools.product(NAMES, KS):
        assert found[f"{name}_at_{k}"].estimate == pytest.approx(found[f"chance_{name}_at_{k}"].estimate, abs=0.02), (
            name
        )
    known = Items(np.where(items.labels == 9, 0, items.labels), items.patients)
    told = np.concatenate([known.labels * 2.0 - 1, np.zeros((1500, 1))], 1).astype(np.float32)
    best = mean_figures(retrieval_figures(known, known, exact_nearest(told, told), KS, 256), 0.95, 200, 0)
    assert best["map_at_10"].estimate > 0.99 and best["ndcg_at_10"].estimate > 0.99
    interval = found["map_at_10"]
    assert interval.low < interval.estimate < interval.high


def test_fewer_items_than_asked_for() -> None:
    items = Items(np.array([[1, 0], [1, 0], [0, 1]]), ["a", "b", "c"])
    points = np.eye(3, dtype=np.float32)
    found = retrieval_figures(items, items, exact_nearest(points, points), (1, 20), 2)
    assert found.figures["recall"][0, 1] == 1 and found.figures["precision"][0, 1] == pytest.approx(1 / 20)
    assert found.chance["recall"][0, 1] == 1 and np.isnan(found.figures["map"][2]).all()
