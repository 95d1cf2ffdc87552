"""Swin UNETR against the reference whose weights it loads."""

import pytest
import torch
from torch import nn

from em_segmentation.model_defs.swin_unetr import SwinUNETR, swin_unetr_key
from tests.em_segmentation.test_models import count, difference, reference


def pair(feature_size: int) -> tuple[nn.Module, SwinUNETR]:
    theirs = reference("SwinUNETR", 1, 2, feature_size=feature_size)
    ours = SwinUNETR(1, 2, feature_size, 0.0).eval()
    named = {swin_unetr_key(name): weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict({name: weight for name, weight in named.items() if name is not None})
    return theirs, ours


@pytest.mark.parametrize("size", [(32, 64, 32), (64, 32, 96)])  # windows all padded, and shrunk along some axes
def test_swin_unetr_is_the_reference(size: tuple[int, int, int]) -> None:
    theirs, ours = pair(12)
    assert count(ours) == count(theirs)
    assert difference(theirs, ours, 1, 1, *size) < 1e-5


def test_gradients_are_the_references() -> None:
    theirs, ours = pair(12)
    volume = torch.randn(1, 1, 32, 64, 32)
    target = torch.randn(1, 2, 32, 64, 32)
    for model in (theirs, ours):
        (model(volume) * target).mean().backward()
    own = dict(ours.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in own.values() if parameter.grad is not None)
    for name, parameter in theirs.named_parameters():
        key = swin_unetr_key(name)
        assert key is not None
        difference_of_gradients = (own[key].grad - parameter.grad).abs().max()
        assert difference_of_gradients < 1e-3 * max(parameter.grad.abs().max(), 0.1 * largest), name


@pytest.mark.parametrize("feature_size, millions", [(24, 15.7), (48, 62.2)])
def test_sizes_as_published(feature_size: int, millions: float) -> None:
    assert count(SwinUNETR(1, 1, feature_size, 0.0)) / 1e6 == pytest.approx(millions, abs=0.05)


def test_dropout_draws_only_in_training() -> None:
    torch.manual_seed(0)
    model = SwinUNETR(1, 1, 12, 0.3)
    volume = torch.randn(1, 1, 32, 32, 64)
    assert not torch.equal(model(volume), model(volume))
    model.eval()
    assert torch.equal(model(volume), model(volume))


def test_a_volume_that_does_not_fit_is_told() -> None:
    with pytest.raises(AssertionError, match="Expected multiples of 32"):
        SwinUNETR(1, 1, 12, 0.0)(torch.zeros(1, 1, 32, 48, 32))
    with pytest.raises(AssertionError, match="Expected a multiple of 12"):
        SwinUNETR(1, 1, 16, 0.0)
