"""convert.py: the same files from any number of processes and after any interruption; bad tomograms are named."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import files
from common.config import as_yaml, configure
from common.errors import BAD_DATA, WRONG_CALL, UserError
from common.volumes.mrc import write_mrc
from common.volumes.opening import open_volume
from motor_detection import convert as convert_script
from motor_detection.config import Config
from motor_detection.conversion import COMPLETE
from motor_detection.dataset import choose_patches, list_patches
from motor_detection.heatmap import render_heatmaps
from motor_detection.patches import PATCH_ARRAYS, read_patch
from motor_detection.places import read_tomograms
from motor_detection.tomograms import open_tomogram, spacing_warnings
from tests.common_runs import environment, family, run_command
from tests.motor_detection.small_runs import (
    SHAPE,
    SPACING_ANGSTROM,
    producers_forked,
    script,
    small_config,
    tomogram_label,
    tomogram_voxels,
    write_labels,
    write_tomograms,
)

KEYS = {"patch", "heatmap", "patch_type", "motors", "origin", "spacing_angstrom", "intensity", "tomo_id"}


@pytest.fixture(scope="module")
def tomograms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five tomograms and their labels; never written to by a test."""
    folder = tmp_path_factory.mktemp("tomograms")
    write_tomograms(folder, range(5))
    return folder


def writing_to(folder: Path, tomograms: Path) -> Config:
    """The small config, reading the module's tomograms and writing patches into a test's own folder."""
    config = small_config(tomograms)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, patches=folder / "patches"))


def with_counts(config: Config, single: float) -> Config:
    return dataclasses.replace(config, convert=dataclasses.replace(config.convert, single=single))


def converted(config: Config, words: list[str]) -> int:
    """The exit code of convert.py's main on a config."""
    written = config.data.patches.with_name("config.yaml")
    written.write_text(as_yaml(config))
    with producers_forked():
        return convert_script.main(["--preset", "kaggle", "--config", str(written), *words])


def refused(config: Config, words: list[str], exit_code: int) -> str:
    with pytest.raises(UserError) as caught:
        converted(config, words)
    assert caught.value.exit_code == exit_code
    return "\n".join(caught.value.problems)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_one_and_three_processes_write_the_same_bytes(tomograms: Path, tmp_path: Path) -> None:
    """Three spawned processes under the script; one forked in the test."""
    config = writing_to(tmp_path, tomograms)
    assert converted(config, []) == 0
    one = contents(config.data.patches)
    three = dataclasses.replace(config, data=dataclasses.replace(config.data, patches=tmp_path / "three"))
    done = run_command(script("convert.py", three, tmp_path, 0, ["convert.producers=3"]))
    assert done.returncode == 0, done.stderr
    assert "converted 5 tomograms (6 negative, 16 single), kept 0 from before" in done.stdout
    assert contents(tmp_path / "three") == one
    assert len(one) == 1 + 5 + 22  # settings, one marker per tomogram, patches


def test_every_file_holds_what_training_reads(tomograms: Path, tmp_path: Path) -> None:
    """Keys, types, and the stored heat map equals one rendered from the stored coordinates."""
    config = writing_to(tmp_path, tomograms)
    converted(config, [])
    labels, _ = read_tomograms(config.data, False)
    files, missing = list_patches(config.data.patches, labels)
    assert len(files) == 22 and not missing
    for path in files:
        arrays = read_patch(path, tuple(PATCH_ARRAYS))
        assert arrays.keys() == KEYS
        assert arrays["patch"].dtype == np.uint8 and arrays["patch"].shape == (32, 32, 32)
        assert path.name.endswith(f"_{arrays['patch_type']}.npz") and str(arrays["tomo_id"]) == path.parent.name
        motors, spacing = torch.from_numpy(arrays["motors"]), torch.from_numpy(arrays["spacing_angstrom"])
        heat = render_heatmaps(motors[None], 200 / spacing[None], (32, 32, 32), 16)[0, 0].numpy()
        np.testing.assert_array_equal(arrays["heatmap"], heat)
        voxels = tomogram_voxels(tomogram_label(int(path.parent.name[-1])))
        window = tuple(slice(o, o + 32) for o in arrays["origin"])
        np.testing.assert_array_equal(arrays["patch"], voxels[window])
        np.testing.assert_allclose(arrays["intensity"][0], voxels.mean(), atol=0.05 * voxels.std())


