"""MotorIdentifier: its size, its shapes, how far it sees, and which variants may be run in exact tiles."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from common.blocks import NormName, PreActResBlock
from common.tiling import cube, exact_tiles, output_shape, run_exactly
from motor_detection.config import KAGGLE, PHANTOM
from motor_detection.model_defs.motoridentifier import PRIOR, MotorIdentifier, Reach, count_parameters
from motor_detection.model_defs.nnblock import Stem
from motor_detection.trainer import build_model
from tests.motor_detection.small_runs import random_network

STRIDES = (2, 4, 8, 16)


def small_network(stride: int, norm: NormName, squeeze_excitation: bool) -> MotorIdentifier:
    return random_network(stride, norm, squeeze_excitation).double()


def test_the_full_preset_has_about_four_million_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """The original's last network had 3,975,697."""
    full, phantom = count_parameters(build_model(KAGGLE.model)), count_parameters(build_model(PHANTOM.model))
    with capsys.disabled():
        print(f"\nparameters: kaggle {full:,}, phantom {phantom:,}")
    assert 3_500_000 < full < 4_500_000
    assert phantom < full / 4


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(32, 32, 32), (33, 47, 50), (17, 64, 31)])
def test_one_logit_per_started_cell(stride: int, size: tuple[int, int, int]) -> None:
    model = small_network(stride, "batch", False).float()
    with torch.inference_mode():
        logits = model(torch.randn(2, 1, *size))
    assert logits.shape == (2, 1, *output_shape(size, stride))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


@pytest.mark.parametrize("stride", STRIDES)
def test_a_new_network_says_the_prior_everywhere(stride: int) -> None:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(PHANTOM.model, stride=stride)).eval()
    with torch.inference_mode():
        probabilities = model(torch.randn(1, 1, 32, 48, 32)).sigmoid()
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, PRIOR))


@pytest.mark.parametrize("stride", STRIDES)
def test_parameters_are_split_into_backbone_and_head(stride: int) -> None:
    model = small_network(stride, "batch", False)
    groups = model.groups_of_parameters()
    assert list(groups) == ["backbone", "head"]
    together = [id(parameter) for group in groups.values() for parameter in group]
    assert len(together) == len(set(together))
    assert set(together) == {id(parameter) for parameter in model.parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in groups["backbone"]} == {"stem", "stages"}


