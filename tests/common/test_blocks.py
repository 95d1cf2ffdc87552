"""Blocks: shapes in 2D and 3D, the forward pass written out by hand, gates that can close, paths that drop."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from common.blocks import DropPath, NormName, PreActResBlock, SqueezeExcitation, norm_layer

functional = nn.functional


def block(
    dims: int, channels: tuple[int, int], stride: int, norm: NormName, gated: bool, drop_path: float
) -> PreActResBlock:
    """A block whose norms and gates are not at their plain start."""
    torch.manual_seed(0)
    built = PreActResBlock(dims, *channels, stride, norm, gated, drop_path)
    for name, value in [*built.named_parameters(), *built.named_buffers()]:
        if "norm" in name or "skip.1" in name:
            nn.init.uniform_(value.data, 0.5, 1.5) if value.is_floating_point() else None
    return built


def by_hand(built: PreActResBlock, x: Tensor) -> Tensor:
    """He et al. 2016 with functional calls: norm-silu-conv3(stride)-norm-silu-conv3 + skip."""
    stride = built.conv1.stride
    convolve = {4: functional.conv2d, 5: functional.conv3d}[x.dim()]

    def normed(norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, nn.GroupNorm):
            return functional.group_norm(x, norm.num_groups, norm.weight, norm.bias)
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        return functional.batch_norm(x, mean, var, norm.weight, norm.bias, norm.training)

    branch = convolve(functional.silu(normed(built.norm1, x)), built.conv1.weight, None, stride, 1)
    branch = convolve(functional.silu(normed(built.norm2, branch)), built.conv2.weight, None, 1, 1)
    if isinstance(built.gate, SqueezeExcitation):
        mean = branch.flatten(2).mean(2)
        hidden = functional.silu(mean @ built.gate.squeeze.weight.T + built.gate.squeeze.bias)
        gate = torch.sigmoid(hidden @ built.gate.excite.weight.T + built.gate.excite.bias)
        branch = branch * gate.view(*gate.shape, *[1] * (x.dim() - 2))
    if isinstance(built.skip, nn.Identity):
        return x + branch
    return normed(built.skip[1], convolve(x, built.skip[0].weight, None, stride)) + branch


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (16, 2), (96, 12), (4, 1), (1, 1), (20, 2), (12, 1), (36, 4), (7, 1), (34, 2)]
)
def test_group_norm_takes_about_eight_channels_per_group_and_always_divides(channels: int, groups: int) -> None:
    norm = norm_layer("group", 3, channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups
    assert norm(torch.randn(2, channels, 3, 3, 3)).shape == (2, channels, 3, 3, 3)


def test_batch_norm_is_that_of_the_dimension() -> None:
    assert type(norm_layer("batch", 2, 5)) is nn.BatchNorm2d
    assert type(norm_layer("batch", 3, 5)) is nn.BatchNorm3d


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("channels", "stride"), [((8, 8), 1), ((8, 16), 1), ((8, 8), 2), ((8, 16), 2)])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_block_equals_its_formula(
    dims: int, channels: tuple[int, int], stride: int, norm: NormName, gated: bool
) -> None:
    built = block(dims, channels, stride, norm, gated, 0.0).double()
    x = torch.randn(2, 8, *(5, 6, 7)[:dims], dtype=torch.float64)
    for mode in (True, False):
        built.train(mode)
        expected = by_hand(built, x)
        torch.testing.assert_close(built(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_output_shapes_are_rounded_up(stride: int) -> None:
    for dims in (2, 3):
        built = block(dims, (3, 5), stride, "group", True, 0.0)
        for size in itertools.product((1, 2, 5, 8), repeat=dims):
            expected = (2, 5, *(-(-n // stride) for n in size))
            assert built(torch.randn(2, 3, *size)).shape == expected


@pytest.mark.parametrize(("channels", "stride", "same"), [((4, 4), 1, True), ((4, 4), 2, False), ((4, 8), 1, False)])
def test_the_skip_is_the_identity_only_where_the_shape_is_kept(
    channels: tuple[int, int], stride: int, same: bool
) -> None:
    built = block(3, channels, stride, "batch", False, 0.0).eval()
    assert isinstance(built.skip, nn.Identity) == same
    nn.init.zeros_(built.conv2.weight)
    x = torch.randn(1, 4, 4, 4, 4)
    found = built(x)
    assert torch.equal(found, x) if same else torch.equal(found, built.skip(x))


@pytest.mark.parametrize(("channels", "stride", "gated"), [((6, 6), 1, True), ((6, 10), 2, False), ((6, 10), 1, True)])
def test_numbers_of_parameters(channels: tuple[int, int], stride: int, gated: bool) -> None:
    """Two convolutions without bias, two norms, perhaps a 1 x 1 skip with its norm, perhaps a gate of width 4."""
    n, m = channels
    for dims in (2, 3):
        expected = 3**dims * (n * m + m * m) + 2 * n + 2 * m
        expected += n * m + 2 * m if stride != 1 or n != m else 0
        expected += (m * 4 + 4) + (4 * m + m) if gated else 0
        built = block(dims, channels, stride, "batch", gated, 0.0)
        assert sum(parameter.numel() for parameter in built.parameters()) == expected


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_2d_block_is_the_3d_block_of_a_single_slice(norm: NormName, stride: int) -> None:
    """With the 2D kernels as middle slices, and zeros padded above and below."""
    flat, deep = (block(dims, (8, 16), stride, norm, True, 0.0).eval() for dims in (2, 3))
    state = deep.state_dict()
    for name, value in flat.state_dict().items():
        if value.dim() == 4:
            state[name] = torch.zeros_like(state[name])
            state[name][:, :, state[name].shape[2] // 2] = value
        else:
            state[name] = value
    deep.load_state_dict(state)
    x = torch.randn(2, 8, 7, 10)
    torch.testing.assert_close(deep(x[:, :, None])[:, :, 0], flat(x), rtol=1e-5, atol=1e-5)


def gate_of(bias: float, gate: nn.Module) -> tuple[float, float]:
    """The value of a gate whose last bias is given, and its slope in that bias."""
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(gate.excite.bias, bias)
    found = gate(torch.ones(1, 8, 2, 2, 2))
    found.sum().backward()
    return found.mean().item(), gate.excite.bias.grad.abs().max().item()


class ClampedGate(SqueezeExcitation):
    """The published detectors' gate: its argument never falls below 1e-3, so the gate never below 0.50025."""

    def forward(self, x: Tensor) -> Tensor:
        argument = self.excite(functional.silu(self.squeeze(x.mean((2, 3, 4)))))
        return x * torch.sigmoid(argument.clamp(1e-3, 1e3))[:, :, None, None, None]


