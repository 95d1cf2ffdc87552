"""Losses against scikit-learn and written out; mining against loops over all triplets."""

import itertools

import pytest
import sklearn.metrics
import torch
from torch import Tensor

from common.metrics.retrieval import jaccard
from ct_retrieval.losses import bce_loss, hybrid_loss, micro_f1_loss, sample_f1_loss, triplet_losses
from ct_retrieval.mining import jaccard_of, mine, mine_graded, pairs_of, squared_distances, with_no_finding
from data.phantoms.ct_settings import CLASSES

MARGIN = 0.2
COMPATIBLE = {
    0: [1, 2, 3, 4, 5, 6, 7],
    1: [0, 2, 3, 6],
    2: [0, 1, 3, 4],
    3: [0, 1, 2, 5],
    4: [0, 2],
    5: [0, 3],
    6: [0, 1],
    7: [0],
}


def drawn(seed: int, n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    labels = torch.tensor(CLASSES)[torch.randint(8, (n,))]
    labels[torch.rand(n, 3) < 0.05] = 9
    return torch.nn.functional.normalize(torch.randn(n, 8), dim=1), labels


@pytest.mark.parametrize("seed", range(5))
def test_hard_decisions_give_scikit_learns_f1(seed: int) -> None:
    torch.manual_seed(seed)
    labels, decisions = torch.randint(2, (20, 4)), torch.randint(2, (20, 4))
    logits = (decisions * 2 - 1) * 40.0
    micro = sklearn.metrics.f1_score(labels, decisions, average="micro")
    assert 1 - micro_f1_loss(logits, labels) == pytest.approx(micro, abs=1e-6)
    own = sklearn.metrics.f1_score(labels, decisions, average="samples", zero_division=0)
    assert 1 - sample_f1_loss(logits, labels) == pytest.approx(own, abs=1e-6)


def test_known_defect_2_micro_is_pooled() -> None:
    """The original's was the mean of each sample's own."""
    logits, labels = torch.tensor([[9.0, -9, -9], [9, 9, 9]]), torch.tensor([[1, 0, 0], [0, 0, 1]])
    assert micro_f1_loss(logits, labels) == pytest.approx(1 - 2 * 2 / (2 * 2 + 2), abs=1e-3)
    assert sample_f1_loss(logits, labels) == pytest.approx(1 - (1 + 0.5) / 2, abs=1e-3)


def test_known_defect_18_what_is_unknown_has_no_say() -> None:
    """The original took 9 for 0."""
    torch.manual_seed(0)
    labels = torch.tensor([[1, 9, 0], [9, 9, 1], [9, 9, 9]])
    logits = torch.randn(3, 3, requires_grad=True)
    for loss in (bce_loss(logits, labels), micro_f1_loss(logits, labels), hybrid_loss(logits, labels, 0.5, 0.5)):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert (gradient[labels == 9] == 0).all() and (gradient[labels != 9] != 0).all()
    assert bce_loss(logits[2:], labels[2:]) == 0 and torch.isfinite(micro_f1_loss(logits[2:], labels[2:]))


def test_compatibility_is_the_originals_table() -> None:
    same, disjoint = pairs_of(torch.tensor(CLASSES))
    assert not same.any()
    assert {k: disjoint[k].nonzero()[:, 0].tolist() for k in range(8)} == COMPATIBLE
    assert with_no_finding(torch.tensor([[0, 0, 0], [9, 0, 0], [9, 1, 0]]))[:, 0].tolist() == [1, 9, 0]


def all_triplets(embeddings: Tensor, labels: Tensor) -> dict[tuple[int, int], dict[int, float]]:
    """Losses of all compatible triplets, by loops: (anchor, positive) -> negative -> loss."""
    same, disjoint = pairs_of(labels)
    found: dict[tuple[int, int], dict[int, float]] = {}
    for a, p, n in itertools.product(range(len(labels)), repeat=3):
        if same[a, p] and disjoint[a, n]:
            loss = float(
                (embeddings[a] - embeddings[p]).pow(2).sum() - (embeddings[a] - embeddings[n]).pow(2).sum() + MARGIN
            )
            if loss > 1e-6:
                found.setdefault((a, p), {})[n] = loss
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mining", ["hardest", "random_hard", "semi_hard"])
def test_mined_triplets_are_those_of_loops(seed: int, mining: str) -> None:
    embeddings, labels = drawn(seed, 24)
    found = mine(embeddings, labels, MARGIN, mining, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    possible = all_triplets(embeddings, labels)
    pairs = list(zip(found.anchor.tolist(), found.positive.tolist(), strict=True))
    assert sorted(pairs) == sorted(possible)
    losses = triplet_losses(
        embeddings[found.anchor], embeddings[found.positive], embeddings[found.negative], found.margin
    )
    for pair, negative, loss in zip(pairs, found.negative.tolist(), losses.tolist(), strict=True):
        assert loss == pytest.approx(possible[pair][negative], abs=1e-5)
        if mining == "hardest":
            assert loss == pytest.approx(max(possible[pair].values()), abs=1e-5)
        if mining == "semi_hard" and any(value < MARGIN - 1e-6 for value in possible[pair].values()):
            assert loss < MARGIN


def test_known_defect_7_a_batch_of_one_class_has_no_triplet() -> None:
    embeddings, _ = drawn(0, 6)
    found = mine(embeddings, torch.tensor([[1, 0, 0]] * 6), MARGIN, "hardest", torch.Generator())
    assert len(found.anchor) == 0
    assert len(mine_graded(embeddings, torch.tensor([[1, 0, 0]] * 6), MARGIN).anchor) == 0


@pytest.mark.parametrize("seed", range(4))
def test_graded_triplets_are_the_hardest_of_loops(seed: int) -> None:
    embeddings, labels = drawn(seed, 16)
    alike, distance = jaccard_of(labels), squared_distances(embeddings)
    found = mine_graded(embeddings, labels, MARGIN)
    expected: dict[tuple[int, int], float] = {}
    for a, p, n in itertools.product(range(16), repeat=3):
        more = float(alike[a, p] - alike[a, n])
        loss = float(distance[a, p] - distance[a, n]) + MARGIN * more
        if more > 0 and a not in (p, n) and loss > 0:
            expected[a, p] = max(expected[a, p], loss) if (a, p) in expected else loss
    losses = triplet_losses(
        embeddings[found.anchor], embeddings[found.positive], embeddings[found.negative], found.margin
    )
    got = dict(zip(zip(found.anchor.tolist(), found.positive.tolist(), strict=True), losses.tolist(), strict=True))
    assert got.keys() == expected.keys()
    assert all(got[key] == pytest.approx(expected[key], abs=1e-5) for key in got)


def test_jaccard_of_the_miner_is_that_of_the_measure() -> None:
    labels = torch.tensor(CLASSES)
    torch.testing.assert_close(jaccard_of(labels).double(), torch.tensor(jaccard(labels.numpy(), labels.numpy())))
