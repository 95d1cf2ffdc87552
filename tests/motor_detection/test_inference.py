"""Whole tomograms: tiles equal to the untiled network, flips on the same cells, slices decoded once, memory bounded."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.checkpoint import save_checkpoint
from common.config import as_yaml
from common.errors import UserError
from common.streams import random_for
from common.tiling import output_shape
from common.volumes.opening import open_volume
from common.volumes.slices import write_slice_folder
from common.volumes.volume import Volume
from motor_detection import inference
from motor_detection.config import KAGGLE, Config
from motor_detection.inference import (
    FLIPS,
    SlabCache,
    averaged_heatmap,
    check_same_grid,
    heatmap_logits,
    load_model,
    padded_shape,
    pick_motors,
    rounding_cost,
    working_copy,
)
from motor_detection.intensity import Intensity, measure_intensity
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.tomograms import Tomogram
from motor_detection.trainer import begin
from tests.motor_detection.small_runs import NO_PATCHES, random_network, small_config

CPU = torch.device("cpu")
SHAPE = (70, 101, 83)  # no multiples of 32, no two alike


def tomogram(folder: Path, voxels: np.ndarray) -> Tomogram:
    path = folder / "tomogram.npy"
    np.save(path, voxels)
    return Tomogram("tomogram", open_volume(path, "zyx"), (13.1, 13.1, 13.1))


def grey_noise(shape: tuple[int, int, int]) -> np.ndarray:
    return random_for("grey noise", *shape).integers(0, 256, shape).astype(np.uint8)


def with_tiles(tiling: str, tile: int) -> Config:
    changed = dataclasses.replace(
        KAGGLE.inference, tiling=tiling, tile_size=(tile, tile, tile), precision="float32", flips=False
    )
    return dataclasses.replace(
        KAGGLE, inference=changed, convert=dataclasses.replace(KAGGLE.convert, patch_size=(64, 64, 64))
    )


def normalised(volume: Tomogram) -> tuple[Tensor, Intensity]:
    """(1, 1, z, y, x) float32 of everything at once."""
    intensity = measure_intensity(volume.volume)
    voxels = volume.volume.read((0, 0, 0), volume.volume.shape).astype(np.float32)
    return torch.from_numpy((voxels - intensity.mean) / intensity.deviation)[None, None], intensity


@pytest.mark.parametrize(("stride", "tile"), [(2, 32), (4, 64), (8, 32), (16, 32), (16, 96)])
def test_tiles_give_what_the_whole_volume_gives(tmp_path: Path, stride: int, tile: int) -> None:
    model = random_network(stride, "batch", False)
    volume = tomogram(tmp_path, grey_noise(SHAPE))
    whole, intensity = normalised(volume)
    with torch.inference_mode():
        expected = model(whole)[0, 0]
    found = heatmap_logits(model, SlabCache(volume, intensity, {}), (), with_tiles("exact", tile), CPU)
    assert found.shape == output_shape(SHAPE, stride) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(8, 40, 33), (32, 32, 32), (1, 65, 129)])
def test_thin_and_small_volumes(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    model = random_network(16, "batch", False)
    volume = tomogram(tmp_path, grey_noise(shape))
    whole, intensity = normalised(volume)
    with torch.inference_mode():
        expected = model(whole)[0, 0]
    for flipped in FLIPS:
        found = heatmap_logits(model, SlabCache(volume, intensity, {}), flipped, with_tiles("exact", 32), CPU)
        assert found.shape == expected.shape
    torch.testing.assert_close(
        heatmap_logits(model, SlabCache(volume, intensity, {}), (), with_tiles("exact", 32), CPU),
        expected,
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("flipped", FLIPS)
def test_a_flip_is_the_network_on_the_reversed_volume(tmp_path: Path, flipped: tuple[int, ...]) -> None:
    """The reversed axes are filled up to whole cells, so that cells coincide; the map is turned back and cut."""
    model = random_network(16, "batch", False)
    volume = tomogram(tmp_path, grey_noise(SHAPE))
    whole, intensity = normalised(volume)
    seen = padded_shape(SHAPE, flipped, model.deepest_stride)
    missing = [end - n for end, n in zip(seen, SHAPE, strict=True)]
    filled = nn.functional.pad(whole, (0, missing[2], 0, missing[1], 0, missing[0]))
    with torch.inference_mode():
        reverse = model(filled.flip([axis + 2 for axis in flipped]))[0, 0].flip(flipped)
    cells = output_shape(SHAPE, 16)
    found = heatmap_logits(model, SlabCache(volume, intensity, {}), flipped, with_tiles("exact", 32), CPU)
    torch.testing.assert_close(found, reverse[: cells[0], : cells[1], : cells[2]], atol=1e-4, rtol=0)


class CellMeans(nn.Module):
    """Stands in for a network that looks at each cell's own voxels only: no direction is special to it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.stem = nn.Conv3d(1, 1, 1)  # says the precision
        self.deepest_stride = 32

    def forward(self, volume: Tensor) -> Tensor:
        missing = [-n % self.stride for n in volume.shape[2:]]
        filled = nn.functional.pad(volume, (0, missing[2], 0, missing[1], 0, missing[0]))
        return nn.functional.avg_pool3d(filled, self.stride)


