"""Volumes: every format gives the same [z, y, x] box, reads only what it needs, and refuses bad files in words."""

import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from common.errors import UserError
from common.volumes.mrc import MRC_DTYPES, write_mrc
from common.volumes.opening import open_volume
from common.volumes.slices import natural_key, write_slice_folder
from common.volumes.volume import Volume

SHAPE = (3, 5, 7)  # no two axes alike
IMOD_STAMP = 1146047817  # "IMOD"


def everything(volume: Volume) -> npt.NDArray[Any]:
    return volume.read((0, 0, 0), volume.shape)


def counted(dtype: str) -> npt.NDArray[Any]:
    """A small volume whose every voxel differs, with negative values where the dtype has them."""
    values = np.arange(np.prod(SHAPE)) - (40 if np.dtype(dtype).kind in "if" else 0)
    return values.reshape(SHAPE).astype(dtype)


def mrc_bytes(order: str, mode: int, stored: npt.NDArray[Any], extended: bytes) -> bytearray:
    """An MRC file by hand: words of the MRC2014 table packed one by one, voxels of 2 x 3 x 4 angstrom (x, y, z)."""
    sections, rows, columns = stored.shape
    header = bytearray(1024)
    struct.pack_into(order + "10i", header, 0, columns, rows, sections, mode, 0, 0, 0, columns, rows, sections)
    struct.pack_into(order + "3f", header, 40, 2.0 * columns, 3.0 * rows, 4.0 * sections)
    struct.pack_into(order + "3f3i", header, 52, 90, 90, 90, 1, 2, 3)
    struct.pack_into(order + "i", header, 92, len(extended))
    header[208:216] = b"MAP " + (b"DD\0\0" if order == "<" else b"\x11\x11\0\0")
    return header + extended + stored.astype(stored.dtype.newbyteorder(order)).tobytes()


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, exit_code: int) -> str:
    """The message with which a volume is refused, at opening or at the first complete read."""
    with pytest.raises(UserError) as caught:
        everything(open_volume(path, "zyx"))
    assert caught.value.exit_code == exit_code
    (problem,) = caught.value.problems
    assert problem.startswith(str(path))
    return problem


def test_numbers_in_names_sort_by_value() -> None:
    names = ["10.jpg", "9.jpg", "slice_0010.png", "slice_0009.png", "a2b10", "a2b9", "1", "01", "x"]
    ordered = ["01", "1", "9.jpg", "10.jpg", "a2b9", "a2b10", "slice_0009.png", "slice_0010.png", "x"]
    assert sorted(names, key=natural_key) == ordered
    names.reverse()
    assert sorted(names, key=natural_key) == ordered


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_slice_folder_round_trip(tmp_path: Path, suffix: str) -> None:
    z, y, x = np.mgrid[:3, :40, :56]
    volume = (z * 20 + y + 2 * x).astype(np.uint8)
    write_slice_folder(volume, tmp_path / "tomo", suffix, 95)
    assert [p.name for p in tmp_path.iterdir()] == ["tomo"]  # nothing unfinished is left
    opened = open_volume(tmp_path / "tomo", "zyx")
    assert (opened.shape, opened.dtype, opened.spacing_angstrom) == ((3, 40, 56), np.uint8, None)
    found = everything(opened)
    assert np.abs(found.astype(int) - volume).max() <= (2 if suffix == ".jpg" else 0)
    np.testing.assert_array_equal(opened.read((1, 5, 30), (2, 10, 20)), found[1:3, 5:15, 30:50])
    with pytest.raises(UserError, match="exists already"):
        write_slice_folder(volume, tmp_path / "tomo", suffix, 95)
    with pytest.raises(UserError, match="expected .jpg or .png"):
        write_slice_folder(volume, tmp_path / "other", ".bmp", 95)