@pytest.mark.parametrize("bias", [-0.5, -2.0, -8.0])
def test_a_gate_can_close_and_keeps_a_slope(bias: float) -> None:
    value, slope = gate_of(bias, SqueezeExcitation(8, 4))
    assert value == pytest.approx(torch.sigmoid(torch.tensor(bias)).item(), rel=1e-5)
    assert value < 0.5
    assert slope > 1e-4
    clamped, flat = gate_of(bias, ClampedGate(8, 4))
    assert clamped == pytest.approx(0.50025)
    assert flat == 0, "the planted opposite fails both"


def test_a_gate_scales_whole_channels_by_global_means() -> None:
    torch.manual_seed(0)
    gate, x = SqueezeExcitation(8, 2), torch.randn(3, 8, 4, 5)
    factors = gate(x) / x
    torch.testing.assert_close(factors, factors[:, :, :1, :1].expand_as(factors), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gate(x.flip(2, 3)), gate(x).flip(2, 3))
    torch.testing.assert_close(gate(x)[1:], gate(x[1:]))
    assert [SqueezeExcitation(c, 4).squeeze.out_features for c in (8, 16, 64)] == [4, 4, 16]


def test_a_dropped_path_is_zero_for_the_whole_sample_and_the_rest_makes_up_for_it() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.randn(4000, 2, 3, 3)
    factors = (drop(x) / x).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors))
    values = factors[:, 0]
    dropped = values == 0
    torch.testing.assert_close(values[~dropped], torch.full_like(values[~dropped], 1 / 0.7))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert values.mean().item() == pytest.approx(1, abs=0.04), "the expectation is kept"


def test_no_path_is_dropped_in_evaluation_or_at_probability_0() -> None:
    x = torch.randn(64, 3, 2, 2, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    assert DropPath(0.5).train()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("probability", [-0.1, 1.0, 2.0])
def test_a_path_that_would_always_drop_is_refused(probability: float) -> None:
    with pytest.raises(AssertionError, match="Expected a probability below 1"):
        DropPath(probability)


def test_in_a_block_the_branch_is_dropped_and_the_skip_never() -> None:
    built, x = block(2, (4, 4), 1, "group", False, 0.5).train(), torch.randn(200, 4, 3, 3)
    torch.manual_seed(1)
    branch = built(x) - x
    whole = built.eval()(x) - x
    dropped = (branch == 0).flatten(1).all(1)
    assert 60 < dropped.sum() < 140
    torch.testing.assert_close(branch[~dropped], 2 * whole[~dropped], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_has_a_gradient(norm: NormName) -> None:
    built = block(3, (8, 16), 2, norm, True, 0.0)
    built(torch.randn(2, 8, 6, 6, 6)).square().mean().backward()
    assert [name for name, p in built.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
