"""Streamed output: continued after a kill, written by several processes, finished in every format, refused beforehand."""

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import UserError
from common.volumes import finishing
from common.volumes.finishing import blocks, check_target
from common.volumes.opening import open_volume
from common.volumes.slices import natural_key
from common.volumes.streaming import StreamedVolume, discard_streamed, open_streamed, partial_folder

SHAPE = (1, 12, 20, 28)
ROOT = Path(__file__).resolve().parents[2]


def truth(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    return (np.arange(np.prod(shape)) % 251 + 1).reshape(shape).astype(dtype)


def filled(path: Path, shape: tuple[int, int, int, int], dtype: str) -> StreamedVolume:
    streamed = open_streamed(path, shape, np.dtype(dtype), "a")
    streamed.write(0, truth(shape, dtype))
    return streamed


def test_ranges_are_finished_in_any_order_and_merged(tmp_path: Path) -> None:
    streamed = open_streamed(tmp_path / "out.npy", SHAPE, np.dtype("u2"), "a")
    values = truth(SHAPE, "u2")
    assert streamed.finished_ranges() == [] and streamed.missing_ranges() == [(0, 12)]
    for first, last in ((8, 10), (0, 3), (3, 4), (9, 12), (0, 3)):
        streamed.write(first, values[:, first:last])
    assert streamed.finished_ranges() == [(0, 4), (8, 12)] and streamed.missing_ranges() == [(4, 8)]
    np.testing.assert_array_equal(streamed.read_channels((7, 2, 3), (4, 5, 6))[0, 1:], values[0, 8:11, 2:7, 3:9])
    assert streamed.read_channels((4, 0, 0), (4, 20, 28)).max() == 0
    with pytest.raises(AssertionError, match=r"missing are \[\(4, 8\)\]"):
        streamed.finish(None)
    again = pickle.loads(pickle.dumps(open_streamed(tmp_path / "out.npy", SHAPE, np.dtype("u2"), "a")))
    again.write(4, values[0, 4:8])  # [z, y, x] of one channel
    again.finish(None)
    assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    found = np.load(tmp_path / "out.npy")
    assert found.shape == SHAPE[1:] and found.dtype == np.uint16
    np.testing.assert_array_equal(found, values[0])


@pytest.mark.parametrize("shape", [(3, 6, 9, 11), (1, 6, 9, 11)])
def test_boxes_of_any_place_and_size(tmp_path: Path, shape: tuple[int, int, int, int]) -> None:
    streamed = open_streamed(tmp_path / "out.npy", shape, np.dtype("i8"), "a")
    rng = np.random.default_rng(0)
    expected = np.zeros(shape, np.int64)
    for _ in range(40):
        low = [int(rng.integers(0, n)) for n in shape[1:]]
        high = [int(rng.integers(a + 1, n + 1)) for a, n in zip(low, shape[1:], strict=True)]
        if rng.random() < 0.5:
            low[2], high[2] = 0, shape[3]  # whole rows
        if rng.random() < 0.3:
            low[1], high[1] = 0, shape[2]
        box = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
        values = rng.integers(-(2**60), 2**60, expected[box].shape)
        expected[box] = values
        streamed.write_box((low[0], low[1], low[2]), values.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2))
    np.testing.assert_array_equal(streamed.read_channels((0, 0, 0), shape[1:]), expected)
    assert streamed.finished_ranges() == []
    with pytest.raises(AssertionError, match="Expected a box inside"):
        streamed.write_box((0, 0, 1), expected)
    with pytest.raises(AssertionError, match="Expected int64, got float64"):
        streamed.write_box((0, 0, 0), expected.astype(float))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i4", "f4", "?"])
@pytest.mark.parametrize("name", ["out.npy", "out.h5", "out.zarr", "out.tif", "out"])
def test_every_format_gives_back_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, channels: int
) -> None:
    for package in ("h5py", "zarr", "tifffile"):
        pytest.importorskip(package)
    monkeypatch.setattr(finishing, "BLOCK_BYTES", 5000)
    path, shape = tmp_path / name, (channels, 9, 70, 75)
    if name == "out" and (channels > 1 or dtype not in ("u1", "u2")):
        with pytest.raises(UserError, match="PNG slices hold no"):
            check_target(path, channels, np.dtype(dtype))
        return
    for _ in range(2):  # the second replaces the first
        check_target(path, channels, np.dtype(dtype))
        filled(path, shape, dtype).finish((40.0, 4.0, 5.0))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    volume = open_volume(path, "auto")
    assert volume.num_channels == channels and volume.shape == shape[1:]
    found = volume.read_channels((0, 0, 0), volume.shape)
    np.testing.assert_array_equal(found, truth(shape, dtype))
    assert found.dtype == (np.uint8 if name == "out.tif" and dtype == "?" else np.dtype(dtype))
    states_size = name in ("out.h5", "out.zarr") or (name == "out.tif" and dtype in ("u1", "u2", "f4", "?"))
    assert volume.voxel_size_nm == (pytest.approx((40.0, 4.0, 5.0), rel=1e-5) if states_size else None)


