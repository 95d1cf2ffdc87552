"""Windows of cells against what they must hold, and attention inside them against plain attention."""

import math

import pytest
import torch
from torch import Tensor

from common.attention import Windows, relative_positions, window_attention

CPU = torch.device("cpu")
EDGE = 7


@pytest.mark.parametrize("size", [(7, 14, 21), (4, 8, 20), (3, 5, 2), (9, 7, 16), (9, 15), (3, 8)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shrinks", [False, True])
def test_windows_join_to_what_was_split(size: tuple[int, ...], shifted: bool, shrinks: bool) -> None:
    windows = Windows(size, (EDGE,) * len(size), shifted, shrinks, CPU)
    volume = torch.randn(2, *size, 5)
    cells = windows.split(volume)
    edges = [min(EDGE, n) if shrinks else EDGE for n in size]
    assert cells.shape[1] == math.prod(edges) and len(cells) == 2 * len(windows.kinds)
    assert torch.equal(windows.join(cells), volume)


def test_the_mask_forbids_exactly_what_the_cyclic_shift_brought_together() -> None:
    size = (9, 7, 16)  # 14 and 21 cells after padding; no shift along y
    windows = Windows(size, (EDGE,) * 3, True, True, CPU)
    padded = [14, 7, 21]
    place = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"), -1)[None] + 1
    cells = windows.split(place) - 1  # where each cell comes from; -1 in the padding
    for kind, window in zip(windows.kinds.tolist(), cells, strict=True):
        real = (window >= 0).all(1)
        far = (window[:, None] - window[None]).abs().amax(-1) >= EDGE
        mask = windows.masks[kind] if kind >= 0 else torch.zeros(len(window), len(window))
        assert torch.equal((mask < 0)[real][:, real], far[real][:, real])
    assert windows.counts == [n // EDGE for n in padded]


def plain_attention(qkv: Tensor, bias: Tensor, masks: Tensor, kinds: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias
    scores = scores + torch.stack([masks[kind] * (kind >= 0) for kind in kinds])[:, None]
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_window_attention_in_chunks_is_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.attention.CHUNK", 2 * 4 * 11 * 11)  # two windows at a time
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
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_relative_positions_number_the_offsets_between_cells() -> None:
    number = relative_positions((2, 3))
    assert number.shape == (6, 6) and number.min() == 0 and number.max() == 14
    assert (number.diagonal() == 7).all()
    assert number[0, 5] == 0 and number[5, 0] == 14  # (0, 0) - (1, 2) is the least offset
    assert number[1, 0] == 8 and number[3, 0] == 12
