"""A network over a whole volume: tiles change nothing, ranges of planes have the bits of the whole."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.tiling import exact_tiles
from common.volumes.opening import open_volume
from em_segmentation.config import Config
from em_segmentation.inference import (
    Reader,
    as_bytes,
    as_probabilities,
    exact_layout,
    load_model,
    probability_network,
    rounding_cost,
    row_starts,
    window_of,
    working_copy,
    written_channels,
)
from em_segmentation.model_defs.registry import ARCHITECTURES, SegmentationModel, build_model
from em_segmentation.objective import channel_ranges
from em_segmentation.regions import everywhere
from em_segmentation.turns import PartNetwork
from tests.em_segmentation.small_networks import (
    SCALE,
    changed,
    image_at,
    predicted_planes,
    random_model,
    small_config,
    write_checkpoint,
)

ISOTROPIC, ANISOTROPIC = (8.0, 8.0, 8.0), (40.0, 10.0, 10.0)
OFFSETS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 0), (0, 5, 0), (0, 0, 5))


def predicted(model: SegmentationModel, path: Path, config: Config, planes: tuple[int, int]) -> np.ndarray:
    """Bytes [C, dz, y, x] of a range of planes of the image at a path."""
    image = image_at(path, SHAPE, 0)
    parts = list(predicted_planes(model, image, SCALE, config, planes))
    assert [first for first, _ in parts] == [
        planes[0] + sum(p.shape[1] for _, p in parts[:k]) for k in range(len(parts))
    ]
    return np.concatenate([part for _, part in parts], 1)


SHAPE = (21, 37, 30)


@torch.inference_mode()
def largest_difference(config: Config, path: Path, shape: tuple[int, int, int]) -> float:
    """Between probabilities in exact tiles and those of the whole volume at once, padded to the network's grid."""
    model, image = random_model(config, 3), image_at(path, shape, 1)
    padded, _, _ = exact_layout(model, shape, config)
    read = Reader(image, SCALE, model, padded)
    network = probability_network(model, config)
    whole = network(read(((0, 0, 0), padded)), everywhere(torch.empty(padded)))[
        0, :, : shape[0], : shape[1], : shape[2]
    ]
    tiled, tiles_read = exact_floats(network, config, model, read, shape)
    assert tiles_read > 1, "a test of tiles needs several"
    assert whole.std() > 0.02, "a constant output would prove nothing"
    return float((tiled - whole).abs().max())


def exact_floats(
    network: PartNetwork,
    config: Config,
    model: SegmentationModel,
    read: Reader,
    shape: tuple[int, int, int],
) -> tuple[Tensor, int]:
    """What exact_planes rounds to bytes, before it does."""
    padded, edges, halo = exact_layout(model, shape, config)
    assert model.alignment is not None
    output, count = torch.empty(0), 0
    for tile in exact_tiles(padded, edges, 1, model.alignment, halo):
        found, count = network(read(tile.read), tile.keep)[0], count + 1
        output = found.new_full((len(found), *padded), torch.nan) if output.dim() == 1 else output
        output[(slice(None), *tile.write)] = found
    return output[:, : shape[0], : shape[1], : shape[2]], count


@pytest.mark.parametrize("voxel_size", [ISOTROPIC, ANISOTROPIC])
@pytest.mark.parametrize(
    ("tta", "tile"),
    [("none", (8, 16, 16)), ("none", (4, 4, 4)), ("flips_in_plane", (8, 16, 16)), ("all", (12, 16, 20))],
)
def test_exact_tiles_equal_the_whole_volume(
    tmp_path: Path, voxel_size: tuple[float, float, float], tta: str, tile: tuple[int, int, int]
) -> None:
    """Odd shapes, tiles smaller than the halo, batch norm with statistics of its own, turned affinities."""
    config = changed(
        small_config(),
        data={"voxel_size_nm": voxel_size},
        inference={"tile_size": tile, "tta": tta},
        targets={"affinity_offsets": OFFSETS},
    )
    shape = SHAPE if tile[0] > 4 else (9, 14, 11)
    assert largest_difference(config, tmp_path / "image.npy", shape) <= 1e-5


