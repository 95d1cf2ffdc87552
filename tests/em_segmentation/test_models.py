"""The networks against the references whose weights they load, and what they promise about shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from em_segmentation.model_defs.mednext import MedNeXt
from em_segmentation.model_defs.swin_unetr import SwinUNETR
from em_segmentation.model_defs.unetr import UNETR, unetr_key
from em_segmentation.model_defs.unets import BasicUNet3d, ResidualUNet3d, basic_unet_key, residual_unet_key

FILTERS = (32, 64, 128, 256, 512)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def reference(name: str, *arguments: Any, **named: Any) -> nn.Module:
    """A network of MONAI with its random weights, in eval mode; skipped where MONAI is absent."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(3)
    model: nn.Module = getattr(nets, name)(*arguments, **named)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # so that no weight is the 0 or 1 it began with
    return model.eval()


@torch.inference_mode()
def difference(one: nn.Module, other: nn.Module, *shape: int) -> float:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = one(x)
    assert expected.std() > 0.01
    return float((other(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(32, 32, 48), (33, 34, 51)])
def test_basic_unet_is_the_reference(size: tuple[int, int, int]) -> None:
    theirs = reference("BasicUNet", 3, 2, 3)
    ours = BasicUNet3d(2, 3, (32, 32, 64, 128, 256, 32), 0.0).eval()
    ours.load_state_dict({basic_unet_key(name): weight for name, weight in theirs.state_dict().items()})
    assert count(ours) == count(theirs)
    assert difference(theirs, ours, 1, 2, *size) < 1e-5


@pytest.mark.parametrize("filters", [FILTERS, (8, 16, 24)])
def test_residual_unet_is_the_reference(filters: tuple[int, ...]) -> None:
    theirs = reference("UNet", 3, 1, 2, filters, (2,) * (len(filters) - 1), num_res_units=2)
    ours = ResidualUNet3d(1, 2, filters, 0.0).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({residual_unet_key(name, len(filters)): weight for name, weight in weights.items()})
    assert count(ours) == count(theirs)
    assert difference(theirs, ours, 2, 1, 32, 48, 64) < 1e-5


def test_unetr_is_the_reference_without_its_unused_norms() -> None:
    theirs = reference("UNETR", 1, 2, (32, 48, 16), feature_size=16)
    ours = UNETR(1, 2, (32, 48, 16), 16, 0.0).eval()
    weights = {unetr_key(name): weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict({name: weight for name, weight in weights.items() if name is not None})
    assert count(ours) == count(theirs) - 12 * 2 * 768
    assert difference(theirs, ours, 2, 1, 32, 48, 16) < 1e-5


def test_sizes_as_published() -> None:
    assert count(BasicUNet3d(1, 1, (32, 32, 64, 128, 256, 32), 0.0)) == 5_749_377
    assert count(ResidualUNet3d(1, 1, FILTERS, 0.0)) == pytest.approx(19.2e6, rel=0.01)
    assert count(UNETR(1, 1, (96, 96, 96), 16, 0.0)) == pytest.approx(92.7e6, rel=0.01)


def test_a_volume_that_does_not_fit_is_told() -> None:
    with pytest.raises(AssertionError, match="Expected multiples of 4"):
        ResidualUNet3d(1, 1, (4, 8, 16), 0.0)(torch.zeros(1, 1, 8, 10, 8))
    with pytest.raises(AssertionError, match="Expected multiples of 16"):
        UNETR(1, 1, (16, 16, 20), 16, 0.0)


@pytest.mark.parametrize("model", [BasicUNet3d(1, 2, (4, 4, 8, 8, 16, 4), 0.3), ResidualUNet3d(1, 2, (4, 8, 16), 0.3)])
def test_every_weight_has_a_gradient_and_dropout_draws(model: nn.Module) -> None:
    x = torch.randn(1, 1, 16, 32, 16)
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    first.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


NETWORKS: dict[
    str, tuple[Callable[[], nn.Module], tuple[int, int, int]]
] = {  # with thin last maps, but of more than 2 cells: their norm is a sign
    "basic_unet3d": (lambda: BasicUNet3d(1, 2, (8, 8, 16, 16, 32, 8), 0.0), (32, 48, 48)),
    "unet": (lambda: ResidualUNet3d(1, 2, (8, 16, 16, 32), 0.0), (16, 32, 24)),
    "swin_unetr": (lambda: SwinUNETR(1, 2, 12, 0.0), (64, 32, 64)),
    "mednext": (lambda: MedNeXt(1, 2, 8, 3, (2,) * 9, (1,) * 9, True, False, False), (32, 48, 32)),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_bfloat16_gradients_follow_those_of_float32(name: str) -> None:
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    model, volume = build(), torch.randn(1, 1, *size)
    wanted, gradients = torch.randn(1, 2, *size), []
    for precision in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            logits = model(volume)
        (logits.float() * wanted).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert torch.isfinite(rounded).all()
    assert nn.functional.cosine_similarity(exact, rounded, 0) > 0.98
