"""The residual symmetric U-Net: a region alone is what the whole has there, and norms may be part of convolutions."""

import numpy as np
import pytest
import torch
from torch import nn

from em_segmentation.inference import working_copy
from em_segmentation.model_defs import rsunet
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.model_defs.rsunet import MergeModule, ResidualModule, RSUNet
from em_segmentation.regions import Region, Triple, cut, divided, everywhere, seen_from, widened

CASES = [
    ((1, 1, 1), (3, 3, 3)),
    ((1, 2, 2), (1, 3, 3)),
    ((2, 2, 2), (3, 3)),
    ((1, 1, 1), (1, 1, 3, 3)),
    ((1, 3, 2), (3,)),
]


def network(fold: Triple, kernel_z: tuple[int, ...]) -> RSUNet:
    """Random weights and statistics, float64, eval mode."""
    torch.manual_seed(0)
    made = RSUNet(2, 3, fold, (3, 4, 5, 6)[: len(kernel_z)], kernel_z, "batch").double().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, std=0.5)
    return made


def random_region(shape: tuple[int, ...], draw: np.random.Generator) -> Region:
    ends = [sorted(draw.choice(n + 1, 2, replace=False).tolist()) for n in shape]
    z, y, x = (slice(low, high) for low, high in ends)
    return z, y, x


@pytest.mark.parametrize(("fold", "kernel_z"), CASES)
@pytest.mark.parametrize(("shape", "slab"), [((16, 24, 24), 32), ((16, 24, 24), 4), ((9, 17, 22), 2), ((1, 5, 7), 2)])
@torch.inference_mode()
def test_a_region_alone_is_what_the_whole_has_there(
    fold: Triple, kernel_z: tuple[int, ...], shape: Triple, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And slab by slab of sections what it is at once."""
    model, draw = network(fold, kernel_z), np.random.default_rng(0)
    volume = torch.randn(2, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = model(volume)
    assert whole.shape == (2, 3, *shape) and whole.std() > 0.05
    monkeypatch.setattr(rsunet, "SLAB", slab)
    for region in [everywhere(volume), *(random_region(shape, draw) for _ in range(12))]:
        found = model.part(volume, region)
        torch.testing.assert_close(found, whole[(slice(None), slice(None), *region)], rtol=0, atol=1e-12)


def test_a_region_that_forgets_a_convolutions_reach_is_seen() -> None:
    """The planted defect: the way up computed on just what the next level needs."""
    model = network((1, 1, 1), (3, 3, 3))
    volume = torch.randn(1, 2, 16, 24, 24, dtype=torch.float64)
    region = (slice(5, 9), slice(3, 9), slice(8, 13))
    right = model(volume)[(slice(None), slice(None), *region)]
    model.reaches = [(0, 0, 0)] * 3
    assert (model.part(volume, region) - right).abs().max() > 1e-3


@pytest.mark.parametrize(("fold", "kernel_z"), CASES)
@torch.inference_mode()
def test_norms_become_part_of_convolutions(fold: Triple, kernel_z: tuple[int, ...]) -> None:
    model = network(fold, kernel_z)
    volume = torch.randn(1, 2, 8, 24, 24, dtype=torch.float64)
    before = model(volume)
    for module in model.modules():
        if isinstance(module, ResidualModule | MergeModule):
            module.absorb_norms()
    assert not any(isinstance(module, nn.BatchNorm3d) for module in model.modules())
    torch.testing.assert_close(model(volume), before, rtol=0, atol=1e-12)


def test_norms_of_the_tile_stay() -> None:
    model = SegmentationModel("rsunet", RSUNet(1, 1, (1, 1, 1), (8, 8), (3, 3), "group")).eval()
    fast = working_copy(model, "32")
    assert sum(isinstance(module, nn.GroupNorm) for module in fast.modules()) == 5
    volume = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(fast(volume), model(volume))


def test_regions_by_hand() -> None:
    region = (slice(3, 7), slice(0, 4), slice(5, 6))
    assert divided(region, (2, 4, 3)) == (slice(1, 4), slice(0, 1), slice(1, 2))
    assert widened(region, (1, 2, 9), (8, 5, 12)) == (slice(2, 8), slice(0, 5), slice(0, 12))
    assert seen_from((slice(1, 4), slice(0, 1), slice(1, 2)), (2, 4, 3), region) == (
        slice(1, 5),
        slice(0, 4),
        slice(2, 3),
    )
    cells = torch.arange(24.0).reshape(1, 1, 2, 3, 4)
    assert cut(cells, everywhere(cells)) is cells
    part = cut(cells, (slice(1, 2), slice(0, 3), slice(1, 3)))
    assert part.flatten().tolist() == [13, 14, 17, 18, 21, 22]
    assert part.is_contiguous(memory_format=torch.channels_last_3d)
