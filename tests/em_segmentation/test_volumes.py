"""Volumes of a role: what is opened, checked against each other, scaled, renumbered, and known by a digest."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import BAD_DATA, WRONG_CALL, UserError
from common.volumes.opening import open_volume
from em_segmentation import volumes
from em_segmentation.config import BASE, Data
from em_segmentation.volumes import Annotated, as_ids, digest, in_memory, measure_scale, normalised, open_role

SHAPE = (5, 7, 9)  # voxels z, y, x; no two axes alike
GREY = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)
IDS = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint16)


def written(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def pair(folder: Path, **changes: object) -> Data:
    """A volume with labels to train on."""
    image, label = written(folder / "image.npy", GREY), written(folder / "labels.npy", IDS)
    data = dataclasses.replace(BASE.data, train_image=(image,), train_label=(label,), voxel_size_nm=(40.0, 4.0, 4.0))
    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def problem(data: Data, exit_code: int) -> str:
    with pytest.raises(UserError) as caught:
        open_role(data, "train")
    assert caught.value.exit_code == exit_code and len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_an_image_is_read_in_standard_deviations_and_labels_as_they_are(tmp_path: Path) -> None:
    (volume,) = open_role(pair(tmp_path), "train")
    corner, size = (1, 2, 3), (3, 4, 5)
    box = (slice(1, 4), slice(2, 6), slice(3, 8))
    expected = (GREY.astype(np.float64) - GREY.mean()) / GREY.std()
    np.testing.assert_allclose(volume.read_image(corner, size)[0], expected[box], rtol=1e-5, atol=1e-6)
    labels, annotated = volume.read_truth(corner, size)
    assert labels.dtype == np.int64 and (labels[0] == IDS[box]).all() and annotated.all()
    assert volume.shape == SHAPE and volume.voxel_size_nm == (40.0, 4.0, 4.0)


def test_sections_are_all_there_is_and_corners_count_from_the_first(tmp_path: Path) -> None:
    (volume,) = open_role(pair(tmp_path, train_sections=(2, 4)), "train")
    assert volume.shape == (2, 7, 9)
    assert (volume.read_labels((0, 0, 0), (2, 7, 9))[0] == IDS[2:4]).all()
    assert volume.scale.mean == pytest.approx([GREY[2:4].mean()]), "grey values of other sections are not looked at"


def test_sections_beyond_the_volume_are_told(tmp_path: Path) -> None:
    told = problem(pair(tmp_path, train_sections=(2, 6)), WRONG_CALL)
    assert "data.train_sections: [2, 6]" in told and "5 sections" in told


def test_a_mask_says_where_labels_count(tmp_path: Path) -> None:
    mask = written(tmp_path / "mask.npy", (IDS > 1).astype(np.uint8))
    (volume,) = open_role(pair(tmp_path, train_mask=(mask,)), "train")
    assert (volume.read_annotated((0, 0, 0), SHAPE)[0] == (IDS > 1)).all()


def test_labels_of_several_channels_stay_apart(tmp_path: Path) -> None:
    both = np.stack([IDS, IDS[::-1] * 100])
    (volume,) = open_role(pair(tmp_path, train_label=(written(tmp_path / "both.npy", both),)), "train")
    assert (volume.read_labels((0, 0, 0), SHAPE) == both).all()


def test_names_with_a_star_are_expanded_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        written(tmp_path / f"image_{number}.npy", np.roll(GREY, number))
        written(tmp_path / f"labels_{number}.npy", IDS + number)
    data = pair(tmp_path, train_image=(f"{tmp_path}/image_*.npy",), train_label=(f"{tmp_path}/labels_*.npy",))
    volumes = open_role(data, "train")
    assert [volume.image.path.name for volume in volumes] == ["image_1.npy", "image_9.npy", "image_10.npy"]
    assert [int(volume.read_labels((0, 0, 0), SHAPE).min()) for volume in volumes] == [1, 9, 10]
    assert "matches nothing" in problem(pair(tmp_path, train_image=(f"{tmp_path}/none_*.npy",)), WRONG_CALL)
    (tmp_path / "labels_10.npy").unlink()
    assert "expected one per image, found 2 for 3" in problem(data, WRONG_CALL)


def test_stars_and_names_inside_files_go_together(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for number in (2, 10):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["volumes/raw"], file["volumes/labels"] = np.roll(GREY, number), IDS + number
    images, labels = (f"{tmp_path}/*.h5:volumes/raw",), (f"{tmp_path}/*.h5:volumes/labels",)
    data = pair(tmp_path, train_image=images, train_label=labels)
    assert [int(volume.read_labels((0, 0, 0), SHAPE).min()) for volume in open_role(data, "train")] == [2, 10]


def test_known_defect_2_permuted_axes_are_named(tmp_path: Path) -> None:
    """Labels saved as x, y, z beside an image saved as z, y, x cost two uploads of two hours each in the original."""
    turned = written(tmp_path / "turned.npy", np.ascontiguousarray(IDS.T))
    told = problem(pair(tmp_path, train_label=(turned,)), BAD_DATA)
    assert "(9, 7, 5)" in told and "(5, 7, 9)" in told and "axes=xyz" in told
    (volume,) = open_role(pair(tmp_path, train_label=(turned,), label_axes="xyz"), "train")
    assert (volume.read_labels((0, 0, 0), SHAPE)[0] == IDS).all()


def test_known_defect_2_an_image_with_other_axes_is_read_as_the_config_says(tmp_path: Path) -> None:
    stored = written(tmp_path / "stored.npy", np.ascontiguousarray(GREY.transpose(2, 0, 1)))
    (volume,) = open_role(pair(tmp_path, train_image=(stored,), image_axes="xzy"), "train")
    assert volume.shape == SHAPE
    found = volume.read_image((1, 2, 3), (2, 3, 4))[0] * volume.scale.deviation[0] + volume.scale.mean[0]
    np.testing.assert_allclose(found, GREY[1:3, 2:5, 3:7], atol=1e-4)


def test_shapes_that_no_order_of_axes_explains_are_told(tmp_path: Path) -> None:
    cropped = written(tmp_path / "cropped.npy", IDS[:, :, :-1])
    told = problem(pair(tmp_path, train_label=(cropped,)), BAD_DATA)
    assert "(5, 7, 8)" in told and "crop or resample" in told


def test_labels_that_are_fractions_are_refused_with_the_remedy(tmp_path: Path) -> None:
    told = problem(pair(tmp_path, train_label=(written(tmp_path / "f.npy", IDS.astype(np.float32)),)), BAD_DATA)
    assert "float32 labels" in told and "round().astype" in told


@pytest.mark.parametrize("value", [0, 0.1, 77])
def test_a_constant_image_is_no_image(tmp_path: Path, value: float) -> None:
    """Of equal fractions numpy's deviation is 1e-17, not 0."""
    flat = np.full(SHAPE, value, np.uint8 if value == 77 else np.float64)
    told = problem(pair(tmp_path, train_image=(written(tmp_path / "flat.npy", flat),)), BAD_DATA)
    assert f"all sampled voxels equal {value:g}" in told


