"""Tiles: every output cell once, equal to no tiles at all where the reach is finite, smooth blends elsewhere."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.tiling import (
    Box,
    Tile,
    Triple,
    balanced_tile,
    blended_planes,
    cube,
    exact_tiles,
    gaussian_weights,
    output_shape,
    run_blended,
    run_exactly,
    window_starts,
)

Network = Callable[[Tensor], Tensor]


def triple(values: np.ndarray) -> Triple:
    z, y, x = map(int, values)
    return z, y, x


@dataclasses.dataclass(frozen=True)
class Reach:
    """What exact tiling must know of a network."""

    stride: int
    alignment: int
    halo: int


def random_network(seed: int) -> tuple[nn.Module, Reach]:
    """A few random convolutions, some strided, some with batch norm in eval mode; double precision."""
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    stride, halo = 1, 0
    for number in range(int(draw.integers(2, 5))):
        kernel = int(draw.choice([1, 3, 3, 5]))
        step = int(draw.choice([1, 1, 2, 3])) if stride < 4 else 1
        layers.append(nn.Conv3d(1 if number == 0 else 2, 2, kernel, step, kernel // 2))
        layers.append(nn.BatchNorm3d(2) if draw.random() < 0.5 else nn.Tanh())
        halo += kernel // 2 * stride
        stride *= step
    network = nn.Sequential(*layers).double().eval()
    for module in network:
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean)  # a bias: zero padding is then unlike any input
    return network, Reach(stride, stride, halo)


class DownAndUp(nn.Module):
    """A small U: its cells are voxels (stride 1), but its tiles must start at even ones (alignment 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 2, 3, 2, 1)
        self.lateral = nn.Conv3d(1, 2, 3, 1, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z, y, width = x.shape[2:]
        up = nn.functional.interpolate(self.down(x), scale_factor=2, mode="nearest")[:, :, :z, :y, :width]
        merged: Tensor = (up + self.lateral(x)).tanh()
        return merged


DOWN_AND_UP = Reach(1, 2, 2)  # a cell of the coarse map reaches one voxel down and two up from its first voxel


def reader(volume: Tensor) -> Callable[[Box], Tensor]:
    """Reads boxes of (c, z, y, x), and only within it."""

    def read(box: Box) -> Tensor:
        for first, last, n in zip(*box, volume.shape[1:], strict=True):
            assert 0 <= first < last <= n, f"{box} is not within {tuple(volume.shape)}"
        (z0, y0, x0), (z1, y1, x1) = box
        return volume[None, :, z0:z1, y0:y1, x0:x1]

    return read


@torch.no_grad()
def tiling_error(network: Network, reach: Reach, shape: Triple, tile: Triple) -> float:
    """The largest difference between tiles and no tiles, on random input; NaN where a cell was never written."""
    volume = torch.randn(1, *shape, dtype=torch.float64)
    whole = network(volume[None])[0]
    assert whole.shape[1:] == output_shape(shape, reach.stride)
    output = torch.full_like(whole, torch.nan)
    tiles = list(exact_tiles(shape, tile, reach.stride, cube(reach.alignment), cube(reach.halo)))
    run_exactly(network, reader(volume), tiles, output)
    return (output - whole).abs().max().item()


def test_output_shape_is_that_of_half_padded_convolutions() -> None:
    for n, kernel, stride in itertools.product(range(1, 12), (1, 3, 5), (1, 2, 3, 4)):
        assert (
            nn.Conv1d(1, 1, kernel, stride, kernel // 2)(torch.zeros(1, 1, n)).shape[2]
            == output_shape((n,) * 3, stride)[0]
        )


def test_a_tile_by_hand() -> None:
    """Ten voxels in tiles of 4, stride 2, a halo of 1 that grows to one alignment: written out along z."""
    tiles = list(exact_tiles((10, 4, 4), (4, 4, 4), 2, cube(2), cube(1)))
    plane = slice(0, 2)
    assert tiles == [
        Tile(((0, 0, 0), (6, 4, 4)), (slice(0, 2), plane, plane), (slice(0, 2), plane, plane)),
        Tile(((2, 0, 0), (10, 4, 4)), (slice(1, 3), plane, plane), (slice(2, 4), plane, plane)),
        Tile(((6, 0, 0), (10, 4, 4)), (slice(1, 2), plane, plane), (slice(4, 5), plane, plane)),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_tiles_write_every_cell_once_and_read_its_whole_reach(seed: int) -> None:
    draw = np.random.default_rng(seed)
    stride = int(draw.choice([1, 2, 4]))
    alignment = stride * int(draw.choice([1, 2, 3]))
    shape, halo = triple(draw.integers(1, 40, 3)), int(draw.integers(0, 12))
    tile = triple(alignment * draw.integers(1, 5, 3))
    written = np.zeros(output_shape(shape, stride), dtype=int)
    for one in exact_tiles(shape, tile, stride, cube(alignment), cube(halo)):
        written[one.write] += 1
        for first, last, keep, write, n in zip(*one.read, one.keep, one.write, shape, strict=True):
            assert first % alignment == 0
            assert keep.stop - keep.start == write.stop - write.start
            assert first + keep.start * stride == write.start * stride, "cells keep their place"
            assert 0 <= first <= max(0, write.start * stride - halo)
            assert n >= last >= min(n, (write.stop - 1) * stride + halo + 1)
    assert (written == 1).all()


def test_a_tile_that_does_not_keep_to_the_grid_is_refused() -> None:
    for tile, stride, alignment in (((8, 8, 6), 1, 4), ((8, 8, 8), 4, 2)):
        with pytest.raises(AssertionError):
            next(exact_tiles((9, 9, 9), tile, stride, cube(alignment), cube(1)))


def test_balanced_tiles_are_as_few_as_the_largest_would_make_and_nearly_equal() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        alignment = int(draw.integers(1, 9))
        shape, largest = triple(draw.integers(1, 200, 3)), triple(alignment * draw.integers(1, 12, 3))
        for n, limit, edge in zip(shape, largest, balanced_tile(shape, largest, cube(alignment)), strict=True):
            assert edge % alignment == 0
            assert 0 < edge <= limit
            assert -(-n // edge) == -(-n // limit), "as few"
            assert edge - alignment < n / -(-n // limit), "no larger than an equal share, to the next multiple"


@pytest.mark.parametrize("seed", range(20))
def test_exact_tiles_equal_no_tiles(seed: int) -> None:
    network, reach = random_network(seed)
    draw = np.random.default_rng(1000 + seed)
    for _ in range(2):
        shape, tile = triple(draw.integers(1, 18, 3)), triple(reach.alignment * draw.integers(1, 5, 3))
        assert tiling_error(network, reach, shape, tile) < 1e-12


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 9, 5), (1, 2, 3)])
def test_exact_tiles_of_a_network_that_comes_back_up(shape: Triple) -> None:
    torch.manual_seed(0)
    assert tiling_error(DownAndUp(), DOWN_AND_UP, shape, (2, 4, 2)) < 1e-12


def test_a_halo_one_too_small_is_seen() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 1, 5, padding=2)).double()
    assert tiling_error(network, Reach(1, 1, 3), (9, 9, 9), (4, 4, 4)) < 1e-12
    assert tiling_error(network, Reach(1, 1, 2), (9, 9, 9), (4, 4, 4)) > 1e-4


