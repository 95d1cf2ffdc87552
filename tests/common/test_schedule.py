"""Learning rates at known steps, against torch's own schedulers, and at the edges."""

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from common.schedule import warmup_then_cosine


def test_known_answers() -> None:
    """10 steps of warm-up, 101 of cosine: half-way the mean of peak and floor, a quarter-way (1 + 1/sqrt 2) / 2."""
    shares = [warmup_then_cosine(step, 111, 10, 0.1) for step in range(111)]
    assert shares[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert shares[60] == pytest.approx(0.55)
    assert shares[35] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 / np.sqrt(2)))
    assert shares[110] == pytest.approx(0.1)


@pytest.mark.parametrize(("total", "warm", "floor"), [(500, 50, 0.01), (37, 0, 0.0), (1000, 999, 0.5), (3, 1, 0.2)])
def test_shares_rise_to_the_peak_and_fall_to_the_floor(total: int, warm: int, floor: float) -> None:
    shares = np.array([warmup_then_cosine(step, total, warm, floor) for step in range(total)])
    assert shares.max() == 1
    assert shares.min() >= min(floor, 1 / max(1, warm)) - 1e-12
    assert (np.diff(shares[:warm]) > 0).all()
    assert (np.diff(shares[warm:]) < 0).all()
    if total - warm > 1:
        assert shares[-1] == pytest.approx(floor)
        assert shares[warm:].mean() == pytest.approx((1 + floor) / 2)  # the cosine's mean, by symmetry


def test_equals_torchs_schedulers() -> None:
    """They count the warm-up from another end: our step s is their step s + 1 of a warm-up from 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warm = LinearLR(optimizer, start_factor=1 / 20, total_iters=19)
    cosine = CosineAnnealingLR(optimizer, T_max=179, eta_min=0.03)
    scheduler = SequentialLR(optimizer, [warm, cosine], milestones=[20])
    for step in range(200):
        assert warmup_then_cosine(step, 200, 20, 0.03) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_shortest_runs_have_a_rate() -> None:
    assert warmup_then_cosine(0, 1, 0, 0.01) == 1
    assert [warmup_then_cosine(step, 2, 0, 0.01) for step in range(2)] == pytest.approx([1, 0.01])
    assert [warmup_then_cosine(step, 2, 1, 0.01) for step in range(2)] == [1, 1]


@pytest.mark.parametrize(("step", "total", "warm"), [(-1, 10, 2), (10, 10, 2), (0, 10, 10)])
def test_a_step_outside_the_run_is_refused(step: int, total: int, warm: int) -> None:
    with pytest.raises(AssertionError, match="step"):
        warmup_then_cosine(step, total, warm, 0.0)
