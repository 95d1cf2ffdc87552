"""Windows of cells against what they must hold, and attention inside them against plain attention."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from common.attention import Windows, fused_window_attention, relative_positions, window_attention

CPU = torch.device("cpu")
EDGE = 7


@pytest.mark.parametrize("size", [(7, 14, 21), (4, 8, 20), (3, 5, 2), (9, 7, 16), (9, 15), (3, 8)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shrinks", [False, True])
def test_windows_join_to_what_was_split(size: tuple[int, ...], shifted: bool, shrinks: bool) -> None:
    windows = Windows(size, (EDGE,) * len(size), shifted, shrinks, False, CPU)
    volume = torch.randn(2, *size, 5)
    cells = windows.split(volume)
    edges = [min(EDGE, n) if shrinks else EDGE for n in size]
    assert cells.shape[1] == math.prod(edges) and len(cells) == 2 * len(windows.kinds)
    assert torch.equal(windows.join(cells), volume)


@pytest.mark.parametrize(
    ("size", "window"), [((14, 7, 21), (7, 7, 7)), ((13, 20), (7, 7)), ((10, 9, 8), (4, 4, 4)), ((9, 13), (3, 5))]
)
def test_the_mask_forbids_exactly_what_the_cyclic_shift_brought_together(
    size: tuple[int, ...], window: tuple[int, ...]
) -> None:
    """Cells of one window are neighbours, or the shift carried one of them from the map's other end."""
    windows = Windows(size, window, True, True, False, CPU)
    place = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"), -1)[None] + 1
    cells = windows.split(place) - 1  # where each cell comes from; -1 in the padding
    forbidden = 0
    for kind, one in zip(windows.kinds.tolist(), cells, strict=True):
        real = (one >= 0).all(1)
        far = ((one[:, None] - one[None]).abs() >= torch.tensor(window)).any(-1)
        mask = windows.masks[kind] if kind >= 0 else torch.zeros(len(one), len(one))
        assert torch.equal((mask < 0)[real][:, real], far[real][:, real])
        forbidden += int(far[real][:, real].sum())
    assert forbidden > 0


@pytest.mark.parametrize(("size", "window"), [((6, 10), (3, 5)), ((4, 6, 5), (2, 3, 5))])
def test_shifted_windows_hold_the_cells_half_a_window_further_on(
    size: tuple[int, ...], window: tuple[int, ...]
) -> None:
    number = torch.arange(math.prod(size)).view(1, *size, 1)
    rolled = number[0, ..., 0]
    for axis, (edge, n) in enumerate(zip(window, size, strict=True)):
        rolled = rolled.roll(-(edge // 2) if n > edge else 0, axis)
    for shifted, expected in ((False, number[0, ..., 0]), (True, rolled)):
        split = Windows(size, window, shifted, False, False, CPU).split(number)[..., 0]
        corners = itertools.product(*(range(0, n, edge) for n, edge in zip(size, window, strict=True)))
        for found, corner in zip(split, corners, strict=True):
            box = tuple(slice(c, c + edge) for c, edge in zip(corner, window, strict=True))
            assert torch.equal(found, expected[box].flatten())


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
    expected = plain_attention(qkv, bias, masks, kinds)
    wanted = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (qkv, bias), wanted)
    for attend in (window_attention, fused_window_attention):
        found = attend(qkv, bias, masks, kinds)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(gradients, torch.autograd.grad(found, (qkv, bias), wanted), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_autocast_changes_nothing_inside() -> None:
    qkv = torch.randn(2, 4, 3, 1, 3, requires_grad=True)
    bias, masks, kinds = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.tensor([-1, -1])
    plain = window_attention(qkv, bias, masks, kinds)
    with torch.autocast("cpu", torch.bfloat16):
        inside = window_attention(qkv, bias, masks, kinds)
    assert torch.equal(plain, inside)
    inside.sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="Expected one type"):
        window_attention(qkv, bias.double(), masks, kinds)


def test_relative_positions_number_the_offsets_between_cells() -> None:
    number = relative_positions((2, 3))
    assert number.shape == (6, 6) and number.min() == 0 and number.max() == 14
    assert (number.diagonal() == 7).all()
    assert number[0, 5] == 0 and number[5, 0] == 14  # (0, 0) - (1, 2) is the least offset
    assert number[1, 0] == 8 and number[3, 0] == 12