def test_slices_stand_in_natural_order_and_other_files_are_ignored(tmp_path: Path) -> None:
    for z in range(12):
        Image.fromarray(np.full((4, 6), z * 10, np.uint8)).save(tmp_path / f"{z}.png")
    for name in ("notes.txt", "._0.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"no image")
    assert everything(open_volume(tmp_path, "zyx"))[:, 0, 0].tolist() == [z * 10 for z in range(12)]


def test_only_the_slices_of_the_box_are_opened(tmp_path: Path) -> None:
    write_slice_folder(np.zeros((5, 4, 6), np.uint8), tmp_path / "tomo", ".png", 95)
    for z in (1, 4):
        (tmp_path / "tomo" / f"slice_{z:04d}.png").write_bytes(b"broken")
    assert open_volume(tmp_path / "tomo", "zyx").read((2, 0, 0), (2, 4, 6)).shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", np.uint16), (".tif", np.uint16), (".tif", np.float32), (".tif", np.uint8)]
)
def test_grey_depth_is_kept(tmp_path: Path, suffix: str, dtype: type) -> None:
    pixels = (np.arange(24) * 7).reshape(4, 6).astype(dtype)
    pixels[0, 0] = 60000 if dtype == np.uint16 else 200
    Image.fromarray(pixels).save(tmp_path / f"0{suffix}")
    volume = open_volume(tmp_path, "zyx")
    assert volume.dtype == dtype
    np.testing.assert_array_equal(everything(volume)[0], pixels)


def test_big_endian_slices_come_in_native_order(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 1, 513)).save(tmp_path / "0.tif")
    found = everything(open_volume(tmp_path, "zyx"))
    assert found.dtype.isnative and found.tolist() == [[[1, 513]]]


def test_colour_becomes_grey(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3], pixels[:, 3:] = 100, (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "1.png")  # beside a grey slice
    found = everything(open_volume(tmp_path, "zyx"))
    assert found.dtype == np.uint8 and found.shape == (2, 4, 6)
    assert found[0, 0].tolist() == [100] * 3 + [76] * 3  # ITU-R 601: 0.299 * 255


def test_slices_of_other_sizes_depths_and_pages_are_refused(tmp_path: Path) -> None:
    grey = Image.fromarray(np.zeros((4, 6), np.uint8))
    for name, second, words in (
        ("size", Image.fromarray(np.zeros((6, 4), np.uint8)), "height x width 6 x 4 .expected 4 x 6, as in 0.tif"),
        ("depth", Image.fromarray(np.zeros((4, 6), np.uint16)), "uint16 pixels .expected uint8, as in 0.tif"),
    ):
        (tmp_path / name).mkdir()
        grey.save(tmp_path / name / "0.tif")
        second.save(tmp_path / name / "1.tif")
        volume = open_volume(tmp_path / name, "zyx")
        with pytest.raises(UserError, match=rf"1\.tif: {words}"):
            everything(volume)
    (tmp_path / "pages").mkdir()
    grey.save(tmp_path / "pages" / "0.tif", save_all=True, append_images=[grey, grey])
    with pytest.raises(UserError, match="3 pages"):
        everything(open_volume(tmp_path / "pages", "zyx"))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_slice_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64)).astype(np.uint8)
    write_slice_folder(noise, tmp_path / "tomo", suffix, 95)
    path = tmp_path / "tomo" / f"slice_0001{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    volume = open_volume(tmp_path / "tomo", "zyx")
    with pytest.raises(UserError, match=f"slice_0001{suffix}: not a readable image .*re-copy or re-export this slice"):
        everything(volume)