def test_hdf5_output_is_named_main_and_packed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    filled(tmp_path / "out.h5", (1, 12, 200, 280), "u4").finish((40.0, 4.0, 4.0))
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file) == ["main"] and file["main"].shape == (12, 200, 280) and file["main"].chunks == (12, 64, 64)
        assert (file["main"].compression, file["main"].compression_opts) == ("gzip", 1)
        assert file["main"].attrs["resolution"].tolist() == [40.0, 4.0, 4.0]
    assert (tmp_path / "out.h5").stat().st_size < 12 * 200 * 280 * 4 / 4


def test_large_tiff_becomes_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tifffile")
    for limit, version in ((1 << 32, 42), (1000, 43)):
        monkeypatch.setattr(finishing, "IMAGEJ_BYTES", limit)
        filled(tmp_path / "out.tif", (2, 12, 20, 28), "u1").finish(None)
        assert (tmp_path / "out.tif").read_bytes()[2] == version
        found = open_volume(tmp_path / "out.tif", "auto").read_channels((0, 0, 0), (12, 20, 28))
        np.testing.assert_array_equal(found, truth((2, 12, 20, 28), "u1"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 300, 7), (3, 20, 20, 20), (130, 129, 64)])
@pytest.mark.parametrize("budget", [1, 5000, 1 << 30])
def test_blocks_cover_everything_once_in_whole_chunks(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], budget: int
) -> None:
    monkeypatch.setattr(finishing, "BLOCK_BYTES", budget)
    chunk = finishing.chunk_of(shape, np.dtype("u2"))
    covered = np.zeros(shape, int)
    largest = 0
    for box in blocks(shape, chunk, 2):
        covered[box] += 1
        largest = max(largest, covered[box].nbytes // 4)
        assert all(part.start % edge == 0 for part, edge in zip(box, chunk, strict=True))
    assert covered.min() == covered.max() == 1
    assert largest <= max(budget, 2 * np.prod(chunk))


def test_impossible_targets_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(UserError) as caught:
            check_target(tmp_path / name, 1, np.dtype("u1"))
        assert caught.value.exit_code == 2
        return str(caught.value)

    known = "(expected .npy, .h5, .hdf5, .zarr, .tif, .tiff, or a name without suffix: a folder of PNG slices)"
    assert f"out.nrrd: cannot write '.nrrd' {known}" in refusal("out.nrrd")
    for name in ("a.npy", "a.h5", "a.tif"):
        (tmp_path / name).mkdir()
        assert "exists and is a folder (expected a file" in refusal(name)
    for name, kind in (("b.zarr", "zarr"), ("b", "a folder of slice_\\*.png")):
        (tmp_path / name).write_text("mine")
        assert f"exists and is not {kind}".replace("\\", "") in refusal(name)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        check_target(tmp_path / name, 1, np.dtype("u1"))  # empty
        (tmp_path / name / "thesis.txt").write_text("mine")
        assert "exists and is not" in refusal(name)
    for package, name in (("h5py", "c.h5"), ("zarr", "c.zarr"), ("tifffile", "c.tif")):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"c{Path(name).suffix}: writing {Path(name).suffix} needs {package}; pip install" in refusal(name)


def test_png_slices_sort_by_text_and_by_number(tmp_path: Path) -> None:
    filled(tmp_path / "out", (1, 12, 4, 5), "u2").finish(None)
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert sorted(names) == sorted(names, key=natural_key) and sorted(names)[-1] == "slice_0011.png"


def test_other_settings_never_continue_silently(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    open_streamed(path, SHAPE, np.dtype("u1"), "a").write(0, truth((1, 2, 20, 28), "u1"))
    for shape, dtype, identity, words in (
        (SHAPE, "u1", "b", "identity a .expected b."),
        (SHAPE, "u2", "a", "dtype .u1 .expected <u2."),
        ((1, 13, 20, 28), "u1", "a", "shape"),
    ):
        with pytest.raises(UserError, match=f"unfinished output of other settings: {words}.*start over"):
            open_streamed(path, shape, np.dtype(dtype), identity)
    discard_streamed(path)
    assert list(tmp_path.iterdir()) == []
    assert open_streamed(path, SHAPE, np.dtype("u1"), "b").missing_ranges() == [(0, 12)]


def open_and_write(path: Path, first: int, last: int, together: Any) -> None:
    together.wait()
    streamed = open_streamed(path, SHAPE, np.dtype("u2"), "a")
    for z in range(first, last):
        streamed.write(z, truth(SHAPE, "u2")[:, z : z + 1])


def test_processes_that_open_at_once_share_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        path, together = tmp_path / f"{attempt}.npy", context.Barrier(4)
        workers = [context.Process(target=open_and_write, args=(path, 3 * k, 3 * k + 3, together)) for k in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        streamed = open_streamed(path, SHAPE, np.dtype("u2"), "a")
        assert streamed.missing_ranges() == []
        streamed.finish(None)
        np.testing.assert_array_equal(np.load(path), truth(SHAPE, "u2")[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{attempt}.npy" for attempt in range(5)]


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from common.volumes.streaming import open_streamed
shape, path = (1, 400, 60, 70), Path(sys.argv[1])
streamed = open_streamed(path, shape, np.dtype("u4"), "a")
for first, last in streamed.missing_ranges():
    for z in range(first, last):
        plane = np.full((1, 1, 60, 70), z + 1, np.uint32)
        streamed.write_box((z, 0, 0), plane[:, :, :30])
        streamed.write_box((z, 30, 0), plane[:, :, 30:])
        streamed.mark_finished(z, z + 1)
        print(z, flush=True)
streamed.finish(None)
"""


@pytest.mark.parametrize("name", ["out.npy", "out.h5"])
def test_killed_at_any_moment_it_continues(tmp_path: Path, name: str) -> None:
    pytest.importorskip("h5py")
    command = [sys.executable, "-c", WRITER, str(tmp_path / name)]
    for planes in (1, 40, 250):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(planes):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        streamed = open_streamed(tmp_path / name, (1, 400, 60, 70), np.dtype("u4"), "a")
        ((first, last),) = streamed.finished_ranges()
        assert first == 0 and planes <= last <= 400
        means = streamed.read_channels((0, 0, 0), (last, 60, 70))[0].mean((1, 2))
        np.testing.assert_array_equal(means, np.arange(1, last + 1))  # what is marked is whole
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(output.split()[0]) == last  # it took up where the kill came
    volume = open_volume(tmp_path / name, "auto")
    found = volume.read((0, 0, 0), volume.shape)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(1, 401)[:, None, None], (400, 60, 70)))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.npy", "out.h5", "out.zarr", "out"])
def test_cut_short_while_finishing_it_is_finished_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for package in ("h5py", "zarr"):
        pytest.importorskip(package)
    path = tmp_path / name
    filled(path, SHAPE, "u2").finish(None)  # an older result, to be replaced
    renames = {"rename": Path.rename, "replace": Path.replace}

    class Killed(BaseException):
        pass

    for cut in range(20):
        filled(path, SHAPE, "u2")
        calls = iter(range(100))

        def counting(kind: str) -> Any:
            def call(self: Path, target: Path) -> Path:
                ours = threading.current_thread() is threading.main_thread()  # zarr's threads would go on after it
                if ours and next(calls) == cut:  # noqa: B023
                    raise Killed
                return renames[kind](self, target)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counting("rename"))
            patch.setattr(Path, "replace", counting("replace"))
            try:
                open_streamed(path, SHAPE, np.dtype("u2"), "a").finish(None)
                break
            except Killed:
                pass
        again = open_streamed(path, SHAPE, np.dtype("u2"), "a")
        assert again.missing_ranges() == [], (name, cut)
        again.finish(None)
        found = open_volume(path, "auto").read((0, 0, 0), SHAPE[1:])
        np.testing.assert_array_equal(found, truth(SHAPE, "u2")[0])
    assert cut >= 2, "every step was cut once"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_terabyte_is_begun_at_once_and_takes_no_disk(tmp_path: Path) -> None:
    start = time.perf_counter()
    streamed = open_streamed(tmp_path / "out.npy", (1, 10_000, 10_000, 12_500), np.dtype("u1"), "a")
    streamed.write_box((9_000, 5_000, 6_000), np.ones((2, 3, 4), np.uint8))
    assert time.perf_counter() - start < 2
    assert streamed.read_channels((8_999, 4_999, 5_999), (4, 5, 6)).sum() == 24
    assert (partial_folder(tmp_path / "out.npy") / "data.npy").stat().st_blocks * 512 < 1 << 20


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: both refuse the write itself."""
    streamed = open_streamed(tmp_path / "out.npy", SHAPE, np.dtype("u1"), "a")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        with pytest.raises(
            UserError, match=r"out\.npy: cannot be written \(File too large\); the same command continues"
        ):
            streamed.write(4, truth((1, 2, 20, 28), "u1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert streamed.finished_ranges() == []