def test_a_halo_that_forgets_the_affinities_reach_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defect: turned, an affinity is read one offset further, beyond the network's own halo."""
    config = changed(small_config(), inference={"tta": "flips", "tile_size": (8, 8, 8)}, model={"filters": (3, 4)},
                     targets={"affinity_offsets": ((9, 0, 0), (0, 9, 0), (0, 0, 9))})  # fmt: skip
    assert largest_difference(config, tmp_path / "image.npy", (13, 18, 12)) <= 1e-5
    right = exact_layout
    monkeypatch.setattr(
        "tests.em_segmentation.test_inference.exact_layout",
        lambda model, shape, config: (*right(model, shape, config)[:2], model.halo),
    )
    assert largest_difference(config, tmp_path / "image.npy", (13, 18, 12)) > 1e-4


def test_statistics_of_the_tile_are_refused_in_exact_tiles(tmp_path: Path) -> None:
    """Group norm looks at the whole tile: stitched would differ from untiled, so it must be asked for as blended."""
    config = changed(small_config(), model={"norm": "group", "filters": (8, 8)})
    with pytest.raises(UserError, match="rsunet with model.norm=group looks at whole windows; expected .*blended"):
        predicted(random_model(config, 0), tmp_path / "image.npy", config, (0, 4))


@pytest.mark.parametrize("tiling", ["exact", "blended"])
@pytest.mark.parametrize("tta", ["none", "flips"])
def test_any_range_of_planes_has_the_bits_of_the_whole(tmp_path: Path, tiling: str, tta: str) -> None:
    config = changed(
        small_config(),
        inference={"tiling": tiling, "tta": tta, "tile_size": (8, 40, 40), "window_size": (8, 16, 16), "overlap": 0.4},
    )
    model, path = random_model(config, 0), tmp_path / "image.npy"
    whole = predicted(model, path, config, (0, SHAPE[0]))
    assert whole.shape == (4, *SHAPE)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole)) > 20
    for first, last in ((3, 4), (7, 9), (8, 16), (20, 21)):
        assert np.array_equal(predicted(model, path, config, (first, last)), whole[:, first:last]), (first, last)


@pytest.mark.parametrize("tiling", ["exact", "blended"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 40, 3), (3, 5, 7), (17, 8, 8)])
def test_volumes_smaller_than_a_tile_or_window(tmp_path: Path, tiling: str, shape: tuple[int, int, int]) -> None:
    config = changed(small_config(), inference={"tiling": tiling, "window_size": (16, 16, 16)})
    model, image = random_model(config, 0), image_at(tmp_path / "image.npy", shape, 0)
    parts = [part for _, part in predicted_planes(model, image, SCALE, config, (0, shape[0]))]
    assert np.concatenate(parts, 1).shape == (4, *shape)


class Local(nn.Module):
    """Sees nothing but the voxel: windows must not change it, wherever they lie."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x, x * 2, x + 1], 1)


def test_windows_stand_in_their_place(tmp_path: Path) -> None:
    """Blended windows of a network without reach give exactly the voxels' own values, of every asymmetric axis."""
    config = changed(small_config(), inference={"tiling": "blended", "window_size": (8, 16, 12), "overlap": 0.3})
    model = SegmentationModel("rsunet", Local())
    model.register_parameter("device", nn.Parameter(torch.zeros(1)))
    found = predicted(model, tmp_path / "image.npy", config, (0, SHAPE[0]))
    grey = torch.from_numpy((np.load(tmp_path / "image.npy").astype(np.float32) - 128) / 40)
    expected = torch.stack([grey, -grey, grey * 2, grey + 1]).sigmoid() * 255
    assert np.abs(found - expected.numpy()).max() <= 0.5 + 1e-3


def test_axes_keep_their_order(tmp_path: Path) -> None:
    """A file said to be xyz is predicted as its transpose: asymmetric shapes would show any mix-up."""
    config = small_config()
    model, image = random_model(config, 0), image_at(tmp_path / "zyx.npy", SHAPE, 0)
    np.save(tmp_path / "xyz.npy", np.load(tmp_path / "zyx.npy").transpose(2, 1, 0))
    other = open_volume(tmp_path / "xyz.npy", "xyz")
    one, two = (
        np.concatenate([part for _, part in predicted_planes(model, volume, SCALE, config, (0, SHAPE[0]))], 1)
        for volume in (image, other)
    )
    assert np.array_equal(one, two)