def test_a_strided_halo_one_alignment_too_small_is_seen() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, 2, 1), nn.Conv3d(2, 1, 3, padding=1)).double()
    assert tiling_error(network, Reach(2, 2, 3), (13, 13, 13), (4, 4, 4)) < 1e-12
    assert tiling_error(network, Reach(2, 2, 2), (13, 13, 13), (4, 4, 4)) > 1e-4


def test_tiles_off_the_networks_grid_are_seen() -> None:
    torch.manual_seed(0)
    assert tiling_error(DownAndUp(), Reach(1, 1, 2), (9, 9, 9), (3, 3, 3)) > 1e-4


def test_statistics_of_the_whole_tile_cannot_be_tiled_exactly() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.GroupNorm(1, 2)).double()
    assert tiling_error(network, Reach(1, 1, 3), (12, 12, 12), (4, 4, 4)) > 1e-4


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_windows_cover_everything_and_end_flush(overlap: float) -> None:
    for n, window in itertools.product(range(1, 70), (1, 2, 7, 16, 64)):
        starts = window_starts(n, window, overlap)
        if n <= window:
            assert starts == [0]
            continue
        step = max(1, int(window * (1 - overlap)))
        gaps = np.diff(starts)
        assert (starts[0], starts[-1]) == (0, n - window)
        assert gaps.min() >= 1
        assert gaps.max() <= step <= window
        assert len(starts) - 1 == -(-(n - window) // step), "no window more than needed"


def test_blending_weights_peak_in_the_middle_and_fall_alike_to_both_sides() -> None:
    weights = gaussian_weights((5, 8, 1), 1 / 8, torch.device("cpu"))
    assert weights.shape == (5, 8, 1)
    assert weights.max() <= 1
    assert weights.min() > 0, "no cell is left without weight"
    assert torch.equal(weights, weights.flip(0, 1, 2))
    assert gaussian_weights((5, 9, 1), 1 / 8, torch.device("cpu"))[2, 4, 0] == 1
    along_y = gaussian_weights((1, 65, 1), 1 / 8, torch.device("cpu"))[0, :, 0]
    offset = torch.arange(65.0) - 32
    torch.testing.assert_close(along_y, torch.exp(-0.5 * (offset / (65 / 8)) ** 2))


def cells_of(stride: int) -> Network:
    """A network without any reach: a cell is its first voxel, twice."""
    return lambda x: 2 * x[:, :, ::stride, ::stride, ::stride]


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_blended_windows_of_a_local_network_change_nothing(stride: int, seed: int) -> None:
    """Every window agrees on every cell, so their weighted mean does: windows stand where they should."""
    draw = np.random.default_rng(seed)
    shape, window = triple(draw.integers(1, 40, 3)), triple(4 * draw.integers(1, 6, 3))
    volume = torch.randn(2, *shape)
    blended = run_blended(cells_of(stride), reader(volume), shape, window, stride, float(draw.uniform(0, 0.8)))
    assert blended.dtype == torch.float32
    torch.testing.assert_close(blended, cells_of(stride)(volume[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_any_range_of_planes_has_the_bits_of_the_whole(seed: int) -> None:
    """So that a killed call may continue anywhere, and processes may share the planes."""
    draw = np.random.default_rng(seed)
    shape, window, overlap = (
        triple(draw.integers(4, 30, 3)),
        triple(draw.integers(3, 12, 3)),
        float(draw.uniform(0, 0.8)),
    )
    volume = torch.randn(1, *shape)

    def network(x: Tensor) -> Tensor:
        return x - x.mean()  # knows its whole window

    whole = run_blended(network, reader(volume), shape, window, 1, overlap)
    first, last = sorted(draw.choice(shape[0] + 1, 2, replace=False).tolist())
    parts = list(blended_planes(network, reader(volume), shape, window, 1, overlap, (first, last)))
    assert [plane for plane, _ in parts] == list(np.cumsum([first, *(part.shape[1] for _, part in parts[:-1])]))
    assert torch.equal(torch.cat([part for _, part in parts], 1), whole[:, first:last])


def test_a_constant_map_stays_constant() -> None:
    blended = run_blended(
        lambda x: torch.full_like(x, 3.5, dtype=torch.bfloat16),
        reader(torch.randn(1, 23, 9, 31)),
        (23, 9, 31),
        (8,) * 3,
        1,
        0.5,
    )
    assert blended.shape == (1, 23, 9, 31)
    torch.testing.assert_close(blended, torch.full_like(blended, 3.5), atol=1e-5, rtol=0)


def test_a_single_window_is_the_untiled_map() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.GroupNorm(2, 4)).eval()
    volume = torch.randn(1, 9, 13, 12)
    with torch.no_grad():
        for window in ((9, 13, 12), (16, 16, 16)):
            blended = run_blended(network, reader(volume), (9, 13, 12), window, 2, 0.5)
            torch.testing.assert_close(blended, network(volume[None])[0], atol=1e-5, rtol=1e-5)


def test_between_two_windows_the_blend_passes_smoothly_from_one_to_the_other() -> None:
    """Each window answers with its own number; nowhere does the blend leave their range or jump."""
    answers = iter([0.0, 1.0])
    blended = run_blended(
        lambda x: torch.full_like(x, next(answers)), reader(torch.zeros(1, 24, 1, 1)), (24, 1, 1), (16, 1, 1), 1, 0.5
    )[0, :, 0, 0]
    steps = blended.diff()
    assert (blended[0], blended[-1]) == (0, 1)
    assert steps.min() >= 0
    assert steps.max() < 0.5
    assert blended[11].item() + blended[12].item() == pytest.approx(1), "half-way they weigh alike"
