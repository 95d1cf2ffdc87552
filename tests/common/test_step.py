"""One optimizer step: running statistics over micro-batches, precision, and the guarded, clipped update."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from common.errors import BAD_DATA, UserError
from common.parallel import process_group
from common.step import RunningStatistics, agree_on_step, guarded_update

NO_SCALER = GradScaler("cpu", enabled=False)


@pytest.fixture(autouse=True)
def group_of_one() -> Iterator[None]:
    with process_group(False):
        yield


def normed_network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    for module in (model[1], model[4]):
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.train()


def buffers_after(model: nn.Module, step: Callable[[nn.Module], None]) -> list[Tensor]:
    """The floating buffers of a copy of the model after a step."""
    copied = copy.deepcopy(model)
    step(copied)
    return [buffer for buffer in copied.buffers() if buffer.is_floating_point()]


def step_in_parts(parts: list[Tensor]) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        statistics = RunningStatistics(model)
        statistics.begin_step()
        for part in parts:
            model(part)
            statistics.end_micro_batch()
        statistics.end_step(len(parts))

    return step


def one_after_another(parts: list[Tensor]) -> Callable[[nn.Module], None]:
    """What torch does by itself."""

    def step(model: nn.Module) -> None:
        for part in parts:
            model(part)

    return step


def test_running_statistics_are_the_mean_over_micro_batches() -> None:
    model, (one, two) = normed_network(), torch.randn(2, 4, 2, 8, 8)
    found = buffers_after(model, step_in_parts([one, two]))
    alone = [buffers_after(model, one_after_another([part])) for part in (one, two)]
    for buffer, first, second in zip(found, *alone, strict=True):
        torch.testing.assert_close(buffer, (first + second) / 2)
    both = buffers_after(model, one_after_another([one, two]))
    assert not torch.allclose(found[0], both[0]), "left alone, a buffer moves twice"
    torch.testing.assert_close(buffers_after(model, step_in_parts([two, one])), found)


def test_the_first_layers_mean_is_that_of_the_whole_batch() -> None:
    """Means of equal parts average to the whole's, so the layout does not show."""
    model, batch = normed_network(), torch.randn(12, 2, 8, 8)
    whole = buffers_after(model, step_in_parts([batch]))[0]
    for parts in (2, 3, 12):
        torch.testing.assert_close(buffers_after(model, step_in_parts(list(batch.chunk(parts))))[0], whole)
    expected = 0.9 * model[1].running_mean + 0.1 * model[0](batch).mean((0, 2, 3))
    torch.testing.assert_close(whole, expected.detach())


def test_several_steps_of_one_micro_batch_equal_plain_batch_norm_bit_for_bit() -> None:
    model, batches = normed_network(), torch.randn(3, 4, 2, 8, 8)

    def steps(copied: nn.Module) -> None:
        for batch in batches:
            step_in_parts([batch])(copied)

    found, plain = buffers_after(model, steps), buffers_after(model, one_after_another(list(batches)))
    assert all(torch.equal(buffer, own) for buffer, own in zip(found, plain, strict=True))


def test_every_micro_batch_starts_from_the_buffers_of_the_beginning() -> None:
    model, batch = normed_network(), torch.randn(4, 2, 8, 8)
    before = copy.deepcopy(model.state_dict())
    statistics = RunningStatistics(model)
    statistics.begin_step()
    model(batch)
    statistics.end_micro_batch()
    assert torch.equal(model[1].running_var, before["1.running_var"])


def test_a_network_without_buffers_needs_nothing() -> None:
    step_in_parts([torch.ones(2, 3)])(nn.Linear(3, 3))


@dataclasses.dataclass
class Stepped:
    """A parameter vector of zeros that took one guarded step of SGD with rate 1: -weights is the gradient used."""

    weights: Tensor
    norm: float


