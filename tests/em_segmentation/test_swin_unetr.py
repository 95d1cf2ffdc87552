"""Swin UNETR against the reference whose weights it loads, and its windows against plain attention."""

import pytest
import torch
from torch import Tensor, nn

from em_segmentation.model_defs.swin_unetr import WINDOW, SwinUNETR, Windows, swin_unetr_key
from em_segmentation.model_defs.window_attention import window_attention
from tests.em_segmentation.test_models import count, difference, reference

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("size", [(7, 14, 21), (4, 8, 20), (3, 5, 2), (9, 7, 16)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_join_to_what_was_split(size: tuple[int, int, int], shifted: bool) -> None:
    windows = Windows(size, shifted, CPU)
    volume = torch.randn(2, *size, 5)
    cells = windows.split(volume)
    assert cells.shape[1] <= WINDOW**3 and len(cells) == 2 * len(windows.kinds)
    assert torch.equal(windows.join(cells), volume)


def test_the_mask_forbids_exactly_what_the_cyclic_shift_brought_together() -> None:
    size = (9, 7, 16)  # 14 and 21 cells after padding; no shift along y
    windows = Windows(size, True, CPU)
    padded = [14, 7, 21]
    place = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"), -1)[None] + 1
    cells = windows.split(place) - 1  # where each cell comes from; -1 in the padding
    for kind, window in zip(windows.kinds.tolist(), cells, strict=True):
        real = (window >= 0).all(1)
        far = (window[:, None] - window[None]).abs().amax(-1) >= WINDOW
        mask = windows.masks[kind] if kind >= 0 else torch.zeros(len(window), len(window))
        assert torch.equal((mask < 0)[real][:, real], far[real][:, real])
    assert windows.counts == [n // WINDOW for n in padded]


def plain_attention(qkv: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias
    scores = scores + torch.stack([masks[kind] * (kind >= 0) for kind in kinds])[:, None]
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_window_attention_in_chunks_is_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("em_segmentation.model_defs.window_attention.CHUNK", 2 * 4 * 11 * 11)  # two windows at a time
    torch.manual_seed(0)
    qkv = torch.randn(5, 11, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 11, 11, dtype=torch.float64, requires_grad=True)
    masks = -3 * torch.rand(2, 11, 11, dtype=torch.float64)
    kinds = torch.tensor([-1, 0, 1, -1, 1])
    expected, found = (attend(qkv, bias, masks, kinds) for attend in (plain_attention, window_attention))
    torch.testing.assert_close(found, expected)
    wanted = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(expected, (qkv, bias), wanted), torch.autograd.grad(found, (qkv, bias), wanted), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


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
