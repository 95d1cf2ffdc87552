"""The simulated tomograms: labels, physics of the picture, and files that survive kills."""

import ast
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.errors import UserError
from data.phantoms.motor import MotorPhantom, label_table, simulate_tomogram, write_phantom
from data.phantoms.motor_clutter import draw_scene
from data.phantoms.motor_imaging import Exposure, contrast_transfer, shot_noise, take_tomogram, wedge
from data.phantoms.motor_scene import CLICK_HEIGHT, plan_scene
from data.phantoms.motor_shapes import Grid, Ring, distance_at, draw_rings

SMALL = MotorPhantom(train_tomograms=3, validation_tomograms=1, test_tomograms=1, shape=(48, 72, 80))
EXPOSURE = Exposure(
    spacing_angstrom=15.0, defocus_micrometre=5.0, b_factor_angstrom2=3000, dose_electrons_per_angstrom2=100
)


def table_points(row: pd.Series) -> np.ndarray:
    shape = row[["z_shape", "y_shape", "x_shape"]].to_numpy(float)
    return np.asarray(np.array(ast.literal_eval(row["coordinates"])).reshape(-1, 3) * shape)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    assert write_phantom(SMALL, folder, 1) == folder / "labels.csv"
    return folder


def test_labels_lie_inside_and_equal_the_simulation(written: Path) -> None:
    table = pd.read_csv(written / "labels.csv")
    positions = ["z", "y", "x", "z_shape", "y_shape", "x_shape"]
    assert list(table.columns) == ["tomo_id", *positions, "voxel_spacing", "coordinates", "fold"]
    assert table["fold"].tolist() == [2, 3, 4, 0, 1]
    for index, row in table.iterrows():
        tomogram = simulate_tomogram(SMALL, int(str(index)))
        slices = sorted((written / "train" / row["tomo_id"]).iterdir())
        assert (len(slices), *Image.open(slices[0]).size[::-1]) == tomogram.volume.shape
        assert tuple(row[["z_shape", "y_shape", "x_shape"]]) == tomogram.volume.shape
        stored = np.stack([np.asarray(Image.open(path)) for path in slices]).astype(float)
        assert np.abs(stored - tomogram.volume).mean() < 2  # grey levels lost to JPEG
        np.testing.assert_allclose(table_points(row), tomogram.motors, atol=1e-9)
        assert row["voxel_spacing"] == tomogram.spacing_angstrom
        first = row[["z", "y", "x"]].to_numpy(float)
        assert (first == (tomogram.motors[0] if len(tomogram.motors) else -1)).all()


def test_any_number_of_processes_writes_the_same_bits(written: Path, tmp_path: Path) -> None:
    write_phantom(SMALL, tmp_path, 2)
    assert files_of(tmp_path) == files_of(written)