@pytest.mark.parametrize("stride", [2, 16])
def test_flipped_maps_lie_on_the_same_cells(tmp_path: Path, stride: int) -> None:
    """One bright voxel per corner region: every flip must show each in its own cell, to rounding."""
    voxels = np.full(SHAPE, 100, np.uint8)
    for place in [(0, 0, 0), (69, 100, 82), (3, 97, 40), (35, 50, 81)]:
        voxels[place] = 200
    volume = tomogram(tmp_path, voxels)
    intensity = Intensity(0.0, 255.0, 100.0, 1.0)
    config = dataclasses.replace(
        with_tiles("blended", 32), convert=dataclasses.replace(KAGGLE.convert, patch_size=(96, 128, 96))
    )  # one window holds everything
    maps = [heatmap_logits(CellMeans(stride), SlabCache(volume, intensity, {}), f, config, CPU) for f in FLIPS]  # type: ignore[arg-type]
    assert (maps[0] > 0).sum() == 4 and maps[0][0, 0, 0] > 0 and maps[0][-1, -1, -1] > 0
    for flipped in maps[1:]:
        torch.testing.assert_close(flipped, maps[0])


def test_the_average_is_over_probabilities_of_models_and_flips(tmp_path: Path) -> None:
    models = [random_network(16, "batch", False) for _ in range(2)]
    with torch.no_grad():
        models[1].logit.bias += 1.0
    volume = tomogram(tmp_path, grey_noise((40, 50, 60)))
    intensity = measure_intensity(volume.volume)
    plain = with_tiles("exact", 64)
    flips = dataclasses.replace(plain, inference=dataclasses.replace(plain.inference, flips=True))
    single = [
        [heatmap_logits(m, SlabCache(volume, intensity, {}), f, plain, CPU).sigmoid() for f in FLIPS] for m in models
    ]
    expected = torch.stack([probability for maps in single for probability in maps]).mean(0)
    np.testing.assert_allclose(averaged_heatmap(models, volume, flips, CPU), expected, atol=1e-6)
    expected = torch.stack([maps[0] for maps in single]).mean(0)
    np.testing.assert_allclose(averaged_heatmap(models, volume, plain, CPU), expected, atol=1e-6)


@pytest.mark.parametrize(("norm", "squeeze_excitation"), [("group", False), ("batch", True)])
def test_blended_windows_serve_networks_that_see_their_whole_window(
    tmp_path: Path, norm: str, squeeze_excitation: bool
) -> None:
    """Finite everywhere, near the untiled map but not equal to it; equal where one window holds the volume."""
    model = random_network(16, norm, squeeze_excitation)  # type: ignore[arg-type]
    volume = tomogram(tmp_path, grey_noise(SHAPE))
    whole, intensity = normalised(volume)
    with torch.inference_mode():
        expected = model(whole)[0, 0]
    blended = heatmap_logits(model, SlabCache(volume, intensity, {}), (), with_tiles("blended", 32), CPU)
    assert blended.shape == expected.shape and torch.isfinite(blended).all()
    assert not torch.equal(blended, expected)
    assert np.corrcoef(blended.flatten(), expected.flatten())[0, 1] > 0.5
    wide = dataclasses.replace(KAGGLE, inference=with_tiles("blended", 32).inference)
    torch.testing.assert_close(heatmap_logits(model, SlabCache(volume, intensity, {}), (), wide, CPU), expected)