def test_killed_in_the_middle_and_continued_it_ends_in_the_same_files(tomograms: Path, tmp_path: Path) -> None:
    """kill -9 of all processes while patches are written; finished tomograms are whole, the rest is done again."""
    config = with_counts(writing_to(tmp_path, tomograms), 150.0)
    reference = dataclasses.replace(config, data=dataclasses.replace(config.data, patches=tmp_path / "reference"))
    assert converted(reference, []) == 0
    command = script("convert.py", config, tmp_path, 0, ["convert.producers=2"])
    child = subprocess.Popen(command, cwd="/", env=environment(), stdout=subprocess.DEVNULL)
    while len(list(config.data.patches.glob("*/*.npz"))) < 60:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    for process in family(child.pid):
        os.kill(process, signal.SIGKILL)
    child.wait()
    complete = contents(tmp_path / "reference")
    left = contents(config.data.patches)
    assert 60 <= len(left) < len(complete)
    for marker in [name for name in left if name.endswith(COMPLETE)]:
        names = json.loads(left[marker])["patches"]
        assert all(left[marker.replace(COMPLETE, name)] == complete[marker.replace(COMPLETE, name)] for name in names)
    assert converted(config, []) == 0
    assert contents(config.data.patches) == complete
    labels, _ = read_tomograms(config.data, False)
    names = [path.name for path in list_patches(config.data.patches, labels)[0]]
    assert not [name for name in names if name.startswith(".")]


def test_a_producer_that_is_killed_ends_the_conversion_with_a_reason(tomograms: Path, tmp_path: Path) -> None:
    """As the system does when memory runs out; in the middle of a message as well, nothing waits for ever."""
    config = with_counts(writing_to(tmp_path, tomograms), 2000.0)
    command = script("convert.py", config, tmp_path, 0, ["convert.producers=1"])
    child = subprocess.Popen(command, cwd="/", env=environment(), stderr=subprocess.PIPE, text=True)
    while len(list(config.data.patches.glob("*/*.npz"))) < 20:
        assert child.poll() is None, "it ended before a producer could be killed"
        time.sleep(0.005)
    for process in family(child.pid) - {child.pid}:
        if "spawn_main" in Path(f"/proc/{process}/cmdline").read_text():
            os.kill(process, signal.SIGKILL)
    _, said = child.communicate(timeout=60)
    assert child.returncode == BAD_DATA
    assert "error: convert: a loading process died with exit code -9" in said and "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_says_one_line_and_leaves_nobody_behind(tomograms: Path, tmp_path: Path) -> None:
    config = with_counts(writing_to(tmp_path, tomograms), 2000.0)
    command = script("convert.py", config, tmp_path, 0, ["convert.producers=2"])
    child = subprocess.Popen(
        command, cwd="/", env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(config.data.patches.glob("*/*.npz"))) < 20:
        assert child.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    members = family(child.pid)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does, to all of the group
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and len(said.splitlines()) == 1 and said.startswith("interrupted")
    assert not [process for process in members if Path(f"/proc/{process}/cwd").exists()]