def test_a_killed_or_damaged_folder_is_completed(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    shutil.rmtree(folder / "train" / "tomo_000001")
    stale = folder / "train" / ".tomo_000001.partial"
    stale.mkdir()
    (stale / "slice_9999.jpg").write_bytes(b"half a slice")
    (folder / "settings.json").rename(folder / "unfinished.json")
    (folder / "labels.csv").unlink()
    untouched = (folder / "train" / "tomo_000000").stat().st_mtime_ns
    write_phantom(SMALL, folder, 1)
    assert files_of(folder) == files_of(written)
    assert (folder / "train" / "tomo_000000").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("note", ["settings.json", "unfinished.json"])
def test_other_settings_in_the_folder_are_refused(written: Path, tmp_path: Path, note: str) -> None:
    (tmp_path / note).write_bytes((written / "settings.json").read_bytes())
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        write_phantom(dataclasses.replace(SMALL, seed=1), tmp_path, 1)
    assert error.value.exit_code == 2 and "delete" in error.value.problems[0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shape": (40, 100, 100)}, "shape: expected at least 48 voxels on every axis, got"),
        ({"motor_free_share": 1.2}, "motor_free_share: expected a share"),
        ({"defocus_micrometre": (6.0, 3.0)}, "defocus_micrometre: expected lowest and highest"),
        ({"spacings_angstrom": ()}, "spacings_angstrom: expected one or more"),
        ({"motor_margin_angstrom": 900.0}, "motor_margin_angstrom: expected"),
        ({"test_tomograms": -1}, "test_tomograms: expected 0 or more"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, change: dict[str, object], line: str) -> None:
    settings = dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    assert any(problem.startswith(line) for problem in settings.problems())
    with pytest.raises(UserError, match=f"phantom.{line}"):
        write_phantom(settings, tmp_path, 1)


def test_default_settings_are_possible_and_cover_the_cases_of_real_data() -> None:
    settings = MotorPhantom()
    assert not list(settings.problems()) and not list(SMALL.problems())
    scenes = [plan_scene(settings, index) for index in range(208)]
    counts = [len(scene.motors) for scene in scenes]
    assert 0.36 < np.mean(np.array(counts) == 0) < 0.44 and {0, 1, 2} < set(counts)
    assert {scene.spacing_angstrom for scene in scenes} == set(settings.spacings_angstrom)
    assert all(len(set(scene.shape)) == 3 for scene in scenes)
    gaps, to_face = [], []
    for scene in scenes:
        motors, spacing = scene.motors * scene.spacing_angstrom, scene.spacing_angstrom
        far_faces = (np.array(scene.shape) - 1) * spacing
        to_face += np.minimum(motors, far_faces - motors).min(1, initial=np.inf).tolist()
        between = np.linalg.norm(motors[:, None] - motors[None], axis=2)
        gaps += between[np.triu_indices(len(motors), 1)].tolist()
    assert min(gaps) >= settings.closest_motors_angstrom and (np.array(gaps) < 1000).any()
    assert min(to_face) >= settings.motor_margin_angstrom - 1e-6 and (np.array(to_face) < 300).any()
    assert label_table(settings)["fold"].value_counts().to_dict() == {0: 40, 1: 48, 2: 40, 3: 40, 4: 40}


def test_share_without_motor_is_a_setting() -> None:
    for share in (0.1, 0.6):
        settings = dataclasses.replace(SMALL, motor_free_share=share)
        free = [len(plan_scene(settings, index).motors) == 0 for index in range(60)]
        assert abs(np.mean(free) - share) < 0.05


def test_motors_sit_on_the_membrane_and_point_outwards() -> None:
    for index in range(12):
        scene = plan_scene(SMALL, index)
        for anchor, normal, owner in zip(scene.anchors, scene.normals, scene.motor_cells, strict=True):
            heights = distance_at(scene.cells[owner], anchor + np.array([[0.0], [CLICK_HEIGHT], [200.0]]) * normal)
            np.testing.assert_allclose(heights, [0, CLICK_HEIGHT, 200], rtol=0.2, atol=5)  # waves steepen the distance


def test_the_rings_are_where_the_label_says() -> None:
    """Dense at the C-ring's radius about the motor's axis, less dense beside it; in the picture dense is dark."""
    ring: list[float] = []
    beside: list[float] = []
    for index in range(16):
        scene = plan_scene(SMALL, index)
        if not len(scene.motors):
            continue
        volume = simulate_tomogram(SMALL, index).volume
        for click, normal in zip(scene.motors, scene.normals, strict=True):
            first = np.cross(normal, np.eye(3)[int(np.abs(normal).argmin())])
            first /= np.linalg.norm(first)
            around = np.linspace(0, 2 * np.pi, 36, endpoint=False)[:, None]
            radial = np.cos(around) * first + np.sin(around) * np.cross(normal, first)
            for radius, values in ((205, ring), (330, beside)):
                points = click + (radius * radial - 75 * normal) / scene.spacing_angstrom
                voxels = np.round(points).astype(int)
                voxels = voxels[((voxels >= 0) & (voxels < volume.shape)).all(1)]
                values.append(volume[tuple(voxels.T)].mean())
    assert np.mean(ring) < np.mean(beside) - 15


def test_a_ring_is_drawn_at_its_height_and_radius() -> None:
    grid = Grid(np.zeros((60, 60, 60), np.float32), 10.0)
    centre, normal = np.full(3, 295.0), np.array([1.0, 0.0, 0.0])
    draw_rings(grid, centre, normal, [Ring(100, 160, -80, -20, 1.5)])
    z, y, x = np.nonzero(grid.density > 0.75)
    radius = np.hypot(y * 10 - 295, x * 10 - 295)
    assert abs(radius.min() - 100) < 12 and abs(radius.max() - 160) < 12
    assert (z.min(), z.max()) == (22, 27) and grid.density.max() == pytest.approx(1.5, abs=0.03)


def test_nothing_is_seen_in_the_missing_wedge() -> None:
    settings = dataclasses.replace(SMALL, detector_noise=0.0)
    density = draw_scene(settings, plan_scene(settings, 0), np.random.default_rng(0))
    signal, noise = take_tomogram(density, EXPOSURE, settings, np.random.default_rng(1))
    kz = np.fft.fftfreq(density.shape[0])[:, None, None]
    kx = np.fft.rfftfreq(density.shape[2])[None, None, :]
    unseen = np.broadcast_to(
        np.abs(kz) > np.tan(np.radians(62)) * kx + 1.5 / density.shape[0], (*density.shape[:2], kx.size)
    )
    for image in (signal, noise):
        power = np.abs(np.fft.rfftn(image.astype(float))) ** 2
        assert power[unseen].mean() < 1e-6 * power[~unseen].mean()
    grey = np.abs(np.fft.rfftn(simulate_tomogram(SMALL, 0).volume - 127.0)) ** 2
    volume_shape = simulate_tomogram(SMALL, 0).volume.shape
    seen = np.broadcast_to(wedge(volume_shape, 60.0), grey.shape) > 0
    middle = np.abs(np.fft.fftfreq(volume_shape[0]))[:, None, None] * np.ones(grey.shape) > 0.1
    assert grey[~seen & middle].mean() < 0.5 * grey[seen & middle].mean()


def test_contrast_transfer_has_its_zeros_where_theory_puts_them() -> None:
    """Without aberration and amplitude contrast the first zero lies at 1/sqrt(wavelength x defocus): 31.4 angstrom."""
    settings = dataclasses.replace(SMALL, spherical_aberration_mm=1e-9, amplitude_contrast=0.0)
    transfer = contrast_transfer((4, 4, 2000), dataclasses.replace(EXPOSURE, spacing_angstrom=10.0), settings)[0, 0]
    first_zero = int(np.nonzero(np.diff(np.sign(transfer[1:])))[0][0]) + 1
    assert 1 / (first_zero / 20000) == pytest.approx(np.sqrt(0.019687 * 5e4), rel=0.01)


def test_more_dose_is_a_clearer_picture_of_the_same_scene() -> None:
    clean = [
        shot_noise(dataclasses.replace(EXPOSURE, dose_electrons_per_angstrom2=dose), SMALL) for dose in (10, 40, 160)
    ]
    assert clean == pytest.approx([4 * clean[2], 2 * clean[2], clean[2]])
    images = []
    for dose in (5.0, 50.0, 500.0, 1e6):
        settings = dataclasses.replace(SMALL, dose_electrons_per_angstrom2=(dose, dose))
        images.append(simulate_tomogram(settings, 0).volume.ravel())
    likeness = [np.corrcoef(image, images[-1])[0, 1] for image in images]
    assert 0 < likeness[0] < likeness[1] < likeness[2] < likeness[3]