def test_several_channels_of_the_image(tmp_path: Path) -> None:
    config = changed(small_config(), model={"in_channels": 2})
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 255, (2, *SHAPE), np.uint8))
    image = open_volume(tmp_path / "image.npy", "czyx")
    scale = dataclasses.replace(SCALE, mean=(128.0, 100.0), deviation=(40.0, 20.0))
    found = [part for _, part in predicted_planes(random_model(config, 0), image, scale, config, (0, 21))]
    assert np.concatenate(found, 1).shape == (4, *SHAPE)


def test_what_is_written_and_what_is_not() -> None:
    """Auxiliary targets are left out wherever they stand; classes sum to 1; distances lie between 0 and 1."""
    targets = dataclasses.replace(
        small_config().targets, names=("centre", "affinity", "lsd", "semantic", "distance"), semantic_classes=4
    )
    assert written_channels(targets) == {"affinity": slice(0, 3), "semantic": slice(3, 7), "distance": slice(7, 8)}
    channels = sum(part.stop - part.start for part in channel_ranges(targets).values())
    logits = torch.randn(1, channels, 2, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    found = as_probabilities(logits.bfloat16(), targets)
    assert found.shape == (1, 8, 2, 3, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 3:7].sum(1), torch.ones(1, 2, 3, 4))
    torch.testing.assert_close(found[:, :3], logits[:, 3:6].bfloat16().float().sigmoid())
    torch.testing.assert_close(found[:, 7], (logits[:, -1].bfloat16().float().tanh() + 1) / 2)
    assert 0 <= found.min() <= found.max() <= 1


def test_only_auxiliary_targets_leave_nothing_to_write() -> None:
    targets = dataclasses.replace(small_config().targets, names=("lsd", "centre"))
    with pytest.raises(UserError, match=r"targets\.names: lsd, centre only help training"):
        written_channels(targets)


def test_classes_and_distances_of_a_whole_volume(tmp_path: Path) -> None:
    config = changed(
        small_config(),
        targets={
            "names": ("lsd", "semantic", "distance"), "semantic_classes": 3, "semantic_names": ("a", "b"),
            "weights": (1.0,) * 3, "label_channels": (0,) * 3,
        },
    )  # fmt: skip
    found = predicted(random_model(config, 0), tmp_path / "image.npy", config, (0, SHAPE[0]))
    assert found.shape == (4, *SHAPE)
    assert np.abs(found[:3].astype(int).sum(0) - 255).max() <= 1, "three rounded shares of 255"


@pytest.mark.parametrize("tiling", ["exact", "blended"])
def test_rows_part_the_volume_where_work_is_not_shared(tmp_path: Path, tiling: str) -> None:
    """No tile or window that two ranges share, but for the overlap of windows: their inputs are read once."""
    config = changed(small_config(), inference={"tiling": tiling, "window_size": (8, 40, 32), "overlap": 0.0,
                                                "tile_size": (8, 64, 64)})  # fmt: skip
    model = random_model(config, 0)
    starts = row_starts(model, (40, 37, 30), config)
    image, read = image_at(tmp_path / "image.npy", (40, 37, 30), 0), []
    part = model.part
    model.part = lambda x, region: (read.append(1), part(x, region))[1]  # type: ignore[func-returns-value,method-assign]
    ends = [*starts[1:], 40]
    for first, last in zip(starts, ends, strict=True):
        list(predicted_planes(model, image, SCALE, config, (first, last)))
    assert len(read) == len(starts) == 5


def test_bytes_are_rounded_and_finite() -> None:
    found = as_bytes(torch.tensor([0.0, 0.0019, 0.002, 0.5, 0.998, 1.0]), Path("image.npy"))
    assert found.tolist() == [0, 0, 1, 128, 254, 255]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"image\.npy: the network's output is not finite there; try inference"):
            as_bytes(torch.tensor([0.5, bad]), Path("image.npy"))


@pytest.mark.usefixtures("bfloat16")
def test_working_precision(tmp_path: Path) -> None:
    """bfloat16 is a copy, its cost is told, small and not zero; float32 costs nothing, also on volumes below a patch."""
    config = changed(small_config(), inference={"precision": "bf16"})
    model = random_model(config, 0)
    fast = working_copy(model, "bf16")
    assert next(fast.parameters()).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    for shape in (SHAPE, (3, 10, 9)):
        image = image_at(tmp_path / "image.npy", shape, 0)
        assert 0 < rounding_cost(model, image, SCALE, config) < 0.1
        plain = changed(config, inference={"precision": "32", "tta": "all"})
        assert rounding_cost(model, image, SCALE, plain) < 1e-6, "only norms became part of convolutions"


