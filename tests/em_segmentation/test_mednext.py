"""MedNeXt against the reference whose weights it loads, and what it promises beyond it."""

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from em_segmentation.model_defs.convolution import DepthwiseConv3d
from em_segmentation.model_defs.mednext import MedNeXt, mednext_key, size_arguments, up_kernel
from tests.em_segmentation.test_models import count, difference

SMALL = ((2, 3, 1, 2, 1, 2, 1, 3, 2), (1, 2, 1, 1, 1, 1, 1, 2, 1))


def small(kernel_size: int, grn: bool, deep_supervision: bool, checkpointing: bool) -> MedNeXt:
    torch.manual_seed(1)
    return MedNeXt(2, 3, 8, kernel_size, *SMALL, grn, deep_supervision, checkpointing)


def published(size: str, kernel_size: int) -> MedNeXt:
    return MedNeXt(1, 2, kernel_size=kernel_size, deep_supervision=True, **size_arguments(size))


def small_reference(kernel_size: int) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    expansions, blocks = SMALL
    model: nn.Module = nets.MedNeXt(
        3, 8, 2, 3, expansions[:4], expansions[5:], expansions[4], kernel_size, True, True,
        blocks[:4], blocks[4], blocks[5:], global_resp_norm=True,
    )  # fmt: skip
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """No weight is the 0 or 1 that it began with."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def loaded(ours: MedNeXt, theirs: nn.Module) -> MedNeXt:
    ours.load_state_dict({mednext_key(name): weight for name, weight in theirs.state_dict().items()})
    return ours


@pytest.mark.parametrize("size", ["S", "B"])
def test_published_sizes_are_the_reference(size: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    theirs = shaken(nets.mednext.create_mednext(size, in_channels=1, out_channels=2, deep_supervision=True)).eval()
    ours = loaded(published(size, 3), theirs).eval()
    assert difference(theirs, ours, 1, 1, 32, 16, 48) < 1e-5


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_every_scale_and_gradient_is_the_reference_with_grn(kernel_size: int) -> None:
    theirs = small_reference(kernel_size).train()
    ours = loaded(small(kernel_size, True, True, False), theirs).train()
    volume = torch.randn(2, 2, 16, 32, 48)
    pairs = list(zip(theirs(volume), ours(volume), strict=True))
    assert [tuple(scale.shape[2:]) for _, scale in pairs] == [(16 >> i, 32 >> i, 48 >> i) for i in range(5)]
    for expected, scale in pairs:
        torch.testing.assert_close(scale, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    targets = [torch.randn(scale.shape) for _, scale in pairs]
    for index in (0, 1):
        sum((pair[index] * target).mean() for pair, target in zip(pairs, targets, strict=True)).backward()
    own = dict(ours.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in own.values() if parameter.grad is not None)
    for name, parameter in theirs.named_parameters():
        difference_of_gradients = (own[mednext_key(name)].grad - parameter.grad).abs().max()
        assert difference_of_gradients < 1e-4 * max(parameter.grad.abs().max(), 0.1 * largest), name


@pytest.mark.parametrize(
    "size, kernel_size, millions",
    [("S", 3, 5.6), ("B", 3, 10.5), ("M", 3, 17.6), ("L", 3, 61.8), ("S", 5, 5.9), ("L", 5, 63.0)],
)
def test_sizes_as_published(size: str, kernel_size: int, millions: float) -> None:
    with torch.device("meta"):
        model = published(size, kernel_size)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.15)


def test_deep_supervision_gives_the_finest_scale_alone_in_eval_mode() -> None:
    model = small(3, False, True, False)
    volume = torch.randn(1, 2, 16, 16, 16)
    scales = model.train()(volume)
    assert isinstance(scales, list) and len(scales) == 5
    torch.testing.assert_close(model.eval()(volume), scales[0])


def gradients(model: nn.Module, volume: Tensor) -> dict[str, Tensor]:
    model.train()(volume).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_checkpointing_changes_no_gradient() -> None:
    volume = torch.randn(2, 2, 16, 16, 32)
    plain = gradients(small(3, True, False, False), volume)
    checkpointed = gradients(small(3, True, False, True), volume)
    assert plain.keys() == checkpointed.keys() and len(plain) > 100
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_up_kernel_keeps_what_constant_kernels_do_and_copies_the_rest() -> None:
    trained = small(3, True, True, False)
    for module in trained.modules():
        if isinstance(module, DepthwiseConv3d):
            nn.init.constant_(module.weight, 0.5)
    large = small(5, True, True, False)
    up_kernel(trained.state_dict(), large)
    for (name, before), after in zip(trained.named_parameters(), large.parameters(), strict=True):
        if name.endswith("depthwise.weight"):
            assert after.shape[2:] == (5, 5, 5) and torch.all(after == 0.5), name
        else:
            assert torch.equal(before, after), name


def test_up_kernel_resizes_every_axis_linearly() -> None:
    trained, large = small(3, False, False, False), small(5, False, False, False)
    weights = trained.state_dict()
    ramp = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(8, 1, 3, 3, 3)
    up_kernel(weights | {"stages.0.0.depthwise.weight": ramp}, large)
    kernel = large.state_dict()["stages.0.0.depthwise.weight"]
    torch.testing.assert_close(kernel[0, 0, :, 2, 3], torch.tensor([0.0, 0.4, 1.0, 1.6, 2.0]))
    torch.testing.assert_close(kernel[0, 0, 1], torch.full((5, 5), 0.4))


def test_up_kernel_refuses_another_network() -> None:
    weights = small(3, True, True, False).state_dict()
    with pytest.raises(UserError, match="weights are in one model only, such as heads.1.bias"):
        up_kernel(weights, small(5, True, False, False))
    with pytest.raises(UserError, match=r"depthwise.weight is \(8, 1, 5, 5, 5\), expected \(8, 1, 3, 3, 3\)"):
        up_kernel(small(5, True, True, False).state_dict(), small(3, True, True, False))
    wider = MedNeXt(2, 3, 16, 3, *SMALL, True, True, False)
    with pytest.raises(UserError, match="stem.weight is .* expected"):
        up_kernel(wider.state_dict(), small(5, True, True, False))


def test_a_volume_that_does_not_fit_is_told() -> None:
    with pytest.raises(AssertionError, match="Expected multiples of 16"):
        small(3, False, False, False)(torch.zeros(1, 2, 16, 24, 16))
    with pytest.raises(AssertionError, match="Expected 9 blocks"):
        MedNeXt(1, 1, 8, 3, (2,) * 9, (2,) * 5, False, False, False)