def test_paths_without_a_volume_are_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "absent.mrc", 2)
    assert "no slices (expected slice_0000.jpg" in refused(tmp_path, 1)
    assert "unknown kind of volume '.gz'" in refused(saved(tmp_path / "a.mrc.gz", b""), 2)
    message = refused(saved(tmp_path / "a.dm4", b""), 2)
    assert all(kind in message for kind in (".npy", ".mrc", ".rec", ".map", ".jpg", "folder of slices"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("0.jpg", "1.png"):
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(mixed / name)
    assert "slices of 2 kinds ['.jpg', '.png']" in refused(mixed, 1)
    (mixed / "1.png").unlink()
    (mixed / "0.jpg").write_bytes(b"")
    assert "not a readable image" in str(pytest.raises(UserError, open_volume, mixed, "zyx").value)


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", "<f4", ">f8", "?", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_round_trip(tmp_path: Path, dtype: str, order: Any) -> None:
    volume = counted("f4").astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(volume, order=order))
    opened = open_volume(tmp_path / "a.npy", "zyx")
    found = everything(opened)
    assert opened.shape == SHAPE and opened.spacing_angstrom is None
    assert found.dtype == opened.dtype and found.dtype.isnative and found.flags.c_contiguous
    assert type(found) is np.ndarray and found.flags.writeable
    np.testing.assert_array_equal(found, volume)
    np.testing.assert_array_equal(opened.read((1, 2, 3), (2, 1, 4)), volume[1:3, 2:3, 3:7])


def test_bad_npy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(SHAPE, np.float32))
    content = path.read_bytes()
    for cut in (0, 5, 60, len(content) - 1):
        assert f"{cut} bytes): save a plain numeric array again" in refused(saved(path, content[:cut]), 1)
    np.save(path, np.array([[[None]]], object), allow_pickle=True)
    assert "Python objects" in refused(path, 1)
    path.write_bytes(pickle.dumps([1, 2]))
    assert "magic string" in refused(path, 1)
    with path.open("wb") as file:
        np.savez(file, np.zeros(SHAPE))
    assert "magic string" in refused(path, 1)
    for array, words in (
        (np.zeros((4, 6)), "shape (4, 6) (expected three axes z, y, x"),
        (np.zeros(SHAPE, complex), "complex128"),
        (np.zeros((0, 4, 6)), "(0, 4, 6)"),
    ):
        np.save(path, array)
        assert words in refused(path, 1)


@pytest.mark.parametrize("mode", list(MRC_DTYPES))
def test_mrc_writer_round_trip(tmp_path: Path, mode: int) -> None:
    volume = counted(MRC_DTYPES[mode])
    write_mrc(tmp_path / "a.mrc", volume, (4.0, 3.0, 2.5))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mrc"]
    opened = open_volume(tmp_path / "a.mrc", "zyx")
    assert (opened.shape, opened.dtype, opened.spacing_angstrom) == (SHAPE, volume.dtype, (4.0, 3.0, 2.5))
    np.testing.assert_array_equal(everything(opened), volume)
    np.testing.assert_array_equal(opened.read((1, 2, 3), (2, 1, 4)), volume[1:3, 2:3, 3:7])


@pytest.mark.parametrize("mode", list(MRC_DTYPES))
def test_the_reference_library_reads_what_we_write(tmp_path: Path, mode: int) -> None:
    mrcfile = pytest.importorskip("mrcfile")
    volume = counted(MRC_DTYPES[mode])
    write_mrc(tmp_path / "a.mrc", volume, (4.0, 3.0, 2.5))
    if mode != 12:  # it sums squares of float16 in float16, and doubts every header where they overflow
        assert mrcfile.validate(tmp_path / "a.mrc")
    with mrcfile.open(tmp_path / "a.mrc") as file:
        np.testing.assert_array_equal(file.data, volume)
        assert file.data.dtype == volume.dtype and file.is_volume()
        size = file.voxel_size
        assert (float(size.z), float(size.y), float(size.x)) == (4.0, 3.0, 2.5)
        statistics = [float(file.header[name]) for name in ("dmin", "dmax", "dmean", "rms")]
    wide = volume.astype(np.float64)
    np.testing.assert_allclose(statistics, [wide.min(), wide.max(), wide.mean(), wide.std()], rtol=1e-6)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("mode", list(MRC_DTYPES))
def test_we_read_what_the_reference_library_writes(tmp_path: Path, mode: int, byte_order: str) -> None:
    mrcfile = pytest.importorskip("mrcfile")
    volume = counted(MRC_DTYPES[mode])
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(volume.astype(volume.dtype.newbyteorder(byte_order)))
        file.voxel_size = (2.5, 3.0, 4.0)  # x, y, z
    opened = open_volume(tmp_path / "a.mrc", "zyx")
    assert opened.spacing_angstrom == (4.0, 3.0, 2.5)
    np.testing.assert_array_equal(everything(opened), volume)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", list(MRC_DTYPES))