def test_a_complete_folder_is_left_as_it_is(
    tomograms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = writing_to(tmp_path, tomograms)
    converted(config, [])
    files = list(config.data.patches.rglob("*"))
    before = [path.stat().st_mtime_ns for path in files]
    capsys.readouterr()
    assert converted(config, []) == 0
    assert "converted 0 tomograms (no patches), kept 5 from before" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_corrupt_slice_is_named_and_the_rest_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tomograms(tmp_path, range(4))
    config = small_config(tmp_path)
    slice_path = tmp_path / "tomograms" / "tomo_1" / "slice_0020.png"
    whole = slice_path.read_bytes()
    slice_path.write_bytes(whole[: len(whole) // 2])
    assert converted(config, []) == BAD_DATA
    said = capsys.readouterr()
    assert f"error: {slice_path}: not a readable image" in said.err
    assert "failed: 1 problems" in said.err and "converted 3 tomograms" in said.out
    assert not (tmp_path / "patches" / "tomo_1" / COMPLETE).exists()
    slice_path.write_bytes(whole)
    assert converted(config, []) == 0
    assert "converted 1 tomograms" in capsys.readouterr().out
    assert (tmp_path / "patches" / "tomo_1" / COMPLETE).exists()


def test_a_full_disk_stops_with_a_reason_and_keeps_what_is_done(
    tomograms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 15th forced write fails; then there is room again."""
    config = writing_to(tmp_path, tomograms)
    reference = dataclasses.replace(config, data=dataclasses.replace(config.data, patches=tmp_path / "reference"))
    assert converted(reference, []) == 0
    writes = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) == 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        said = refused(config, [], BAD_DATA)
    assert "cannot be written (No space left on device)" in said and str(config.data.patches) in said
    left = contents(config.data.patches)
    assert len(left) == 14 and not list(config.data.patches.rglob(".*partial"))
    assert left.items() <= contents(tmp_path / "reference").items()
    assert converted(config, []) == 0
    assert contents(config.data.patches) == contents(tmp_path / "reference")


def test_a_folder_of_other_settings_is_refused_until_fresh(tomograms: Path, tmp_path: Path) -> None:
    config = writing_to(tmp_path, tomograms)
    converted(config, [])
    before = contents(config.data.patches)
    for word in ("convert.seed=7", "heatmap.sigma_angstrom=150", "model.stride=8", "data.voxel_spacing_angstrom=10"):
        assert "was converted with other constants" in refused(config, [word], WRONG_CALL)
    assert contents(config.data.patches) == before
    assert converted(config, ["convert.seed=7", "--fresh"]) == 0
    after = contents(config.data.patches)
    assert after["settings.yaml"] != before["settings.yaml"]
    assert converted(config, ["convert.producers=2", "convert.seed=7"]) == 0, "producers change nothing that is written"


def test_training_takes_patches_whose_heat_maps_have_another_width(tomograms: Path, tmp_path: Path) -> None:
    """It renders its own: only what was cut must be the same."""
    config = writing_to(tmp_path, tomograms)
    converted(config, [])
    labelled, _ = read_tomograms(config.data, False)
    for word, fits in (("heatmap.sigma_angstrom=150", True), ("model.stride=8", True), ("convert.producers=7", True),
                       ("convert.seed=7", False), ("data.voxel_spacing_angstrom=10", False)):  # fmt: skip
        changed = configure(config, [], [word])
        if fits:
            assert choose_patches(changed, config.data.patches, labelled)[0].train
            continue
        with pytest.raises(UserError, match="was converted with other constants"):
            choose_patches(changed, config.data.patches, labelled)
    for damage in (b"", b"\xff", b"convert: ["):
        (config.data.patches / "settings.yaml").write_bytes(damage)
        with pytest.raises(UserError, match="settings.yaml"):
            choose_patches(config, config.data.patches, labelled)


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b"{}", b'{"patches": 3, "labels": ""}'])
def test_a_damaged_marker_means_that_the_tomogram_is_converted_again(
    tomograms: Path, tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = writing_to(tmp_path, tomograms)
    converted(config, [])
    before = contents(config.data.patches)
    (config.data.patches / "tomo_2" / COMPLETE).write_bytes(damage)
    capsys.readouterr()
    assert converted(config, []) == 0
    assert "converted 1 tomograms" in capsys.readouterr().out
    assert contents(config.data.patches) == before


def test_only_folders_of_patches_are_deleted_or_filled(tomograms: Path, tmp_path: Path) -> None:
    config = writing_to(tmp_path, tomograms)
    config.data.patches.mkdir()
    (config.data.patches / "thesis.txt").write_text("three years")
    assert "nothing was deleted" in refused(config, ["--fresh"], WRONG_CALL)
    assert "holds other files" in refused(config, [], WRONG_CALL)
    assert contents(config.data.patches) == {"thesis.txt": b"three years"}


def test_a_labelled_tomogram_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_tomograms(tmp_path, range(3))
    missing = dataclasses.replace(tomogram_label(3), tomo_id="tomo_missing")
    write_labels(tmp_path / "labels.csv", [tomogram_label(0), missing])
    assert "tomo_missing" in refused(small_config(tmp_path), [], BAD_DATA)
    write_labels(tmp_path / "labels.csv", [tomogram_label(0), dataclasses.replace(missing, fold=-1)])
    assert converted(small_config(tmp_path), []) == 0, "excluded tomograms may be absent"
    assert sorted(p.name for p in (tmp_path / "patches").iterdir()) == ["settings.yaml", "tomo_0"]


def test_a_shape_that_contradicts_the_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As when y and x are exchanged: coordinates would point elsewhere."""
    write_tomograms(tmp_path, range(3))
    turned = dataclasses.replace(tomogram_label(2), shape=(SHAPE[0], SHAPE[2], SHAPE[1]), motors=np.ones((1, 3)))
    write_labels(tmp_path / "labels.csv", [tomogram_label(0), tomogram_label(1), turned])
    assert converted(small_config(tmp_path), []) == BAD_DATA
    said = capsys.readouterr()
    assert "tomo_2: is [34, 46, 58] voxels (z, y, x), the label table says [34, 58, 46]" in said.err
    assert "converted 2 tomograms" in said.out


def test_the_spacing_comes_from_the_command_the_table_or_the_header(tmp_path: Path) -> None:
    """In that order; a header that leaves it 0 and nothing else is an error, one that disagrees is said."""
    label = tomogram_label(1)
    path = tmp_path / "tomo_1.mrc"
    write_mrc(path, tomogram_voxels(label).astype(np.int16), (10.0, 10.0, 10.0))
    assert open_tomogram(path, None, 0.0).spacing_angstrom == (10.0, 10.0, 10.0)
    assert open_tomogram(path, label, 0.0).spacing_angstrom == (SPACING_ANGSTROM,) * 3
    assert open_tomogram(path, label, 7.5).spacing_angstrom == (7.5,) * 3
    assert "header says (10.0, 10.0, 10.0)" in "".join(spacing_warnings(open_tomogram(path, label, 0.0)))
    assert not list(spacing_warnings(open_tomogram(path, None, 0.0)))
    raw = bytearray(path.read_bytes())
    raw[40:52] = bytes(12)  # the cell's lengths
    path.write_bytes(raw)
    assert open_volume(path, "zyx").spacing_angstrom is None
    with pytest.raises(UserError) as caught:
        open_tomogram(path, None, 0.0)
    assert caught.value.exit_code == BAD_DATA
    assert "data.voxel_spacing_angstrom=" in caught.value.problems[0]
    assert open_tomogram(path, label, 0.0).spacing_angstrom == (SPACING_ANGSTROM,) * 3
    assert open_tomogram(path, None, 7.5).spacing_angstrom == (7.5,) * 3
