"""Convolutions on maps no wider than the kernel, where torch's own write beyond their buffers, and on small ones."""

import itertools

import pytest
import torch
from torch import nn

from common.convolution import CONVOLUTION, Conv3d, is_thin, is_unfolded

KERNELS = {
    3: [((7, 7, 7), (2, 2, 2)), ((3, 7, 7), (1, 2, 2)), ((7, 1, 1), (2, 1, 1)), ((5, 5, 5), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
    2: [((7, 7), (2, 2)), ((7, 7), (1, 1)), ((5, 5), (2, 2)), ((3, 3), (2, 2))],
}  # fmt: skip
EDGES = {3: ((1, 3, 5, 8), (1, 9), (2, 6)), 2: ((1, 2, 4, 7, 9), (1, 3, 5, 8))}
CHANNELS = ((1, 8, 1), (16, 16, 1), (32, 32, 32))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_gradients_on_thin_maps(dims: int, dtype: torch.dtype, tolerance: float, layout: str) -> None:
    torch.manual_seed(0)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    for (kernel, stride), size, (ins, outs, groups) in itertools.product(
        KERNELS[dims], itertools.product(*EDGES[dims]), CHANNELS
    ):
        padding = tuple(k // 2 for k in kernel)
        layer = CONVOLUTION[dims](ins, outs, kernel, stride, padding, groups=groups, bias=False).to(dtype)
        exact = (nn.Conv2d if dims == 2 else nn.Conv3d)(ins, outs, kernel, stride, padding, groups=groups, bias=False)  # type: ignore[arg-type]
        exact = exact.double()
        exact.load_state_dict(layer.state_dict())
        x = torch.randn(2, ins, *size).to(dtype)
        inside = x.contiguous(memory_format=last) if layout == "last" else x
        inputs = inside.clone().requires_grad_(), x.double().requires_grad_()
        outputs = layer(inputs[0]), exact(inputs[1])
        wanted = torch.randn_like(outputs[1]).to(dtype)
        found = torch.autograd.grad(outputs[0], (inputs[0], layer.weight), wanted)
        expected = torch.autograd.grad(outputs[1], (inputs[1], exact.weight), wanted.double())
        for one, other in zip((outputs[0], *found), (outputs[1], *expected), strict=True):
            assert (one.double() - other).abs().max() <= tolerance * other.abs().max(), (
                kernel,
                stride,
                size,
                ins,
                groups,
            )


def test_what_counts_as_thin() -> None:
    layer = CONVOLUTION[3](1, 1, 3, padding=1)
    assert is_thin(layer, torch.zeros(1, 1, 3, 9, 9)) and not is_thin(layer, torch.zeros(1, 1, 4, 9, 9))
    assert not is_thin(CONVOLUTION[2](1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_types_are_those_of_torch() -> None:
    layer, x = CONVOLUTION[2](1, 1, 3, padding=1), torch.zeros(1, 1, 2, 9)
    assert layer(x).dtype == torch.float32 and layer.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16


SMALL = [  # channels in and out, size, kernel, stride, padding
    (1, 8, (64, 20, 20), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    (3, 3, (64, 64, 64), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    (64, 64, (16, 16, 16), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    (16, 8, (33, 20, 24), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    (16, 8, (31, 20, 24), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    (16, 8, (17, 20, 24), (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    (4, 8, (40, 20, 24), (5, 3, 3), (3, 1, 2), (0, 1, 1)),
    (4, 8, (40, 20, 24), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
]


@pytest.mark.parametrize(("ins", "outs", "size", "kernel", "stride", "padding"), SMALL)
def test_small_maps_of_one_volume(
    ins: int, outs: int, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> None:
    """Not unfolded into columns by torch, neither forward nor back, and equal to its convolution of doubles."""
    torch.manual_seed(0)
    layer = Conv3d(ins, outs, kernel, stride, padding)  # type: ignore[arg-type]
    exact = nn.Conv3d(ins, outs, kernel, stride, padding).double()  # type: ignore[arg-type]
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(1, ins, *size)
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    assert is_unfolded(layer, x)
    outputs = layer(inputs[0]), exact(inputs[1])
    assert outputs[0].shape == outputs[1].shape and outputs[0].is_contiguous(memory_format=torch.channels_last_3d)
    wanted = torch.randn_like(outputs[1])
    with torch.profiler.profile() as profile:
        layer(inputs[0])
        found = torch.autograd.grad(outputs[0], (inputs[0], *layer.parameters()), wanted.float())
    assert not [event.key for event in profile.key_averages() if "slow_conv" in event.key]
    expected = torch.autograd.grad(outputs[1], (inputs[1], *exact.parameters()), wanted)
    for one, other in zip((outputs[0], *found), (outputs[1], *expected), strict=True):
        assert (one.double() - other).abs().max() <= 1e-4 * other.abs().max()  # sums of up to 262,144 values


def test_what_counts_as_small() -> None:
    """As torch itself decides: it unfolds up to FEW_CELLS."""
    layer = Conv3d(5, 2, 3, padding=1)
    for depth, is_small in ((64, True), (65, False)):
        x = torch.zeros(1, 5, depth, 64, 4)
        with torch.profiler.profile() as profile:
            nn.Conv3d(5, 2, 3, padding=1)(x)
        assert any("slow_conv3d" in event.key for event in profile.key_averages()) == is_small
        assert is_unfolded(layer, x) == is_small
    assert not is_unfolded(layer, torch.zeros(2, 5, 16, 8, 8))
    assert not is_unfolded(Conv3d(5, 2, (3, 1, 1)), torch.zeros(1, 5, 16, 8, 8))
    assert not is_unfolded(layer.double(), torch.zeros(1, 5, 16, 8, 8, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_unfolded(layer.float(), torch.zeros(1, 5, 16, 8, 8))