def test_mrc_of_both_byte_orders_with_an_extended_header(tmp_path: Path, order: str, mode: int) -> None:
    volume = counted(MRC_DTYPES[mode])
    content = mrc_bytes(order, mode, volume, b"FEI1" * 20)
    for stamp in (bytes(content[212:216]), b"\0\0\0\0", b"DD\0\0", b"\x11\x11\0\0"):  # absent and wrong stamps too
        content[212:216] = stamp
        opened = open_volume(saved(tmp_path / "a.rec", content), "zyx")
        found = everything(opened)
        assert opened.spacing_angstrom == (4.0, 3.0, 2.0)
        assert found.dtype == opened.dtype == volume.dtype and found.dtype.isnative
        np.testing.assert_array_equal(found, volume)


@pytest.mark.parametrize(
    ("stamp", "flags", "dtype"),
    [(0, 0, "i1"), (0, 1, "i1"), (IMOD_STAMP, 0, "u1"), (IMOD_STAMP, 1, "i1"), (IMOD_STAMP, 2, "u1"), (5, 0, "i1")],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_imod_rule_for_the_sign_of_bytes(tmp_path: Path, stamp: int, flags: int, dtype: str, order: str) -> None:
    volume = np.arange(151, 256, dtype=np.uint8).reshape(SHAPE)
    content = mrc_bytes(order, 0, volume, b"")
    struct.pack_into(order + "2i", content, 152, stamp, flags)
    opened = open_volume(saved(tmp_path / "a.mrc", content), "zyx")
    assert opened.dtype == dtype
    np.testing.assert_array_equal(everything(opened), volume.view(dtype))


@pytest.mark.parametrize("axes", [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)])
def test_any_axis_order_is_read_as_z_y_x(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    volume = counted("i2")
    zyx_axis = {3: 0, 2: 1, 1: 2}  # the MRC number of an axis -> its place in [z, y, x]
    mapc, mapr, maps = axes
    stored = volume.transpose(zyx_axis[maps], zyx_axis[mapr], zyx_axis[mapc])
    content = mrc_bytes("<", 1, stored, b"")
    struct.pack_into("<3i", content, 64, *axes)
    struct.pack_into("<3i3f", content, 28, *SHAPE[::-1], *np.multiply((2.0, 3.0, 4.0), SHAPE[::-1]))  # always x, y, z
    opened = open_volume(saved(tmp_path / "a.map", content), "zyx")
    assert (opened.shape, opened.spacing_angstrom) == (SHAPE, (4.0, 3.0, 2.0))
    np.testing.assert_array_equal(everything(opened), volume)
    np.testing.assert_array_equal(opened.read((1, 2, 3), (2, 1, 4)), volume[1:3, 2:3, 3:7])


def test_old_headers_without_axis_order_or_grid(tmp_path: Path) -> None:
    content = mrc_bytes("<", 1, counted("i2"), b"")
    struct.pack_into("<3i", content, 64, 0, 0, 0)
    np.testing.assert_array_equal(everything(open_volume(saved(tmp_path / "a.mrc", content), "zyx")), counted("i2"))
    struct.pack_into("<3i", content, 28, 0, 0, 0)
    assert open_volume(saved(tmp_path / "a.mrc", content), "zyx").spacing_angstrom is None


def test_bad_mrc_files_are_refused(tmp_path: Path) -> None:
    good = bytes(mrc_bytes("<", 2, counted("f4"), b""))
    path = tmp_path / "a.mrc"
    for offset, layout, value, words in (
        (12, "<i", 4, "field mode is 4 (expected 0 int8, 1 int16, 2 float32, 6 uint16, 12 float16): convert"),
        (12, "<i", 101, "field mode is 101"),
        (12, "<i", -1, "not an MRC file"),
        (0, "<i", 0, "not an MRC file (header fields nx, ny, nz = [0, 5, 3]"),
        (0, "<i", 8, "1444 bytes (expected 1504: 3 x 5 x 8 float32): the file is cut short"),
        (92, "<i", 4, "1444 bytes (expected 1448"),
        (92, "<i", -4, "field nsymbt is -4"),
        (64, "<i", 3, "mapc, mapr, maps = [3, 2, 3] (expected 1, 2, 3 in some order)"),
        (40, "<f", np.nan, "field cella (x, y, z) is [nan, 15.0, 12.0] angstrom (expected > 0): repair the header"),
        (44, "<f", -1.0, "field cella (x, y, z) is [14.0, -1.0, 12.0]"),
        (48, "<f", np.inf, "field cella"),
        (28, "<i", -7, "field mx, my, mz is [-7, 5, 3]"),
    ):
        content = bytearray(good)
        struct.pack_into(layout, content, offset, value)
        assert words in refused(saved(path, content), 1)
    assert "1443 bytes (expected 1444" in refused(saved(path, good[:-1]), 1)
    assert "100 bytes (expected an MRC header of 1024)" in refused(saved(path, good[:100]), 1)
    assert "not an MRC file" in refused(saved(path, b"<html>no such page</html>" * 100), 1)
    with pytest.raises(UserError, match="MRC holds no uint8"):
        write_mrc(path, np.zeros(SHAPE, np.uint8), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "shape", "spacing"),
    [
        ("formats/mrcfile_EMD-3197.map", (20, 20, 20), (11.4, 11.4, 11.4)),
        ("formats/mrcfile_EMD-3001.map", (73, 25, 43), (0.45875, 0.3925, 0.44825)),  # stored as sections y, columns z
        ("formats/tomotwin_model_0_1BXN_1.mrc", (37, 37, 37), None),
        ("formats/cryocat_tilt_stack.mrc", (4, 240, 232), None),
        ("real_tomo/beta-tubulin.mrc", (20, 20, 20), (5.144, 5.144, 5.144)),
    ],
)
def test_real_maps(real_data: Path, name: str, shape: tuple[int, int, int], spacing: Any) -> None:
    opened = open_volume(real_data / "motor" / name, "zyx")
    assert opened.shape == shape and opened.dtype == np.float32
    assert opened.spacing_angstrom == (None if spacing is None else pytest.approx(spacing, rel=1e-5))
    mrcfile = pytest.importorskip("mrcfile")
    with mrcfile.open(real_data / "motor" / name) as file:
        stored = [int(file.header[name]) for name in ("maps", "mapr", "mapc")]
        order = [stored.index(axis) for axis in (3, 2, 1)]
        np.testing.assert_array_equal(everything(opened), file.data.transpose(order))


