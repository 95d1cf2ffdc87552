"""Convolutions and norms for the CPU: equal to torch's in float32, and their bfloat16 gradients near float32's."""

import pytest
import torch
from torch import Tensor, nn

from common.convolution import channels_last
from em_segmentation.model_defs.convolution import (
    Conv3d,
    DepthwiseConv3d,
    Doubling,
    InstanceNorm,
    Pointwise,
    PReLU,
)

THIN = [(2, 3, 3), (2, 2, 2), (1, 1, 1), (2, 6, 8), (3, 2, 5), (4, 4, 2), (5, 1, 6), (3, 3, 3), (8, 1, 1), (4, 4, 4)]
functional = nn.functional


def gradients(output: Tensor, wanted: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [gradient.float() for gradient in torch.autograd.grad(output, inputs, wanted.to(output.dtype))]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("size", THIN)
def test_bfloat16_gradients_of_thin_maps_are_right(size: tuple[int, int, int], kernel_size: int, stride: int) -> None:
    """torch's own are wrong, or even not numbers, in most of these cases (torch 2.13, 2 cells along z)."""
    torch.manual_seed(0)
    convolution = Conv3d(48, 32, kernel_size, stride=stride, padding=kernel_size // 2)
    for _ in range(3):  # what torch does wrong depends on what the memory held
        x = channels_last(torch.randn(2, 48, *size).bfloat16().float()).requires_grad_()
        with torch.no_grad():
            convolution.weight.copy_(convolution.weight.bfloat16())
        expected = convolution(x)
        wanted = torch.randn_like(expected).bfloat16().float()
        with torch.autocast("cpu", torch.bfloat16):
            found = convolution(x)
        assert found.dtype == torch.bfloat16 and relative(found.float(), expected) < 0.01
        assert found.is_contiguous(memory_format=torch.channels_last_3d)
        inputs = (x, convolution.weight, convolution.bias)
        pairs = zip(gradients(found, wanted, *inputs), gradients(expected, wanted, *inputs), strict=True)
        assert all(relative(one, other) < 0.01 for one, other in pairs)


SIZES = [(1, 1, 1), (2, 3, 4), (6, 5, 9), (2, 16, 1), (12, 8, 7)]


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_depthwise_convolution_in_all_its_forms(kernel_size: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    module = DepthwiseConv3d(24, kernel_size)
    weight, bias, reach = module.weight, module.bias, kernel_size // 2
    for size in SIZES:
        x = torch.randn(2, 24, *size, requires_grad=True)
        forms = [
            (module, lambda x: functional.conv3d(x, weight, bias, 1, reach, groups=24)),
            (module.halving, lambda x: functional.conv3d(x, weight, bias, 2, reach, groups=24)),
            (module.doubling, lambda x: functional.conv_transpose3d(x, weight, bias, 2, reach, groups=24)),
        ]
        for ours, torchs in forms:
            expected = torchs(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                found = ours(x)
            assert found.dtype == precision and found.shape == expected.shape
            wanted = torch.randn_like(expected)
            limit = 1e-5 if precision == torch.float32 else 0.01
            assert relative(found.float(), expected) < limit
            pairs = zip(
                gradients(found, wanted, x, weight, bias), gradients(expected, wanted, x, weight, bias), strict=True
            )
            assert all(relative(one, other) < limit for one, other in pairs)


@pytest.mark.parametrize("bias", [True, False])
def test_matrix_products_are_the_convolutions_they_stand_for(bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4, 2)
    point, double = Pointwise(5, 7, bias), Doubling(5, 7, bias)
    torch.testing.assert_close(point(x), functional.conv3d(x, point.weight, point.bias))
    torch.testing.assert_close(double(x), functional.conv_transpose3d(x, double.weight, double.bias, 2))


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_keeps_its_precision_far_from_zero(affine: bool) -> None:
    """torch's batch norm in channels-last layout is off by 1e-4 on such a volume."""
    torch.manual_seed(0)
    x = channels_last(torch.randn(2, 8, 40, 48, 48) + 5).requires_grad_()
    norm = InstanceNorm(8, affine)
    if affine:
        norm.load_state_dict({"weight": torch.randn(8), "bias": torch.randn(8)})
    exact = x.detach().double().requires_grad_()
    weight, bias = (p.double() if p is not None else None for p in (norm.weight, norm.bias))
    expected = functional.instance_norm(exact, None, None, weight, bias)
    found = norm(x)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)
    wanted = torch.randn_like(found)
    [ours], [theirs] = gradients(found, wanted, x), gradients(expected, wanted.double(), exact)
    assert relative(ours, theirs) < 1e-4


def test_instance_norm_of_a_single_cell_is_its_bias() -> None:
    norm = InstanceNorm(3, True)
    norm.load_state_dict({"weight": torch.ones(3), "bias": torch.full((3,), 0.5)})
    assert torch.equal(norm(torch.randn(2, 3, 1, 1, 1)), torch.full((2, 3, 1, 1, 1), 0.5))


def test_a_single_channel_comes_out_channels_last_too() -> None:
    assert Conv3d(1, 6, 3, padding=1)(torch.randn(2, 1, 3, 4, 5)).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 1.5])
def test_prelu_is_torchs(slope: float) -> None:
    """The same keys too."""
    ours, theirs = PReLU(), nn.PReLU(1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for module in (ours, theirs):
        nn.init.constant_(module.weight, slope)
    x = torch.randn(2, 5, 3, 4, 6, requires_grad=True)
    x.data[0, 0] = 0.0
    wanted = torch.randn(x.shape)
    found, expected = (torch.autograd.grad(module(x), (x, module.weight), wanted) for module in (ours, theirs))
    torch.testing.assert_close(ours(x), theirs(x))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16()).dtype == torch.bfloat16
