"""Heat-map losses against their formulas in float64, by finite differences, and at the ends of the number range."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.losses import (
    adapted_corner_net_with_logits,
    combined_focal_with_logits,
    focal_loss_with_logits,
    fuzzy_corner_net_with_logits,
    mse_with_logits,
    regression_corner_net_with_logits,
    topk_bce_with_logits,
    weighted_bce_with_logits,
)

Loss = Callable[[Tensor, Tensor], Tensor]
Cells = NDArray[np.float64]
Formula = Callable[[Cells, Cells], Cells]


def bce(p: Cells, t: Cells) -> Cells:
    return -(t * np.log(p) + (1 - t) * np.log1p(-p))


def corner(positive: Formula) -> Formula:
    """Threshold 0.65, a = 2, b = 4."""
    return lambda p, t: np.where(t >= 0.65, positive(p, t), -((1 - t) ** 4) * p**2 * np.log1p(-p))


LOSSES: dict[str, tuple[Loss, Formula]] = {
    "bce": (partial(weighted_bce_with_logits, positive_weight=0), bce),
    "weighted": (partial(weighted_bce_with_logits, positive_weight=10), lambda p, t: (1 + 10 * t) * bce(p, t)),
    "focal": (
        partial(focal_loss_with_logits, gamma=2, positive_weight=0),
        lambda p, t: np.abs(t - p) ** 2 * bce(p, t),
    ),
    "focal_weighted": (
        partial(focal_loss_with_logits, gamma=1.5, positive_weight=3),
        lambda p, t: (1 + 3 * t) * np.abs(t - p) ** 1.5 * bce(p, t),
    ),
    "combined": (
        partial(combined_focal_with_logits, alpha=2, beta=6),
        lambda p, t: -(t**6 * np.abs(t - p) ** 2 * np.log(p) + (1 - t) ** 6 * p**2 * np.log1p(-p)),
    ),
    "adapted": (
        partial(adapted_corner_net_with_logits, threshold=0.65, alpha=2, beta=4),
        corner(lambda p, t: -((1 - p) ** 2) * np.log(p)),
    ),
    "fuzzy": (
        partial(fuzzy_corner_net_with_logits, threshold=0.65, alpha=2, beta=4),
        corner(lambda p, t: -(np.abs(t - p) ** 2) * np.log(p)),
    ),
    "regression": (
        partial(regression_corner_net_with_logits, threshold=0.65, alpha=2, beta=4),
        corner(lambda p, t: -(np.abs(t - p) ** 2) * np.log1p(-np.abs(t - p))),
    ),
    "mse": (mse_with_logits, lambda p, t: (t - p) ** 2),
}
TOPK: dict[str, Loss] = {
    "top_5": partial(topk_bce_with_logits, k=5),
    "top_20_percent": partial(topk_bce_with_logits, k=0.2),
}
EVERY_LOSS: dict[str, Loss] = {name: loss for name, (loss, _) in LOSSES.items()} | TOPK


def random_cells(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Logits and targets (3, 1, 3, 4, 5) in float64; exact zeros and ones among the targets."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(3, 1, 3, 4, 5, generator=generator, dtype=torch.float64)
    t = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return x, torch.where(t < 0.3, 0, torch.where(t > 0.9, 1, t))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_formula(name: str) -> None:
    loss, formula = LOSSES[name]
    x, t = random_cells(0, 3)
    expected = formula(1 / (1 + np.exp(-x.numpy())), t.numpy()).reshape(3, -1).mean(1)
    assert loss(x, t).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert loss(x.float(), t.float()).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("k", "kept"), [(1, 1), (5, 5), (20.0, 20), (1000, 60), (0.2, 12), (0.21, 13), (0.001, 1), (0.99, 59)]
)
def test_topk_is_the_mean_of_the_largest_cells(k: float, kept: int) -> None:
    x, t = random_cells(1, 3)
    cells = bce(1 / (1 + np.exp(-x.numpy())), t.numpy()).reshape(3, -1)
    expected = np.sort(cells, axis=1)[:, -kept:].mean(1)
    assert topk_bce_with_logits(x, t, k).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradient_equals_finite_differences(name: str) -> None:
    x, t = random_cells(2, 2)
    assert torch.autograd.gradcheck(lambda logits: EVERY_LOSS[name](logits, t), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_loss_and_gradient_stay_finite_at_saturated_logits(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([-1e4, -1000.0, -100, -20, 0, 20, 100, 1000, 1e4])
    x = logits.repeat(5).reshape(1, 1, 5, 3, 3).to(dtype).requires_grad_()
    t = torch.tensor([0, 1e-6, 0.5, 0.99, 1]).repeat_interleave(9).reshape(1, 1, 5, 3, 3)
    loss = EVERY_LOSS[name](x, t)
    loss.sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss).all() and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ["bce", "weighted", "focal", "combined", "adapted", "fuzzy", "regression"])
def test_a_missed_peak_is_still_pulled_up_where_its_probability_rounds_to_zero(name: str) -> None:
    """At x = -100 a probability clamped to 1e-3 has no gradient; here it is that of -log p: about -1 per cell."""
    x = torch.full((1, 1, 1, 1, 1), -100.0, requires_grad=True)
    EVERY_LOSS[name](x, torch.ones_like(x)).sum().backward()
    assert x.grad is not None and float(x.grad) <= -0.99


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_loss_does_not_depend_on_the_order_of_cells_and_samples(name: str) -> None:
    x, t = random_cells(3, 3)
    loss = EVERY_LOSS[name]
    cells = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = [a.flatten(1)[:, cells].reshape(a.shape).flip(0) for a in (x, t)]
    assert torch.allclose(loss(*moved), loss(x, t).flip(0), rtol=1e-12)
    assert loss(x, t).shape == (3,)


@pytest.mark.parametrize("name", LOSSES)
def test_mean_over_samples_is_the_mean_over_cells(name: str) -> None:
    x, t = random_cells(4, 3)
    loss = EVERY_LOSS[name]
    assert float(loss(x, t).mean()) == pytest.approx(float(loss(x.reshape(1, 1, 9, 4, 5), t.reshape(1, 1, 9, 4, 5))))


def test_special_cases_meet() -> None:
    x, t = random_cells(5, 3)
    plain = weighted_bce_with_logits(x, t, 0)
    assert torch.allclose(focal_loss_with_logits(x, t, 0, 0), plain)
    assert torch.allclose(focal_loss_with_logits(x, t, 0, 7), weighted_bce_with_logits(x, t, 7))
    assert torch.allclose(topk_bce_with_logits(x, t, 10_000), plain)
    hard = (t >= 0.65).double()
    assert torch.allclose(
        adapted_corner_net_with_logits(x, hard, 0.65, 2, 4), regression_corner_net_with_logits(x, hard, 0.65, 2, 4)
    )
    assert torch.allclose(adapted_corner_net_with_logits(x, hard, 0.65, 2, 4), focal_loss_with_logits(x, hard, 2, 0))


def test_only_the_fuzzy_form_forgives_a_saturated_peak() -> None:
    x, t = torch.full((1, 1, 1, 1, 1), 30.0), torch.full((1, 1, 1, 1, 1), 0.7)
    assert float(fuzzy_corner_net_with_logits(x, t, 0.65, 2, 4)) < 1e-6
    assert float(regression_corner_net_with_logits(x, t, 0.65, 2, 4)) == pytest.approx(-0.09 * np.log(0.7), rel=1e-5)
    at_target = torch.full_like(x, float(np.log(0.7 / 0.3)))
    assert float(regression_corner_net_with_logits(at_target, t, 0.65, 2, 4)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [0, -1, 2.5, float("nan"), float("inf")])
def test_a_wrong_k_is_refused(k: float) -> None:
    with pytest.raises(UserError, match="top-k BCE"):
        topk_bce_with_logits(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), k)


def test_exponents_without_a_finite_gradient_are_refused() -> None:
    x = torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(UserError, match="gamma = 0.5"):
        focal_loss_with_logits(x, x, 0.5, 0)
    with pytest.raises(UserError, match="alpha = -1"):
        combined_focal_with_logits(x, x, -1, 6)
    with pytest.raises(UserError, match="beta = -2"):
        adapted_corner_net_with_logits(x, x, 0.65, 2, -2)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        mse_with_logits(torch.zeros(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 1))