def test_the_rounding_cost_of_a_network_of_whole_windows_on_a_thin_volume(tmp_path: Path) -> None:
    """It asks for multiples of 16; the volume has 5 sections."""
    config = changed(small_config(), model={"architecture": "mednext_custom", "mednext_base_channels": 2,
                     "mednext_exp_r": (1,) * 9, "mednext_block_counts": (1,) * 9}, data={"patch_size": (16, 32, 16)},
                     inference={"tiling": "blended", "precision": "bf16"})  # fmt: skip
    image = image_at(tmp_path / "image.npy", (5, 20, 17), 0)
    assert rounding_cost(random_model(config, 0), image, SCALE, config) < 0.5


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_windows_that_a_network_does_not_take_are_told(architecture: str) -> None:
    filters = (4, 4, 8, 8, 16, 4) if architecture == "basic_unet3d" else (4, 8, 8)
    config = changed(small_config(), model={"architecture": architecture, "filters": filters, "feature_size": 12,
                     "mednext_base_channels": 2}, data={"patch_size": (32, 32, 64)},
                     inference={"tiling": "blended", "window_size": (32, 32, 64)})  # fmt: skip
    with torch.device("meta"):
        model = build_model(config)
    assert window_of(model, config) == (32, 32, 64)
    odd = changed(config, inference={"window_size": (33, 32, 64)})
    if architecture in ("basic_unet3d", "rsunet"):  # any size
        assert window_of(model, odd) == (33, 32, 64)
        return
    with pytest.raises(UserError, match=r"inference\.window_size: .* takes multiples of"):
        window_of(model, odd)


def test_unetr_knows_only_the_windows_of_its_training() -> None:
    config = changed(small_config(), model={"architecture": "unetr"}, data={"patch_size": (16, 16, 32)},
                     inference={"tiling": "blended"})  # fmt: skip
    with torch.device("meta"):
        model = build_model(config)
    for change, words in (
        (
            {"window_size": (16, 32, 32)},
            r"inference\.window_size: unetr knows .*\[16, 16, 32\]",
        ),
        (
            {"tta": "all"},
            r"inference\.tta: all turns windows of \[16, 16, 32\]; unetr takes only square ones: use flips",
        ),
    ):
        with pytest.raises(UserError, match=words):
            window_of(model, changed(config, inference=change))


def test_a_network_that_is_not_alike_along_y_and_x_is_not_turned() -> None:
    config = changed(small_config(), inference={"tta": "turns_in_plane"})
    model = random_model(config, 0)
    assert model.halo is not None
    model.halo = (model.halo[0], model.halo[1], model.halo[2] + 1)
    with pytest.raises(UserError, match=r"inference\.tta: turns_in_plane turns y into x, .*: use flips"):
        exact_layout(model, SHAPE, config)
    exact_layout(model, SHAPE, changed(config, inference={"tta": "flips"}))


def test_voxels_that_are_not_finite_are_told(tmp_path: Path) -> None:
    voxels = np.ones((9, 9, 9), np.float32)
    voxels[4, 5, 6] = np.nan
    np.save(tmp_path / "image.npy", voxels)
    config = small_config()
    with pytest.raises(UserError, match=r"image\.npy: holds NaN or infinite voxels"):
        list(
            predicted_planes(
                random_model(config, 0), open_volume(tmp_path / "image.npy", "auto"), SCALE, config, (0, 9)
            )
        )


def test_a_checkpoint_gives_its_network_back(tmp_path: Path) -> None:
    config = small_config()
    write_checkpoint(config, tmp_path / "best.pt", 5)
    model, trained = load_model(tmp_path / "best.pt", torch.device("cpu"))
    assert trained == config
    assert not model.training
    own = random_model(config, 5).state_dict()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_tiles_lie_on_the_networks_grid_whatever_size_is_asked_for() -> None:
    config = small_config()
    model = random_model(config, 0)
    assert model.alignment is not None
    for size, shape in itertools.product(((1, 1, 1), (5, 30, 99), (1000, 1000, 1000)), (SHAPE, (1, 1, 1), (8, 16, 16))):
        padded, edges, _ = exact_layout(model, shape, changed(config, inference={"tile_size": size}))
        for n, whole, edge, grid in zip(shape, padded, edges, model.alignment, strict=True):
            assert whole % grid == edge % grid == 0
            assert 0 <= whole - n < grid
            assert grid <= edge <= whole