@pytest.mark.parametrize("kind", [".mrc", ".npy"])
def test_a_volume_larger_than_memory_costs_only_the_box(tmp_path: Path, kind: str) -> None:
    shape = (1000, 8000, 9000)  # 72 GB of bytes, sparse on disk
    path = tmp_path / f"giant{kind}"
    with path.open("wb") as file:
        if kind == ".npy":
            np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": shape})
        else:
            file.write(mrc_bytes("<", 0, np.zeros((1, 1, 1), np.int8), b"")[:1024])
            file.seek(0)
            file.write(struct.pack("<3i", *shape[::-1]))
            file.seek(1024)
        start = file.tell()
        file.truncate(start + shape[0] * shape[1] * shape[2])
        file.seek(start + (900 * shape[1] + 7000) * shape[2] + 8000)
        file.write(b"\x05\x06")
    tracemalloc.start()
    box = open_volume(path, "zyx").read((899, 7000, 8000), (2, 3, 4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert box[0].sum() == 0 and box[1, 0].tolist() == [5, 6, 0, 0] and box[1, 1:].sum() == 0
    assert peak < 1 << 20


def test_readers_travel_to_workers_without_their_voxels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((60, 70, 80), np.float32))
    write_slice_folder(np.ones(SHAPE, np.uint8), tmp_path / "slices", ".png", 95)
    for path in (tmp_path / "a.npy", tmp_path / "slices"):
        content = pickle.dumps(open_volume(path, "zyx"))
        assert len(content) < 2000
        assert everything(pickle.loads(content)).min() == 1


def test_a_box_must_lie_inside(tmp_path: Path) -> None:
    write_slice_folder(np.zeros(SHAPE, np.uint8), tmp_path / "slices", ".png", 95)
    write_mrc(tmp_path / "a.mrc", np.zeros(SHAPE, np.int8), (1.0, 1.0, 1.0))
    for path in (tmp_path / "slices", tmp_path / "a.mrc"):
        for corner, size in (((0, 0, -1), (1, 1, 1)), ((0, 0, 0), (1, 1, 8)), ((3, 0, 0), (1, 1, 1))):
            with pytest.raises(AssertionError, match="Expected a box inside"):
                open_volume(path, "zyx").read(corner, size)
