"""HDF5, zarr, TIFF and axes: the same box from every format, in any order of axes, and errors that say what is there."""

import multiprocessing
import pickle
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from common.errors import UserError
from common.extras import PINNED
from common.volumes.axes import check_same_shape
from common.volumes.opening import open_volume
from common.volumes.slices import write_slice_folder
from common.volumes.volume import Volume

SHAPE = (6, 20, 28)  # z, y, x: no two alike
CHANNELS = 2


def counted(dtype: str) -> npt.NDArray[Any]:
    """[z, y, x] whose every voxel differs from its neighbours."""
    return (np.arange(np.prod(SHAPE)) % 251).reshape(SHAPE).astype(dtype)


def everything(volume: Volume) -> npt.NDArray[Any]:
    return volume.read_channels((0, 0, 0), volume.shape)


def refused(location: str | Path, axes: str, exit_code: int) -> str:
    """The one line with which a location is refused, at opening or at the first complete read."""
    with pytest.raises(UserError) as caught:
        everything(open_volume(location, axes))
    assert caught.value.exit_code == exit_code, caught.value
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def save(path: Path, array: npt.NDArray[Any]) -> str:
    """One array in the format of the suffix; what open_volume is to be given."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.create_dataset("volumes/raw", data=array, chunks=True, compression="lzf")
        return f"{path}:volumes/raw"
    else:
        zarr = pytest.importorskip("zarr")
        zarr.create_array(path, data=array, chunks=(4,) * array.ndim, zarr_format=2 if path.stem == "old" else 3)
    return str(path)


@pytest.mark.parametrize("name", ["a.npy", "a.h5", "old.zarr", "new.zarr"])
@pytest.mark.parametrize("axes", ["zyx", "xyz", "yxz", "czyx", "zyxc", "xyzc", "yx", "xy", "cyx", "tzyx"])
def test_any_order_of_axes_gives_channels_z_y_x(tmp_path: Path, name: str, axes: str) -> None:
    lengths = {"t": 1, "c": CHANNELS, "z": SHAPE[0], "y": SHAPE[1], "x": SHAPE[2]}
    full = np.arange(np.prod(list(lengths.values()))).reshape(*lengths.values()).astype(np.int32)
    kept = full[tuple(slice(None) if axis in axes else slice(0, 1) for axis in "tczyx")]
    stored = kept.squeeze(tuple(i for i, axis in enumerate("tczyx") if axis not in axes))
    stored = stored.transpose([[a for a in "tczyx" if a in axes].index(axis) for axis in axes])
    volume = open_volume(save(tmp_path / name, stored), axes)
    expected = kept[0]  # (c, z, y, x)
    assert (volume.num_channels, *volume.shape) == expected.shape and volume.axes == axes
    found = everything(volume)
    assert type(found) is np.ndarray and found.flags.c_contiguous and found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    depth = min(2, volume.shape[0])
    np.testing.assert_array_equal(volume.read_channels((0, 3, 5), (depth, 9, 11)), expected[:, :depth, 3:12, 5:16])
    if volume.num_channels == 1:
        np.testing.assert_array_equal(volume.read((0, 3, 5), (depth, 9, 11)), expected[0, :depth, 3:12, 5:16])
    else:
        with pytest.raises(AssertionError, match="one channel, got 2"):
            volume.read((0, 0, 0), (1, 1, 1))


def test_auto_goes_by_the_number_of_axes(tmp_path: Path) -> None:
    for shape, axes, found in (
        ((4, 5), "yx", (1, 1, 4, 5)),
        ((3, 4, 5), "zyx", (1, 3, 4, 5)),
        ((2, 3, 4, 5), "czyx", None),
    ):
        volume = open_volume(save(tmp_path / "a.npy", np.zeros(shape)), "auto")
        assert volume.axes == axes and (volume.num_channels, *volume.shape) == (found or shape)
    assert "shape (1, 2, 3, 4, 5) (expected two (y, x)" in refused(
        save(tmp_path / "a.npy", np.zeros((1, 2, 3, 4, 5))), "auto", 1
    )


@pytest.mark.parametrize("name", ["a.npy", "a.h5", "new.zarr"])
def test_axes_that_do_not_fit_are_refused_with_the_shape(tmp_path: Path, name: str) -> None:
    location = save(tmp_path / name, np.zeros((2, 3, 4, 5), np.uint8))
    assert "shape (2, 3, 4, 5) (expected three axes z, y, x" in refused(location, "zyx", 1)
    assert "holds 2 times: export one" in refused(location, "tzyx", 1)
    for axes in ("zyy", "abc", "", "zx", "ZYX"):
        assert f"axes={axes}: no order of axes (expected auto, or one letter" in refused(location, axes, 2)


def test_labels_in_another_order_of_axes_are_told_which_setting_fits(tmp_path: Path) -> None:
    image = open_volume(save(tmp_path / "image.npy", np.zeros((100, 140, 250), np.uint8)), "auto")
    path = save(tmp_path / "labels.npy", np.zeros((140, 250, 100), np.uint8))
    with pytest.raises(
        UserError, match=r"labels \(140, 250, 100\) are the image's axes in another order: try axes=yxz"
    ):
        check_same_shape(image, open_volume(path, "auto"))
    with pytest.raises(UserError, match="try axes=yxz for"):  # whatever it was opened with
        check_same_shape(image, open_volume(path, "xzy"))
    check_same_shape(image, open_volume(path, "yxz"))
    other = open_volume(save(tmp_path / "other.npy", np.zeros((100, 140, 251), np.uint8)), "auto")
    with pytest.raises(UserError, match=r"\(100, 140, 251\) of the image .*\(100, 140, 250\).*: crop or resample"):
        check_same_shape(image, other)
    square = open_volume(save(tmp_path / "square.npy", np.zeros((140, 100, 140), np.uint8)), "auto")
    turned = open_volume(save(tmp_path / "turned.npy", np.zeros((140, 140, 100), np.uint8)), "auto")
    with pytest.raises(UserError, match="try axes=zxy or axes=xzy for"):
        check_same_shape(square, turned)


def test_hdf5_datasets_are_named_or_the_only_one(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "train.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("volumes/raw", data=counted("u1"))
        file["volumes/ids"] = np.arange(5)  # no volume
    assert open_volume(path, "auto").shape == SHAPE
    assert open_volume(f"{path}:volumes", "auto").shape == SHAPE
    assert open_volume(f"{path}:/volumes/raw", "auto").shape == SHAPE
    with h5py.File(path, "a") as file:
        file["volumes/labels/neuron_ids"] = counted("u8")
        file["words"] = "text"
    listing = "volumes/ids (5,) int64, volumes/labels/neuron_ids (6, 20, 28) uint64, volumes/raw (6, 20, 28) uint8"
    message = refused(path, "auto", 2)
    assert "expected the name of one dataset" in message and listing in message and "train.h5:volumes/" in message
    message = refused(f"{path}:volumes/rav", "auto", 2)
    assert "no dataset 'volumes/rav'" in message and listing in message and "mean train.h5:volumes/raw" in message
    assert "mean train.h5:volumes/labels/neuron_ids" in refused(f"{path}:neuron_ids", "auto", 2)
    assert "'volumes' is a group" in refused(f"{path}:volumes", "auto", 2)
    assert "train.h5:words: holds object (expected bool, integers or floats)" in refused(f"{path}:words", "auto", 1)
    with h5py.File(path, "w"):
        pass
    assert "holds no array at all" in refused(path, "auto", 1)


def test_truncated_and_foreign_hdf5_files_take_one_line(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "main", data=np.random.default_rng(0).random((40, 40, 40)), chunks=(8, 8, 8), compression="gzip"
        )
    content = path.read_bytes()
    for cut in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert "truncated or no HDF5 file (" in refused(path, "auto", 1)
    path.write_bytes(content[:-3000] + bytes(3000))  # the right length, another content
    refused(path, "auto", 1)
    path.write_bytes(b"<html>" * 1000)
    assert f"{path}: truncated or no HDF5 file" in refused(path, "auto", 1)


def test_hdf5_dtypes_and_compressions(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for dtype in ("?", "u1", ">u2", "i4", "u8", "f2", "f4", ">f8"):
        for settings in ({}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}):
            with h5py.File(tmp_path / "a.h5", "w") as file:
                file.create_dataset("main", data=counted(dtype), chunks=(2, 8, 8) if settings else None, **settings)
            volume = open_volume(tmp_path / "a.h5", "zyx")
            found = volume.read((1, 2, 3), (4, 10, 20))
            assert found.dtype == volume.dtype == np.dtype(dtype).newbyteorder("=") and found.dtype.isnative
            np.testing.assert_array_equal(found, counted(dtype)[1:5, 2:12, 3:23])


@pytest.mark.parametrize(
    ("attributes", "nm"),
    [
        ({}, None),
        ({"resolution": [40.0, 4.0, 5.0]}, (40.0, 4.0, 5.0)),
        ({"element_size_um": [0.04, 0.004, 0.005]}, (40.0, 4.0, 5.0)),
        ({"voxel_size": [40, 4, 5]}, (40.0, 4.0, 5.0)),
        ({"voxel_size": [0.04, 0.004, 0.005], "units": ["um", "um", "um"]}, (40.0, 4.0, 5.0)),
        ({"resolution": [0, 4, 4]}, None),
        ({"resolution": [4.0, 4.0]}, None),
        ({"resolution": "isotropic"}, None),
    ],
)
@pytest.mark.parametrize("kind", [".h5", ".zarr"])
def test_voxel_size_from_attributes(tmp_path: Path, kind: str, attributes: dict[str, Any], nm: Any) -> None:
    location = save(tmp_path / f"a{kind}", counted("u1"))
    if kind == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file["volumes/raw"].attrs.update(attributes)
    else:
        pytest.importorskip("zarr").open_array(location, mode="a").attrs.update(attributes)
    expected = None if nm is None else pytest.approx(nm)
    assert open_volume(location, "auto").voxel_size_nm == expected
    turned = open_volume(location, "xyz").voxel_size_nm  # one number per axis of the file, in its order
    assert turned == (None if nm is None else pytest.approx(nm[::-1]))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("unit", ["nanometer", "micrometer", None])
def test_ome_ngff_axes_units_and_level_0(tmp_path: Path, version: str, unit: str | None) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "image.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    full = np.stack([counted("u1"), counted("u1") + 1])
    group.create_array("em/s0", data=full.transpose(1, 0, 2, 3)[None])  # t, z, c, y, x
    group.create_array("em/s1", data=full.transpose(1, 0, 2, 3)[None, :, :, ::2, ::2])
    group.create_array("labels", data=counted("u2"))
    axes = [{"name": name} | ({"unit": unit} if unit and name in "zyx" else {}) for name in "tzcyx"]
    levels = [
        {"path": f"s{k}", "coordinateTransformations": [{"type": "scale", "scale": [1, 20, 1, 4 * 2**k, 5 * 2**k]}]}
        for k in (0, 1)
    ]
    image = {
        "axes": axes,
        "datasets": levels,
        "coordinateTransformations": [{"type": "scale", "scale": [1, 2, 1, 1, 1]}],
    }
    nested = {"multiscales": [image]}
    group["em"].attrs.update(nested if version == "0.4" else {"ome": {"version": "0.5", **nested}})
    volume = open_volume(f"{path}:em", "auto")
    factor = 1000 if unit == "micrometer" else 1
    assert volume.axes == "tzcyx" and volume.shape == SHAPE and volume.num_channels == CHANNELS
    assert volume.voxel_size_nm == (None if unit is None else pytest.approx((40 * factor, 4 * factor, 5 * factor)))
    np.testing.assert_array_equal(everything(volume), full)
    half = open_volume(f"{path}:em/s1", "auto")
    assert half.voxel_size_nm == (None if unit is None else pytest.approx((40 * factor, 8 * factor, 10 * factor)))
    assert open_volume(f"{path}:labels", "auto").voxel_size_nm is None
    message = refused(path, "auto", 2)
    assert "em/s0 (1, 6, 2, 20, 28) uint8" in message and "labels (6, 20, 28) uint16" in message
    assert "did you mean image.zarr:labels" in refused(f"{path}:label", "auto", 2)


def test_damaged_zarr_takes_one_line(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "a.zarr"
    zarr.create_array(path, data=counted("u1"), chunks=SHAPE)
    assert "is one array, without names inside" in refused(f"{path}:raw", "auto", 2)
    (chunk,) = (p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(b"damage")
    assert f"{path}: damaged" in refused(path, "auto", 1)
    (path / "zarr.json").write_text("{")
    assert f"{path}: damaged" in refused(path, "auto", 1)
    (path / "zarr.json").unlink()
    refused(path, "auto", 1)


TIFF_DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8", ">u2", ">u4", ">f4"]
TIFF_KINDS: list[dict[str, Any]] = [
    {}, {"bigtiff": True}, {"rowsperstrip": 7}, {"tile": (16, 16)}, {"compression": "zlib"},
    {"compression": "zlib", "bigtiff": True, "predictor": True},
]  # fmt: skip


@pytest.mark.parametrize("dtype", TIFF_DTYPES)
def test_tiff_of_every_dtype_and_layout(tmp_path: Path, dtype: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = counted(dtype)
    pixels[0, 0, :2] = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 3.5
    for kind in TIFF_KINDS:
        if "predictor" in kind and (dtype[-2] == "f" or dtype[0] == ">" or dtype == "u8"):
            continue  # needs a codec beyond tifffile alone
        order: Any = ">" if dtype[0] == ">" else "<"
        tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=order, photometric="minisblack", **kind)
        volume = open_volume(tmp_path / "a.tif", "zyx")
        assert volume.dtype == pixels.dtype.newbyteorder("=") and volume.shape == SHAPE, kind
        np.testing.assert_array_equal(everything(volume)[0], pixels, str(kind))
        np.testing.assert_array_equal(volume.read((2, 3, 5), (3, 9, 11)), pixels[2:5, 3:12, 5:16], str(kind))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_tiff_stacks_of_pillow_need_no_extra_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None, dtype: str
) -> None:
    pixels = counted(dtype)
    first, *rest = (Image.fromarray(page) for page in pixels)
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest, compression=compression)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    volume = open_volume(tmp_path / "a.tif", "auto")
    np.testing.assert_array_equal(volume.read((1, 2, 3), (4, 10, 20)), pixels[1:5, 2:12, 3:23])


def test_colour_pages_become_grey_and_odd_pages_are_named(tmp_path: Path) -> None:
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[..., 0] = 255
    images = [Image.fromarray(colour)] * 2
    images[0].save(tmp_path / "rgb.tif", save_all=True, append_images=images[1:])
    assert everything(open_volume(tmp_path / "rgb.tif", "auto")).tolist() == np.full((1, 2, 4, 6), 76).tolist()
    grey = [Image.fromarray(np.zeros((4, 6), np.uint8))] * 2
    for odd, words in (
        (
            Image.fromarray(np.zeros((5, 6), np.uint8)),
            "page 3 is 5 x 6, 1 x uint8 (expected 4 x 6, 1 x uint8, as on page 1)",
        ),
        (Image.fromarray(np.zeros((4, 6), np.uint16)), "page 3 is 4 x 6, 1 x uint16 (expected 4 x 6, 1 x uint8"),
    ):
        grey[0].save(tmp_path / "odd.tif", save_all=True, append_images=[*grey[1:], odd, *grey])
        assert words in refused(tmp_path / "odd.tif", "auto", 1)


def test_a_single_page_is_one_section(tmp_path: Path) -> None:
    for compression in (None, "tiff_lzw"):
        Image.fromarray(counted("u1")[0]).save(tmp_path / "a.tif", compression=compression)
        for axes in ("auto", "zyx", "yx"):
            found = open_volume(tmp_path / "a.tif", axes).read((0, 2, 3), (1, 5, 6))
            np.testing.assert_array_equal(found, counted("u1")[:1, 2:7, 3:9])


def test_pixels_that_are_no_plain_numbers_are_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 8, 8), np.complex64))
    assert "pixels of sample format 6 (expected whole or real numbers)" in refused(tmp_path / "a.tif", "auto", 1)


def test_damaged_pixels_that_still_decode_are_told(tmp_path: Path) -> None:
    """The check sum of a deflated page says what its decoder does not."""
    path = tmp_path / "a.tif"
    first, *rest = (Image.fromarray(page) for page in counted("u1"))
    first.save(path, save_all=True, append_images=rest, compression="tiff_adobe_deflate")
    content = path.read_bytes()
    assert np.array_equal(everything(open_volume(path, "auto"))[0], counted("u1"))
    with Image.open(path) as image:
        image.seek(1)
        (start,), (length,) = image.tag_v2[273], image.tag_v2[279]  # type: ignore[attr-defined]
    path.write_bytes(content[: start + length - 4] + b"sums" + content[start + length :])
    with pytest.raises(UserError, match=r"a\.tif: page 2 is damaged .*incorrect data check"):
        everything(open_volume(path, "auto"))


def test_damaged_tiff_takes_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    first, *rest = (Image.fromarray(page) for page in counted("u1"))
    for compression in (None, "tiff_lzw"):
        first.save(path, save_all=True, append_images=rest, compression=compression)
        content = path.read_bytes()
        for cut in (0, 3, 9, 200, len(content) // 2, len(content) - 20):
            path.write_bytes(content[:cut])
            assert str(path) in refused(path, "auto", 1)
        noise = np.random.default_rng(0).integers(0, 256, (40, len(content)), np.uint8)
        for spoiled in noise:  # any damage: an answer or one line, nothing else
            keep = np.random.default_rng(int(spoiled[0])).random(len(content)) < 0.98
            path.write_bytes(np.where(keep, np.frombuffer(content, np.uint8), spoiled).tobytes())
            try:
                everything(open_volume(path, "auto"))
            except UserError as error:
                assert "\n" not in str(error)
    path.write_bytes(b"no TIFF at all")
    assert "not a TIFF file" in refused(path, "auto", 1)


def test_hyperstacks_say_their_own_axes_and_voxel_size(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    full = np.stack([counted("u1"), counted("u1") + 1])  # (c, z, y, x)
    swapped = full.transpose(1, 0, 2, 3)
    about = {"axes": "ZCYX", "spacing": 0.04, "unit": "um"}
    tifffile.imwrite(tmp_path / "imagej.tif", swapped, imagej=True, metadata=about, resolution=(200, 250))
    tifffile.imwrite(tmp_path / "image.ome.tif", swapped, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "plain.tif", full)
    tifffile.imwrite(tmp_path / "film.tif", full[0], imagej=True, metadata={"axes": "TYX"})
    for name in ("imagej.tif", "image.ome.tif", "plain.tif"):
        np.testing.assert_array_equal(everything(open_volume(tmp_path / name, "auto")), full, name)
    assert open_volume(tmp_path / "imagej.tif", "auto").voxel_size_nm == pytest.approx((40.0, 4.0, 5.0))
    np.testing.assert_array_equal(everything(open_volume(tmp_path / "film.tif", "auto"))[0], full[0])
    assert "(expected three axes z, y, x" in refused(tmp_path / "plain.tif", "zyx", 1)


def test_uint32_sections_keep_large_ids_and_misread_ones_are_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    labels = np.full((4, 6), 4_000_000_000, np.uint32)
    tifffile.imwrite(tmp_path / "0.tif", labels)
    volume = open_volume(tmp_path, "zyx")
    assert volume.dtype == np.uint32 and everything(volume).min() == 4_000_000_000
    tifffile.imwrite(tmp_path / "0.tif", labels.astype(">u2"), byteorder=">", compression="zlib")
    assert "0.tif: not a readable image (compressed big-endian" in refused(tmp_path, "zyx", 1)


def test_one_image_file_is_one_section(tmp_path: Path) -> None:
    path = tmp_path / "section.png"
    Image.fromarray(counted("u1")[0]).save(path)
    volume = open_volume(path, "auto")
    assert volume.shape == (1, 20, 28) and volume.axes == "yx"
    np.testing.assert_array_equal(volume.read((0, 2, 3), (1, 5, 6)), counted("u1")[:1, 2:7, 3:9])
    assert "shape (20, 28) (expected three axes" in refused(path, "zyx", 1)


def test_packed_files_are_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "labels.h5.gz").write_bytes(b"")
    assert "unknown kind of volume '.gz'" in refused(tmp_path / "labels.h5.gz", "auto", 2)
    assert "unpack it first, for example: gunzip -k labels.h5.gz" in refused(tmp_path / "labels.h5.gz", "auto", 2)


def test_absent_packages_are_named_with_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PINNED:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "train.h5").write_bytes(b"")
    install = "pip install h5py==3.16.0 (requirements-extras.txt)"
    assert refused(tmp_path / "train.h5", "auto", 2) == f"{tmp_path}/train.h5: reading HDF5 needs h5py; {install}"
    (tmp_path / "a.zarr").mkdir()
    assert "reading zarr needs zarr; pip install zarr==3.1.6" in refused(tmp_path / "a.zarr", "auto", 2)


def test_versions_of_extras_are_those_of_the_requirements() -> None:
    lines = (Path(__file__).resolve().parents[2] / "requirements-extras.txt").read_text().splitlines()
    pinned = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in PINNED} == PINNED


def test_a_terabyte_opens_at_once_and_a_patch_reads_a_patch(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    zarr = pytest.importorskip("zarr")
    shape = (10_000, 10_000, 10_000)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 10**12)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("main", shape, "u1", chunks=(64, 64, 64), compression="gzip")
        dataset[5000:5010, 5000:5010, 5000:5010] = 7
    array = zarr.create_array(tmp_path / "a.zarr", shape=shape, chunks=(64, 64, 64), dtype="u1")
    array[5000:5010, 5000:5010, 5000:5010] = 7
    for name in ("a.npy", "a.h5", "a.zarr"):
        pickle.loads(pickle.dumps(open_volume(tmp_path / name, "auto"))).read(
            (0, 0, 0), (1, 1, 1)
        )  # imports are not timed
        tracemalloc.start()
        start = time.perf_counter()
        volume = open_volume(tmp_path / name, "auto")
        seconds = time.perf_counter() - start
        box = volume.read((4990, 4990, 4990), (32, 32, 32))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < 0.5, (name, seconds)  # milliseconds; a terabyte would take an hour
        assert box.sum() == (0 if name == "a.npy" else 7000)
        assert peak < 8 << 20, (name, peak)
        assert len(pickle.dumps(volume)) < 2000


def box_sum(volume: Volume) -> int:
    return int(everything(volume).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_volumes_are_read_by_worker_processes(tmp_path: Path, method: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("h5py")
    pytest.importorskip("zarr")
    tifffile.imwrite(tmp_path / "a.tif", counted("u1"))
    tifffile.imwrite(tmp_path / "packed.tif", counted("u1"), compression="zlib")
    write_slice_folder(counted("u1"), tmp_path / "slices", ".png", 95)
    locations = [save(tmp_path / name, counted("u1")) for name in ("a.npy", "a.h5", "old.zarr", "new.zarr")]
    locations += [str(tmp_path / name) for name in ("a.tif", "packed.tif", "slices")]
    volumes = [open_volume(location, "auto") for location in locations]
    assert {box_sum(volume) for volume in volumes} == {int(counted("u1").sum())}  # threads of zarr run before the fork
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert set(pool.map_async(box_sum, volumes).get(60)) == {int(counted("u1").sum())}


def test_real_hdf5_files(real_data: Path) -> None:
    pytest.importorskip("h5py")
    gala = real_data / "em" / "gala_mini" / "tests" / "example-data"
    image, labels = open_volume(gala / "train-image.h5", "auto"), open_volume(f"{gala}/train-gt.lzf.h5:stack", "auto")
    check_same_shape(image, labels)
    assert image.shape == (50, 100, 200) and image.dtype == np.uint8 and labels.dtype == np.int32
    values = labels.read((0, 0, 0), labels.shape)
    border = np.zeros(values.shape, bool)
    border[..., 1:] = values[..., 1:] != values[..., :-1]
    grey = image.read((0, 0, 0), image.shape)
    assert grey[border].mean() < grey[~border].mean() - 10  # membranes are dark: image and labels lie on each other
    ovule = real_data / "em" / "plantseg_confocal" / "sample_ovule.h5"
    assert open_volume(f"{ovule}:raw", "auto").voxel_size_nm == pytest.approx((235, 150, 150))
    assert "label (32, 128, 128) uint16, raw (32, 128, 128) uint8" in refused(ovule, "auto", 2)


def test_real_stacks(real_data: Path) -> None:
    em = real_data / "em"
    snemi = em / "gala_mini" / "tests" / "example-data" / "snemi-mini"
    fragments = open_volume(snemi / "train-fragments.tif", "auto")
    assert fragments.shape == (32, 160, 160) and fragments.dtype == np.uint16
    assert everything(fragments).max() == 1389
    with Image.open(snemi / "train-fragments.tif") as image:
        image.seek(17)
        np.testing.assert_array_equal(fragments.read((17, 0, 0), (1, 160, 160))[0], np.asarray(image))
    mask = open_volume(em / "empanada_mini/tests/test_data/panoptic/dataset1/masks/pan_seg.tiff", "auto")
    assert mask.dtype == np.int32 and everything(mask).max() == 3001
    assert open_volume(em / "isbi2012" / "train" / "image", "auto").shape == (30, 512, 512)
    assert open_volume(em / "vnc_sstem" / "stack1" / "raw", "auto").shape == (16, 1024, 1024)
    assert open_volume(em / "fib25" / "training_sample2" / "grayscale_maps", "auto").shape == (250, 250, 250)
    assert open_volume(em / "hela_sbfsem" / "raw_z0001.png", "auto").shape == (1, 2000, 2000)
