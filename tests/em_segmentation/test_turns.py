"""Test-time augmentation: what turns change is undone exactly, affinities above all."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from em_segmentation.config import Targets
from em_segmentation.regions import Region, Triple, everywhere
from em_segmentation.targets import build_target
from em_segmentation.turns import Turn, affinity_moves, averaged, overlap, turns_of

MODES = ("none", "flips", "flips_in_plane", "turns_in_plane", "all")
SHAPE = (7, 10, 13)  # no two axes alike
OFFSETS = (
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (3, 0, 0),
    (0, 9, 0),
    (0, 0, 9),
    (0, 4, 2),
    (0, 2, 4),
    (0, 4, -2),
    (0, 2, -4),
)
NONE: tuple[Triple, ...] = ()


def parts_of(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Region], Tensor]:
    """A network of whole tiles as one that is asked for regions."""
    return lambda x, region: network(x)[(slice(None), slice(None), *region)]


def whole_tile(network: Callable[[Tensor, Region], Tensor]) -> Callable[[Tensor], Tensor]:
    """A network that is asked for regions, asked for everything."""
    return lambda x: network(x, everywhere(x))


def labels_of(shape: Triple, seed: int) -> Tensor:
    """Ids 0..3 in clumps, (z, y, x)."""
    coarse = torch.randint(0, 4, [-(-n // 3) for n in shape], generator=torch.Generator().manual_seed(seed))
    fine = coarse.repeat_interleave(3, 0).repeat_interleave(3, 1).repeat_interleave(3, 2)
    return fine[: shape[0], : shape[1], : shape[2]]


def settings_of(offsets: tuple[Triple, ...], stored_at: str) -> Targets:
    return dataclasses.replace(Targets(), names=("affinity",), affinity_offsets=offsets, affinity_stored_at=stored_at)  # type: ignore[arg-type]


def true_affinities(settings: Targets) -> Callable[[Tensor], Tensor]:
    """A perfect 'network': from ids (1, 1, z, y, x) to their affinities (1, C, z, y, x)."""

    def network(x: Tensor) -> Tensor:
        labels = x[:, 0].long()
        return build_target("affinity", labels, torch.ones_like(labels, dtype=torch.bool), settings, (1, 1, 1)).values

    return network


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored_at", ["source", "destination"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 5), (12, 3, 3)])
def test_a_perfect_network_stays_perfect(mode: str, stored_at: str, shape: Triple) -> None:
    """Exactly: zero differences, also at the faces, also of offsets longer than the tile."""
    settings = settings_of(OFFSETS, stored_at)
    network = true_affinities(settings)
    for seed in range(3):
        labels = labels_of(shape, seed)[None, None].float()
        average = whole_tile(averaged(parts_of(network), turns_of(mode), slice(0, len(OFFSETS)), OFFSETS, stored_at))
        assert torch.equal(average(labels), network(labels))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("region", [(slice(2, 5), slice(0, 4), slice(6, 13)), (slice(0, 7), slice(3, 4), slice(1, 2))])
def test_a_region_is_what_the_whole_tile_has_there(mode: str, region: Region) -> None:
    """Of a network that is right nowhere, whose channels of affinities and others differ under every turn."""
    offsets = OFFSETS[:6] if mode in ("none", "flips", "flips_in_plane") else OFFSETS
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(offsets) + 1, 1, 3, 3, 3, generator=generator)
    tile = torch.randn(1, 1, *SHAPE, generator=generator)
    network = parts_of(lambda x: torch.nn.functional.conv3d(x, weight, padding=1).sigmoid())
    average = averaged(network, turns_of(mode), slice(0, len(offsets)), offsets, "source")
    expected = average(tile, everywhere(tile))[(slice(None), slice(None), *region)]
    torch.testing.assert_close(average(tile, region), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored_at", ["source", "destination"])
def test_negative_offsets_too(stored_at: str) -> None:
    offsets = ((-1, 0, 0), (0, -2, 0), (0, 0, 2), (0, 0, -3), (0, 3, 0))
    settings = settings_of(offsets, stored_at)
    labels = labels_of(SHAPE, 0)[None, None].float()
    network = parts_of(true_affinities(settings))
    average = whole_tile(averaged(network, turns_of("all"), slice(0, 5), offsets, stored_at))
    assert torch.equal(average(labels), true_affinities(settings)(labels))


def test_naive_averages_of_flips_are_wrong() -> None:
    """The planted defect: flipped back, but read as the affinities of the same voxels."""
    offsets = OFFSETS[:6]
    network = true_affinities(settings_of(offsets, "source"))
    labels = labels_of(SHAPE, 0)[None, None].float()
    naive = whole_tile(averaged(parts_of(network), turns_of("flips"), slice(0, 0), offsets, "source"))
    wrong = (naive(labels) - network(labels)).abs()
    assert wrong.max() >= 0.5
    assert (wrong > 0).float().mean() > 0.05


def test_the_wrong_convention_is_wrong() -> None:
    network = true_affinities(settings_of(OFFSETS[:3], "source"))
    labels = labels_of(SHAPE, 0)[None, None].float()
    mixed = whole_tile(averaged(parts_of(network), turns_of("flips"), slice(0, 3), OFFSETS[:3], "destination"))
    assert (mixed(labels) - network(labels)).abs().max() > 0.2


def test_affinities_may_lie_between_other_channels() -> None:
    offsets = OFFSETS[:3]
    network = true_affinities(settings_of(offsets, "source"))

    def several(x: Tensor) -> Tensor:
        return torch.cat([x, network(x), -x], 1)

    labels = labels_of(SHAPE, 1)[None, None].float()
    average = whole_tile(averaged(parts_of(several), turns_of("all"), slice(1, 4), offsets, "source"))
    assert torch.equal(average(labels), several(labels))


@pytest.mark.parametrize("mode", MODES)
def test_channels_without_direction_are_the_mean_over_turns(mode: str) -> None:
    """A network that is not equivariant becomes equivariant under the turns of its mode."""
    generator = torch.Generator().manual_seed(0)
    weight, tile = torch.randn(2, 1, 3, 3, 3, generator=generator), torch.randn(1, 1, *SHAPE, generator=generator)

    def network(x: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(x, weight, padding=1).sigmoid()

    turns = turns_of(mode)
    average = whole_tile(averaged(parts_of(network), turns, slice(0, 0), NONE, "source"))
    mean = torch.stack([turn.back(network(turn.see(tile))) for turn in turns]).mean(0)
    torch.testing.assert_close(average(tile), mean)
    for turn in turns:
        torch.testing.assert_close(average(turn.see(tile)), turn.see(average(tile)))


def test_modes_are_the_groups_that_they_name() -> None:
    counts = {mode: len(turns_of(mode)) for mode in MODES}
    assert counts == {"none": 1, "flips": 8, "flips_in_plane": 4, "turns_in_plane": 8, "all": 16}
    for mode in MODES:
        turns = turns_of(mode)
        assert len(set(turns)) == len(turns)
        assert turns[0] == Turn((False, False, False), False), "the first is the tile as it is"
        seen = {tuple(turn.see(torch.arange(27).view(3, 3, 3)).flatten().tolist()) for turn in turns}
        assert len(seen) == len(turns), "no two are the same"


@pytest.mark.parametrize("turn", turns_of("all"))
def test_back_undoes_see_and_offsets_follow(turn: Turn) -> None:
    tile = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turn.back(turn.see(tile)), tile)
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"))
    seen = turn.see(place)  # for each seen voxel, where it lies in the tile
    for offset in OFFSETS[:3]:
        shape = (seen.shape[1], seen.shape[2], seen.shape[3])
        here, there = overlap(offset, shape)
        moved = (seen[(slice(None), *there)] - seen[(slice(None), *here)]).flatten(1).unique(dim=1)
        assert tuple(moved[:, 0].tolist()) == turn.offset_back(offset)


def test_overlap_pairs_each_voxel_with_its_partner() -> None:
    for shift in itertools.product((-4, -1, 0, 2, 5), repeat=3):
        here, there = overlap(shift, (3, 4, 5))
        place = np.stack(np.meshgrid(range(3), range(4), range(5), indexing="ij"))
        first, second = place[(slice(None), *here)], place[(slice(None), *there)]
        assert first.shape == second.shape
        assert (second - first == np.array(shift)[:, None, None, None]).all()
        assert first[0].size == np.prod([max(0, n - abs(s)) for n, s in zip((3, 4, 5), shift, strict=True)])


@pytest.mark.parametrize(
    ("mode", "offsets", "named"),
    [
        ("turns_in_plane", ((1, 0, 0), (0, 1, 0)), [0, 1, 0]),
        ("flips", ((1, 0, 0), (0, 2, 3)), [0, 2, 3]),
        ("all", ((0, 1, 0), (0, 0, 2)), [0, 1, 0]),
    ],
)
def test_offsets_that_turns_do_not_exchange_are_refused(
    mode: str, offsets: tuple[Triple, ...], named: list[int]
) -> None:
    with pytest.raises(UserError) as caught:
        averaged(parts_of(lambda x: x), turns_of(mode), slice(0, len(offsets)), offsets, "source")
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 1
    assert str(named) in caught.value.problems[0]
    assert "inference.tta=none" in caught.value.problems[0]


def test_flips_accept_what_turns_refuse() -> None:
    for turn in turns_of("flips"):
        assert len(affinity_moves(turn, ((1, 0, 0), (0, 1, 0)), "source")) == 2