@pytest.mark.parametrize("stride", STRIDES)
def test_every_parameter_takes_part_in_the_logits(stride: int) -> None:
    """A parameter without a gradient would break the exchange between processes."""
    model = small_network(stride, "batch", False).train()
    model(torch.randn(2, 1, 64, 64, 64, dtype=torch.float64)).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_no_cell_sees_beyond_the_halo_and_some_see_most_of_it(stride: int, part: str) -> None:
    """Gradients of single output cells along one axis: none beyond the halo, bit by bit; and the halo is no waste."""
    model = small_network(stride, "batch", False)
    reach: Reach = model.fine_reach() if part == "fine" else model.coarse_reach()
    network, channels = (model.fine, 1) if part == "fine" else (model.coarse, model.split_channels)
    length = -(-(2 * reach.halo + 2 * reach.alignment) // reach.alignment + 1) * reach.alignment
    period = reach.alignment // reach.stride
    first = length // 2 // reach.alignment * period
    farthest = 0
    for cell in range(first, first + period):
        seen = influence(network, channels, length, cell)
        begin, end = cell * reach.stride, (cell + 1) * reach.stride  # the input cells that the output cell covers
        farthest = max(farthest, begin - int(seen.min()), int(seen.max()) - (end - 1))
    assert reach.halo // 2 < farthest <= reach.halo


def influence(network: torch.nn.Module, channels: int, length: int, cell: int) -> Tensor:
    """Input cells along z that reach one output cell at all."""
    volume = torch.randn(1, channels, length, 2, 2, dtype=torch.float64, requires_grad=True)
    network(volume)[0, :, cell].sum().backward()
    assert volume.grad is not None
    return (volume.grad.abs().sum((0, 1, 3, 4)) > 0).nonzero()


@pytest.mark.parametrize("stride", [2, 16])
def test_a_change_outside_the_halo_changes_nothing_and_inside_it_does(stride: int) -> None:
    """The same by perturbation of the whole network's input: whole reach = coarse halo in voxels + fine halo."""
    model = small_network(stride, "batch", False)
    fine, coarse = model.fine_reach(), model.coarse_reach()
    halo = coarse.halo * fine.stride + fine.halo
    length = -(-(2 * halo + 3 * stride) // 32) * 32 + 32
    volume = torch.randn(1, 1, length, 2, 2, dtype=torch.float64)
    cell = length // 2 // stride
    begin, end = cell * stride, (cell + 1) * stride
    with torch.inference_mode():
        before = model(volume)[0, 0, cell]
        outside = volume.clone()
        outside[:, :, : begin - halo] += 100.0
        outside[:, :, end + halo :] -= 100.0
        assert outside.ne(volume).any()
        assert torch.equal(model(outside)[0, 0, cell], before)
        for inside in (begin - halo // 2, begin, end - 1 + halo // 2):
            changed = volume.clone()
            changed[:, :, inside] += 100.0
            assert not torch.equal(model(changed)[0, 0, cell], before)


@pytest.mark.parametrize(
    ("norm", "squeeze_excitation", "is_local"),
    [("batch", False, True), ("batch", True, False), ("group", False, False), ("group", True, False)],
)
def test_only_batch_norm_without_gates_is_local(norm: NormName, squeeze_excitation: bool, is_local: bool) -> None:
    """is_local is true exactly where a far change leaves a cell alone."""
    model = small_network(2, norm, squeeze_excitation)
    assert model.is_local == is_local
    coarse, fine = model.coarse_reach(), model.fine_reach()
    halo = coarse.halo * fine.stride + fine.halo
    volume = torch.randn(1, 1, halo + 64, 4, 4, dtype=torch.float64)
    changed = volume.clone()
    changed[:, :, -8:] += 5
    with torch.inference_mode():
        same = torch.equal(model(volume)[:, :, 0], model(changed)[:, :, 0])
    assert same == is_local


def largest_tile_error(norm: NormName) -> float:
    """How far logits from three tiles, halo included, are from those of the whole volume, in standard deviations."""
    model = small_network(16, norm, False)
    shape = (960, 32, 40)
    volume = torch.randn(1, 1, *shape, dtype=torch.float64)
    reach = model.coarse_reach()
    fine = model.fine_reach()
    halo = reach.halo * fine.stride + fine.halo
    tiles = list(exact_tiles(shape, (320, 32, 64), 16, cube(32), cube(halo)))
    assert len(tiles) == 3 and all(stop[0] - start[0] < shape[0] for (start, stop) in (t.read for t in tiles))

    def read(box: tuple[tuple[int, int, int], tuple[int, int, int]]) -> Tensor:
        return volume[(..., *(slice(a, b) for a, b in zip(*box, strict=True)))]

    with torch.inference_mode():
        whole = model(volume)[0]
        tiled = torch.empty_like(whole)
        run_exactly(model, read, tiles, tiled)
    return float((tiled - whole).abs().max() / whole.std())


def test_known_defect_15_group_norm_depends_on_the_tile_and_batch_norm_does_not() -> None:
    """The original used group norm in sliding windows: measurable, more than a hundredth of the logits' spread."""
    assert largest_tile_error("batch") < 1e-9
    assert largest_tile_error("group") > 0.01


def test_odd_sizes_are_reached_by_all_levels() -> None:
    """Every size from 33 to 64 on one axis: levels halve with ceil, and merges crop what they upsample."""
    model = small_network(2, "batch", False).float()
    with torch.inference_mode():
        for n, axis in itertools.product(range(33, 65, 3), range(3)):
            size = [8, 8, 8]
            size[axis] = n
            assert model(torch.zeros(1, 1, *size)).shape[2 + axis] == -(-n // 2)


@pytest.mark.parametrize("size", [(17, 32, 24), (16, 21, 33), (9, 8, 7)])
def test_the_stem_in_bfloat16_is_the_convolution(size: tuple[int, int, int]) -> None:
    """Two voxels as two channels: the same products, rounded once."""
    torch.manual_seed(0)
    stem = Stem(8).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    volume = torch.randn(2, 1, *size).bfloat16()
    rounded = stem.weight.detach().bfloat16().float()
    expected = torch.nn.functional.conv3d(volume.float(), rounded, None, 2, 2)
    with torch.inference_mode():
        found = copy.deepcopy(stem).bfloat16()(volume)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8 * expected.abs().max().item())


@pytest.mark.parametrize("stride", [2, 8])
def test_absorbed_norms_change_nothing(stride: int) -> None:
    model = small_network(stride, "batch", False).eval()
    fast = copy.deepcopy(model)
    for module in fast.modules():
        if isinstance(module, PreActResBlock):
            module.absorb_norms()
    norms = [sum(isinstance(m, torch.nn.BatchNorm3d) for m in network.modules()) for network in (model, fast)]
    assert norms[1] < norms[0] / 2
    volume = torch.randn(1, 1, 32, 40, 24, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(volume), model(volume))