def test_the_constant_one_of_several_channels_is_named(tmp_path: Path) -> None:
    two = np.stack([GREY, np.full(SHAPE, 8, np.uint8)])
    told = problem(pair(tmp_path, train_image=(written(tmp_path / "two.npy", two),)), BAD_DATA)
    assert "voxels of channel 1 equal 8" in told


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_told_when_the_volume_is_opened(tmp_path: Path, value: float) -> None:
    spoiled = GREY.astype(np.float32)
    spoiled[2, 3, 4] = value
    told = problem(pair(tmp_path, train_image=(written(tmp_path / "spoiled.npy", spoiled),)), BAD_DATA)
    assert "NaN or infinite" in told and "spoiled.npy" in told


def test_voxels_that_are_not_finite_where_nobody_sampled_are_told_when_they_are_read(tmp_path: Path) -> None:
    tall = np.random.default_rng(2).normal(size=(70, 6, 6)).astype(np.float32)
    tall[1, 2, 2] = np.nan  # 32 of 70 sections are sampled
    image = open_volume(written(tmp_path / "tall.npy", tall), "auto")
    scale = measure_scale(image, (0, 70))
    assert np.isfinite(normalised(image, (2, 0, 0), (4, 6, 6), scale)).all()
    with pytest.raises(UserError, match="NaN or infinite voxels near z, y, x = ") as caught:
        normalised(image, (1, 0, 0), (4, 6, 6), scale)
    assert caught.value.exit_code == BAD_DATA


def test_a_mask_is_no_image(tmp_path: Path) -> None:
    told = problem(pair(tmp_path, train_image=(written(tmp_path / "mask.npy", GREY > 100),)), BAD_DATA)
    assert "bool, no grey values" in told


def test_without_a_voxel_size_the_config_must_give_it(tmp_path: Path) -> None:
    told = problem(pair(tmp_path, voxel_size_nm=None), WRONG_CALL)
    assert "data.voxel_size_nm" in told and "[z, y, x] in nm" in told


def test_images_of_different_channels_are_told(tmp_path: Path) -> None:
    two, label = written(tmp_path / "two.npy", np.stack([GREY, GREY])), written(tmp_path / "labels.npy", IDS)
    data = pair(tmp_path)
    data = dataclasses.replace(data, train_image=(*data.train_image, two), train_label=(*data.train_label, label))
    assert "has 2 channels" in problem(data, BAD_DATA)