def step_with(gradient: list[float], scaler: GradScaler, max_norm: float) -> Stepped:
    model = nn.Linear(len(gradient), 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = (model.weight * torch.tensor([gradient])).sum()
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    norm = guarded_update(model, optimizer, scaler, max_norm)
    assert model.weight.grad is None, "the next step begins without gradients"
    return Stepped(model.weight.detach()[0], norm.item())


def test_a_long_gradient_is_clipped_to_the_norm_and_the_norm_before_is_returned() -> None:
    stepped = step_with([3.0, -4.0], NO_SCALER, 1.0)
    assert stepped.norm == pytest.approx(5)
    assert stepped.weights.tolist() == pytest.approx([-0.6, 0.8], rel=1e-5)


def test_a_short_gradient_is_left_alone() -> None:
    assert step_with([0.3, -0.4], NO_SCALER, 1.0).weights.tolist() == pytest.approx([-0.3, 0.4], rel=1e-7)


def test_the_norm_is_of_all_parameters_together() -> None:
    model = nn.Linear(1, 1)
    (3 * model.weight.sum() + 4 * model.bias.sum()).backward()
    assert guarded_update(model, torch.optim.SGD(model.parameters(), 0.0), NO_SCALER, 1.0).item() == pytest.approx(5)


def test_a_scaled_gradient_is_unscaled_before_it_is_clipped() -> None:
    scaler = GradScaler("cpu", init_scale=1024.0)
    stepped = step_with([3.0, -4.0], scaler, 2.5)
    assert stepped.norm == pytest.approx(5)
    assert stepped.weights.tolist() == pytest.approx([-1.5, 2.0], rel=1e-5)
    assert scaler.get_scale() == 1024


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("scaler", [NO_SCALER, GradScaler("cpu", init_scale=1.0)], ids=["unscaled", "scale 1"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_move(bad: float, scaler: GradScaler) -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    scaler.scale((model.weight * torch.tensor([bad, 1.0])).sum()).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match=f"the gradient norm is {bad}") as caught:
        guarded_update(model, torch.optim.SGD(model.parameters(), lr=1.0), scaler, 1.0)
    assert caught.value.exit_code == BAD_DATA
    assert torch.equal(model.weight, before)


def test_a_loss_scale_above_1_excuses_it_skips_the_step_and_is_halved() -> None:
    scaler = GradScaler("cpu", init_scale=65536.0)
    stepped = step_with([math.inf, 1.0], scaler, 1.0)
    assert not math.isfinite(stepped.norm)
    assert stepped.weights.tolist() == [0, 0]
    assert scaler.get_scale() == 32768


def test_a_scale_that_was_halved_in_vain_ends_the_run() -> None:
    """A loss that is really infinite must not be skipped for ever."""
    scaler = GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        step_with([math.inf], scaler, 1.0)
    with pytest.raises(UserError, match="the gradient norm is"):
        step_with([math.inf], scaler, 1.0)


def test_a_parameter_without_a_gradient_is_a_fault_unless_it_is_frozen() -> None:
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model[0].weight.sum().backward()
    with pytest.raises(AssertionError, match="Expected 2 gradients, got 1"):
        guarded_update(model, optimizer, NO_SCALER, 1.0)
    model[1].requires_grad_(False)
    guarded_update(model, optimizer, NO_SCALER, 1.0)


def test_the_mean_loss_of_a_step_and_whether_to_stop() -> None:
    assert agree_on_step(torch.tensor([1.0, 2.0, 6.0]), ["a", "b", "c"], False) == (3.0, False)
    assert agree_on_step(torch.tensor([1.0], dtype=torch.bfloat16), ["a"], True) == (1.0, True)
    tiny = agree_on_step(torch.tensor([1e8, 1.0, -1e8]), ["a", "b", "c"], False)[0]
    assert tiny == pytest.approx(1 / 3), "summed in float64"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_named(bad: float) -> None:
    with pytest.raises(UserError, match="the loss is not finite on b, d; look at these patches") as caught:
        agree_on_step(torch.tensor([1.0, bad, 2.0, bad]), ["a", "b", "c", "d"], False)
    assert caught.value.exit_code == BAD_DATA
