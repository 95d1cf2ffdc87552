"""Decoding block by block gives the labels of decoding at once, to the bit; killed runs continue; errors name a remedy."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from common.errors import UserError
from common.streams import random_for
from em_segmentation.decoding import block_passes
from em_segmentation.decoding.blocks import decode_blocks, write_decoded
from em_segmentation.decoding.executors import Executor, Serial, open_executor
from em_segmentation.decoding.links import Volume
from em_segmentation.decoding.pipeline import heights_of, segment, segment_at
from em_segmentation.decoding.settings import Settings
from em_segmentation.regions import Triple

OFFSETS = ((1, 0, 0), (0, -1, 0), (0, 0, 1), (3, 0, 0), (0, 4, -2), (0, 0, -5))


@dataclasses.dataclass(frozen=True)
class NpyReader:
    """Channels [c, z, y, x] of a .npy file."""

    path: Path

    @property
    def shape(self) -> Triple:
        z, y, x = np.load(self.path, mmap_mode="r").shape[1:]
        return z, y, x

    @property
    def num_channels(self) -> int:
        return len(np.load(self.path, mmap_mode="r"))

    def read_channels(self, corner: Triple, size: Triple) -> Volume:
        where = tuple(slice(first, first + n) for first, n in zip(corner, size, strict=True))
        return np.load(self.path, mmap_mode="r")[(slice(None), *where)]


@dataclasses.dataclass(frozen=True)
class NpyWriter:
    """Labels in a .npy file of uint32."""

    path: Path

    def write(self, corner: Triple, labels: npt.NDArray[np.unsignedinteger]) -> None:
        where = tuple(slice(first, first + n) for first, n in zip(corner, labels.shape, strict=True))
        np.load(self.path, mmap_mode="r+")[where] = labels


def smooth_volume(number: int, channels: int, shape: Triple, levels: int) -> Volume:
    """Smooth random channels of few levels (plateaus), one corner empty and one full."""
    noise = random_for("volume", number).normal(size=(channels, *shape))
    smooth = np.stack([scipy.ndimage.gaussian_filter(channel, 1.2) for channel in noise])
    ranks = smooth.reshape(-1).argsort().argsort().reshape(smooth.shape)
    volume = ((ranks * levels // ranks.size) * (255 // (levels - 1))).astype(np.uint8)
    volume[:, :, :7, :7] = 0
    volume[:, :, -8:, -9:] = 255
    return volume


def segment_blocks(
    reader: NpyReader, writer: NpyWriter, settings: Settings, block: Triple, scratch: Path, executor: Executor
) -> int:
    decoded = decode_blocks(reader, settings, block, scratch, executor)
    write_decoded(decoded, writer, executor)
    return decoded.num_objects


def in_blocks(volume: Volume, settings: Settings, block: Triple, folder: Path) -> npt.NDArray[np.uint32]:
    folder.mkdir()
    np.save(folder / "volume.npy", volume)
    np.save(folder / "labels.npy", np.full(volume.shape[1:], 2**32 - 1, np.uint32))
    reader, writer = NpyReader(folder / "volume.npy"), NpyWriter(folder / "labels.npy")
    count = segment_blocks(reader, writer, settings, block, folder / "scratch", Serial())
    labels: npt.NDArray[np.uint32] = np.load(folder / "labels.npy")
    assert count == labels.max(initial=0)
    return labels


BASE = Settings(offsets=OFFSETS, smoothing=(1, 1, 1), min_depth=4, threshold=150)
CASES = {
    "components": dataclasses.replace(BASE, method="components", threshold=150, min_size=3),
    "components of sections": dataclasses.replace(BASE, method="components", threshold=140, neighbours="sections"),
    "mean": BASE,
    "mean, no depth": dataclasses.replace(BASE, min_depth=0, smoothing=(0, 0, 0)),
    "mean, deep": dataclasses.replace(BASE, min_depth=40, threshold=130),
    "mean without walls": dataclasses.replace(BASE, wall=0),
    "mean with many walls": dataclasses.replace(BASE, wall=255, smoothing=(0, 0, 0)),
    "mean of foreground": dataclasses.replace(BASE, foreground=110, min_size=20),
    "mean, small joined": dataclasses.replace(BASE, min_size=30, small="join"),
    "mean of sections": dataclasses.replace(BASE, neighbours="sections", smoothing=(0, 2, 1)),
    "quantile": dataclasses.replace(BASE, linkage="quantile", quantile=60, bins=16, foreground=60),
    "distance": dataclasses.replace(BASE, height="distance", distance_reach=5, smoothing=(0, 1, 0), min_depth=0),
    "distance of sections": dataclasses.replace(BASE, height="distance", distance_reach=4, neighbours="sections"),
    "mutex": dataclasses.replace(BASE, method="mutex", stored_at="destination"),
    "mutex of foreground": dataclasses.replace(BASE, method="mutex", foreground=120, min_size=4),
    "holes": dataclasses.replace(BASE, foreground=100, wall=0, fill_holes=True),
    "holes of components": dataclasses.replace(BASE, method="components", threshold=190, min_size=6, fill_holes=True),
    "boundary": Settings(input="boundary", min_depth=6, threshold=150),
    "boundary, foreground": Settings(input="boundary", foreground=100, linkage="quantile", smoothing=(0, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_give_the_labels_of_the_whole_volume(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    num_objects = []
    for number, (levels, block) in enumerate([(40, (5, 8, 7)), (4, (13, 6, 9)), (256, (3, 18, 19))]):
        channels = 1 if settings.input == "boundary" else len(OFFSETS)
        volume = smooth_volume(number, channels, (13, 18, 19), levels)
        whole = segment(volume, settings)
        assert np.array_equal(in_blocks(volume, settings, block, tmp_path / str(number)), whole)
        num_objects.append(int(whole.max()))
    assert max(num_objects) > 3, num_objects


def test_holes_across_blocks_are_filled_where_one_object_encloses_them(tmp_path: Path) -> None:
    volume = np.full((3, 12, 14, 14), 255, np.uint8)
    volume[:, 3:9, 3:9, 3:9] = 0  # a hole in many blocks
    volume[:, 5, 5, 5] = 255  # in it four voxels, too few for an object
    volume[:, 3:6, 11:, 11:] = 0  # a notch that reaches the volume's face
    settings = Settings(method="components", min_size=5, fill_holes=True)
    labels = in_blocks(volume, settings, (4, 5, 6), tmp_path / "filled")
    assert np.array_equal(labels, segment(volume, settings))
    assert (labels[3:9, 3:9, 3:9] == 1).all() and (labels[4, 12:, 12:] == 0).all()
    assert not in_blocks(volume, dataclasses.replace(settings, fill_holes=False), (4, 5, 6), tmp_path / "left")[5, 5, 5]


@pytest.mark.parametrize("value", [0, 255])
def test_volumes_of_one_value(value: int, tmp_path: Path) -> None:
    volume = np.full((6, 9, 9, 9), value, np.uint8)
    for number, settings in enumerate(CASES.values()):
        if settings.input == "affinities":
            labels = in_blocks(volume, settings, (4, 5, 9), tmp_path / str(number))
            assert np.array_equal(labels, segment(volume, settings))
            assert labels.max() <= (1 if settings.neighbours == "volume" else 9)


def test_a_killed_run_continues_with_the_blocks_that_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = smooth_volume(3, 6, (10, 18, 18), 50)
    np.save(tmp_path / "volume.npy", volume)
    np.save(tmp_path / "labels.npy", np.zeros((10, 18, 18), np.uint32))
    reader, writer = NpyReader(tmp_path / "volume.npy"), NpyWriter(tmp_path / "labels.npy")
    done: list[tuple[int, ...]] = []

    def read(self: NpyReader, corner: Triple, size: Triple) -> Volume:
        done.append(corner)
        if len(done) in (5, 14, 21):
            raise KeyboardInterrupt
        return volume[(slice(None), *(slice(a, a + n) for a, n in zip(corner, size, strict=True)))]

    monkeypatch.setattr(NpyReader, "read_channels", read)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            segment_blocks(reader, writer, BASE, (5, 9, 9), tmp_path / "scratch", Serial())
    segment_blocks(reader, writer, BASE, (5, 9, 9), tmp_path / "scratch", Serial())
    assert len(done) == 8 + 2 * 8 + 3  # a block is read once, then twice; the interrupted ones from anew
    assert np.array_equal(np.load(tmp_path / "labels.npy"), segment(volume, BASE))
    assert not list((tmp_path / "scratch").glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_workers_elsewhere_give_the_same_labels(kind: str, tmp_path: Path) -> None:
    if kind == "dask":
        pytest.importorskip("distributed")
    volume = smooth_volume(7, 6, (12, 30, 30), 60)
    np.save(tmp_path / "volume.npy", volume)
    np.save(tmp_path / "labels.npy", np.zeros((12, 30, 30), np.uint32))
    reader, writer = NpyReader(tmp_path / "volume.npy"), NpyWriter(tmp_path / "labels.npy")
    with open_executor(kind, 2, "") as executor:
        segment_blocks(reader, writer, CASES["mutex"], (6, 10, 15), tmp_path / "scratch", executor)
    assert np.array_equal(np.load(tmp_path / "labels.npy"), segment(volume, CASES["mutex"]))


def test_interior_basins_are_merged_inside_their_block(tmp_path: Path) -> None:
    """Else the tables of a large volume would hold every basin of noise."""
    volume = smooth_volume(1, 6, (12, 24, 24), 200)
    np.save(tmp_path / "volume.npy", volume)
    settings = dataclasses.replace(BASE, min_depth=10**7, smoothing=(0, 0, 0))
    decoded = decode_blocks(NpyReader(tmp_path / "volume.npy"), settings, (12, 24, 12), tmp_path / "scratch", Serial())
    merged = [decoded.job.load(f"merged_{b}") for b in range(2)]
    assert sum(map(len, merged)) > 0.3 * len(decoded.job.load("floors"))
    assert decoded.num_objects == 1 and decoded.dtype == np.uint8
    np.save(tmp_path / "labels.npy", np.zeros((12, 24, 24), np.uint32))
    write_decoded(decoded, NpyWriter(tmp_path / "labels.npy"), Serial())
    assert (np.load(tmp_path / "labels.npy") == 1).all()


def test_several_thresholds_are_those_of_separate_runs() -> None:
    volume = smooth_volume(2, 6, (10, 16, 16), 90)
    for settings in (BASE, CASES["quantile"], CASES["components"]):
        results = segment_at(volume, settings, (200, 140, 100))
        for threshold, result in zip((200, 140, 100), results, strict=True):
            assert np.array_equal(result, segment(volume, dataclasses.replace(settings, threshold=threshold)))


def test_the_scale_of_heights_is_known_without_a_volume() -> None:
    for settings in CASES.values():
        volume = np.zeros((1 if settings.input == "boundary" else 6, 3, 3, 3), np.uint8)
        assert heights_of(volume, settings)[0].scale == settings.height_scale


def test_problems_are_named(tmp_path: Path) -> None:
    volume = smooth_volume(0, 6, (4, 8, 8), 9)
    with pytest.raises(UserError, match="has 2 channels .expected 6.: correct input or offsets"):
        segment(volume[:2], BASE)
    with pytest.raises(UserError, match=r"holds float32 \(expected uint8, probability \* 255\)"):
        segment(volume.astype(np.float32), BASE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="decoding.linkage: 'median' .expected mean | quantile"):
        dataclasses.replace(BASE, linkage="median")
    with pytest.raises(UserError, match="decoding.threshold: 300 .expected 0 to 255."):
        dataclasses.replace(BASE, threshold=300)
    with pytest.raises(UserError, match="overflows 32 bits .*smooth less"):
        dataclasses.replace(BASE, smoothing=(3, 3, 3))
    with pytest.raises(UserError, match="none joins direct neighbours"):
        segment(volume[3:], dataclasses.replace(BASE, offsets=OFFSETS[3:]))
    in_blocks(volume, BASE, (4, 8, 8), tmp_path / "a")
    with pytest.raises(UserError, match="other settings: name another folder"):
        other = dataclasses.replace(BASE, threshold=3)
        decode_blocks(NpyReader(tmp_path / "a/volume.npy"), other, (4, 8, 8), tmp_path / "a/scratch", Serial())
    with pytest.raises(UserError, match="expected serial | processes | dask"), open_executor("slurm", 1, ""):
        pass


def test_dask_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="pip install 'dask.distributed.'"), open_executor("dask", 1, ""):
        pass


def test_a_planted_fault_at_faces_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Basins at a block's faces must not choose before their neighbours beyond are known."""

    def never(labels: npt.NDArray[np.int32], *_: object) -> npt.NDArray[np.bool_]:
        return np.zeros(int(labels.max()) + 1, np.bool_)

    monkeypatch.setattr(block_passes, "_seen_outside", never)
    volume = smooth_volume(0, 6, (14, 21, 23), 256)
    settings = dataclasses.replace(BASE, min_depth=12, smoothing=(0, 0, 0))
    assert not np.array_equal(in_blocks(volume, settings, (5, 8, 7), tmp_path / "a"), segment(volume, settings))