@pytest.mark.parametrize("kind", ["h5", "zarr", "tif", "png"])
def test_every_format_is_read_as_npy_is(tmp_path: Path, kind: str) -> None:
    names = ("raw", "labels")
    if kind == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["raw"], file["labels"] = GREY, IDS
        places = [f"{tmp_path}/a.h5:{name}" for name in names]
    elif kind == "zarr":
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(tmp_path / "a.zarr", mode="w")
        for name, array in zip(names, (GREY, IDS), strict=True):
            group.create_array(name, data=array)
        places = [f"{tmp_path}/a.zarr:{name}" for name in names]
    elif kind == "tif":
        tifffile = pytest.importorskip("tifffile")
        places = [f"{tmp_path}/{name}.tif" for name in names]
        for place, array in zip(places, (GREY, IDS), strict=True):
            tifffile.imwrite(place, array)
    else:
        places = [f"{tmp_path}/{name}" for name in names]
        for place, array in zip(places, (GREY, IDS.astype(np.uint8)), strict=True):
            Path(place).mkdir()
            for z, section in enumerate(array):
                Image.fromarray(section).save(Path(place) / f"{z + 7}.png")  # 7 ... 11: natural order
    (plain,), (other,) = (
        open_role(data, "train")
        for data in (pair(tmp_path), pair(tmp_path, train_image=(places[0],), train_label=(places[1],)))
    )
    whole = ((0, 0, 0), SHAPE)
    assert (plain.read_image(*whole) == other.read_image(*whole)).all() and plain.scale == other.scale
    assert (plain.read_labels(*whole) == other.read_labels(*whole)).all()
    assert digest([plain]) == digest([other]), "it knows voxels, not formats"


def test_the_voxel_size_of_a_file_is_taken_unless_the_config_gives_one(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = GREY
        file["raw"].attrs["resolution"] = (30.0, 6.0, 6.0)
    image = (f"{tmp_path}/a.h5",)
    assert open_role(pair(tmp_path, train_image=image, voxel_size_nm=None), "train")[0].voxel_size_nm == (30, 6, 6)
    assert open_role(pair(tmp_path, train_image=image), "train")[0].voxel_size_nm == (40, 4, 4)


def test_ids_beyond_2_63_keep_apart_and_leave_all_others_as_they_are() -> None:
    """torch knows no unsigned 64-bit numbers; a cast would make them negative, that is background."""
    labels = np.array([[0, 1, 2**63], [2**64 - 1, 2**63 - 1, 2**63]], np.uint64)
    found = as_ids(labels)
    assert found.dtype == np.int64
    assert found[0, 0] == 0 and found[0, 1] == 1 and found[1, 1] == 2**63 - 1
    assert found[0, 2] == found[1, 2] > 0 and found[1, 0] > 0
    assert len(np.unique(found)) == len(np.unique(labels))
    random = np.random.default_rng(0).integers(0, 2**64, 3000, np.uint64, endpoint=False)
    ours = as_ids(np.concatenate([random, random[::-1]]))
    assert (ours[:3000] == ours[3000:][::-1]).all() and (ours > 0).all()
    assert len(np.unique(ours)) == len(np.unique(random))
    small = random < 2**63
    assert (ours[:3000][small] == random[small].astype(np.int64)).all()


def test_a_volume_in_memory_is_the_same_volume(tmp_path: Path) -> None:
    mask = written(tmp_path / "mask.npy", (IDS > 1).astype(np.uint8))
    (volume,) = open_role(pair(tmp_path, train_mask=(mask,), train_sections=(1, 4)), "train")
    parts = {name: in_memory(getattr(volume, name), (1, 4)) for name in ("image", "label", "mask")}
    kept: Annotated = dataclasses.replace(volume, **parts)  # type: ignore[arg-type]
    for name in ("image", "labels", "mask"):
        (tmp_path / f"{name}.npy").unlink()
    for read in (kept.read_image, kept.read_labels, kept.read_annotated):
        assert read((1, 2, 3), (2, 3, 4)).shape[-3:] == (2, 3, 4)
    assert (kept.read_labels((0, 0, 0), (3, 7, 9))[0] == IDS[1:4]).all()
    assert (kept.read_annotated((0, 0, 0), (3, 7, 9))[0] == (IDS[1:4] > 1)).all()


def test_the_digest_changes_with_whatever_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = written(tmp_path / "mask.npy", (IDS > 1).astype(np.uint8))
    data = pair(tmp_path, train_mask=(mask,))

    def now(data: Data) -> str:
        return digest(open_role(data, "train"))

    found = {now(data), now(dataclasses.replace(data, voxel_size_nm=(41.0, 4.0, 4.0)))}
    found |= {now(dataclasses.replace(data, train_sections=(0, 4))), now(dataclasses.replace(data, train_mask=()))}
    for name, array in (("image", GREY), ("labels", IDS), ("mask", (IDS > 1).astype(np.uint8))):
        spoiled = array.copy()
        spoiled[2, 3, 4] += 1
        written(tmp_path / f"{name}.npy", spoiled)
        found.add(now(data))
    written(tmp_path / "image.npy", GREY[:, ::-1])  # of the same mean and deviation
    found.add(now(data))
    assert len(found) == 8
    narrow = tuple(written(tmp_path / f"{n}.npy", labels) for n, labels in enumerate((IDS, np.roll(IDS, 1, 2))))
    monkeypatch.setattr(volumes, "SAMPLED_SECTIONS", 1)
    assert len({now(dataclasses.replace(data, train_label=(name,))) for name in narrow}) == 2
    monkeypatch.setattr(volumes, "READ_WHOLE", 10)
    beside = IDS.copy()
    beside[3, 0, 0] += 1
    written(tmp_path / "1.npy", beside)
    assert len({now(dataclasses.replace(data, train_label=(name,))) for name in narrow}) == 1, "only samples"