def test_every_slice_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although tiles of 32 voxels and their halos overlap; also where z is reversed."""
    write_slice_folder(grey_noise(SHAPE), tmp_path / "slices", ".png", 95)
    volume = Tomogram("slices", open_volume(tmp_path / "slices", "zyx"), (13.1,) * 3)
    intensity = measure_intensity(volume.volume)
    decoded: list[int] = []
    whole_read = Volume.read

    def counted(self: Volume, corner: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
        decoded.extend(range(corner[0], corner[0] + size[0]))
        return whole_read(self, corner, size)

    monkeypatch.setattr(Volume, "read", counted)
    model = random_network(16, "batch", False)
    for flipped in [(), (0,), (1, 2)]:
        decoded.clear()
        heatmap_logits(model, SlabCache(volume, intensity, {}), flipped, with_tiles("exact", 32), CPU)
        assert sorted(decoded) == list(range(SHAPE[0]))


def test_the_cache_forgets_slices_behind_the_tile(tmp_path: Path) -> None:
    volume = tomogram(tmp_path, grey_noise(SHAPE))
    cache = SlabCache(volume, Intensity(0.0, 255.0, 128.0, 64.0), {})
    cache.read(((0, 0, 0), (30, 20, 20)))
    box = cache.read(((20, 10, 5), (50, 40, 45)))
    assert sorted(cache.slices) == list(range(20, 50))
    voxels = volume.volume.read((20, 10, 5), (30, 30, 40)).astype(np.float32)
    np.testing.assert_allclose(box[0, 0], (voxels - 128) / 64)


def test_a_large_map_lies_in_a_file_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_network(16, "batch", False)
    volume = tomogram(tmp_path, grey_noise(SHAPE))
    intensity = measure_intensity(volume.volume)
    in_memory = heatmap_logits(model, SlabCache(volume, intensity, {}), (), with_tiles("exact", 32), CPU)
    mapped: list[Path] = []
    from_file = torch.from_file

    def noted(path: str, shared: bool, size: int, dtype: torch.dtype) -> Tensor:
        mapped.append(Path(path))
        return from_file(path, shared=shared, size=size, dtype=dtype)

    monkeypatch.setattr(torch, "from_file", noted)
    monkeypatch.setattr(inference, "IN_MEMORY_BYTES", 1000)
    in_file = heatmap_logits(model, SlabCache(volume, intensity, {}), (), with_tiles("exact", 32), CPU)
    assert len(mapped) == 1 and not mapped[0].exists(), "the file must be gone afterwards"
    assert torch.equal(in_file, in_memory)


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16_costs_little_and_says_how_much(tmp_path: Path) -> None:
    model = random_network(16, "batch", False)
    volume = tomogram(tmp_path, grey_noise(SHAPE))
    whole, intensity = normalised(volume)
    config = with_tiles("exact", 64)
    assert rounding_cost(model, volume, config, CPU) == 0.0
    fast = dataclasses.replace(config, inference=dataclasses.replace(config.inference, precision="bfloat16"))
    said = rounding_cost(model, volume, fast, CPU)
    assert 0 < said < 0.1
    rounded = heatmap_logits(working_copy(model, "bfloat16"), SlabCache(volume, intensity, {}), (), fast, CPU)
    with torch.inference_mode():
        exact = model(whole)[0, 0]
    assert rounded.dtype == torch.float32
    assert (rounded.sigmoid() - exact.sigmoid()).abs().max() < 2 * said + 0.02
    assert model.stem.weight.dtype == torch.float32, "the copy is rounded, not the model"


def test_picks_lie_inside_the_tomogram(tmp_path: Path) -> None:
    """Cells at the end reach beyond it; picks do not."""
    volume = tomogram(tmp_path, grey_noise((33, 49, 65)))
    config = with_tiles("exact", 32)
    config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, min_distance_angstrom=0.0))
    peaks = pick_motors([random_network(16, "batch", False)], volume, config, CPU)
    assert len(peaks.points) > 0
    assert ((peaks.points >= -0.5) & (peaks.points <= np.array([33, 49, 65]) - 0.5)).all()


def test_a_model_comes_back_with_its_config(tmp_path: Path) -> None:
    """best.pt and last.pt both hold the averaged weights; the config is the one that was trained."""
    config = small_config(tmp_path)
    state = begin(config, CPU)
    with torch.no_grad():
        state.average.logit.bias += 1.0
    save_checkpoint(state.as_checkpoint(config, NO_PATCHES), tmp_path / "last.pt")
    model, found = load_model(tmp_path / "last.pt", CPU)
    assert isinstance(model, MotorIdentifier) and not model.training
    assert as_yaml(found) == as_yaml(config)
    for name, value in state.average.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_models_of_other_grids_are_not_averaged() -> None:
    other = dataclasses.replace(KAGGLE, model=dataclasses.replace(KAGGLE.model, stride=8))
    with pytest.raises(UserError) as caught:
        check_same_grid([KAGGLE, other], [Path("a.pt"), Path("b.pt")])
    assert "b.pt" in caught.value.problems[0]
