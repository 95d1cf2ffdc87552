"""The simulated EM volumes: exact truth, geometry in nm, recorded faults, hard pictures, and files that survive kills."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage

from common.errors import UserError
from common.metrics.segmentation import adapted_rand, count_overlaps, jaccard, mask_overlap, without_truth
from data.phantoms import em_organelles
from data.phantoms.em import EMPhantom, simulate_volume, write_phantom
from data.phantoms.em_curves import Curves
from data.phantoms.em_grid import Grid, Warp, canvas, draw_warp, refined
from data.phantoms.em_imaging import draw_faults
from data.phantoms.em_organelles import CLEARANCE, Drawing, Organelle, body_of_balls
from data.phantoms.em_partition import Partition, connected_pieces, divide, instances, without_splinters

SOUND = {f"{name}_share": 0.0 for name in ("missing", "shifted", "folded", "scratched", "blurred", "charged")}
TINY = EMPhantom(train_volumes=2, validation_volumes=1, test_volumes=0, shape=(16, 36, 40))
MEDIUM = EMPhantom(shape=(40, 112, 120), shifted_share=0.0)  # a shift may lay two mitochondria side by side

Simulated = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], dict[str, Any]]


def changed(settings: EMPhantom, change: dict[str, Any]) -> EMPhantom:
    return dataclasses.replace(settings, **change)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def medium() -> Simulated:
    return simulate_volume(MEDIUM, "train", 3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("em") / "phantom"
    volumes = write_phantom(TINY, folder, 1)
    assert volumes == {
        "train": [folder / "train_0", folder / "train_1"],
        "validation": [folder / "validation_0"],
        "test": [],
    }
    return folder


# The truth


def test_every_neurite_is_one_connected_body(medium: Simulated) -> None:
    image, labels, record = medium
    assert image.shape == MEDIUM.shape and image.dtype == np.uint8
    assert labels.shape == (2, *MEDIUM.shape) and labels.dtype == np.uint32
    neurites = labels[0]
    sizes = np.bincount(neurites.ravel())
    assert len(sizes) - 1 == record["neurites"] > 40
    assert sizes[1:].min() >= MEDIUM.smallest_instance_voxels
    for number, box in enumerate(scipy.ndimage.find_objects(neurites.astype(np.int32)), 1):
        assert scipy.ndimage.label(neurites[box] == number)[1] == 1, f"neurite {number} is in pieces"


def test_neurites_fill_space_up_to_thin_gaps(medium: Simulated) -> None:
    _, labels, _ = medium
    gap = labels[0] == 0
    assert 0.03 < gap.mean() < 0.15
    assert (scipy.ndimage.distance_transform_edt(gap, MEDIUM.voxel_size_nm) > 60).mean() < 1e-3


@pytest.mark.parametrize("kind, name", [(1, "mitochondria"), (3, "lysosome")])
def test_an_organelle_lies_inside_one_neurite(kind: int, name: str, medium: Simulated) -> None:
    _, labels, record = medium
    bodies, count = scipy.ndimage.label(labels[1] == kind)
    assert count >= (3 if kind == 1 else 1) and record[f"{name}_voxels"] == (labels[1] == kind).sum()
    low, high = (0.5 * MEDIUM.mitochondria_share, 1.5 * MEDIUM.mitochondria_share) if kind == 1 else (0.002, 0.04)
    assert low < (labels[1] == kind).mean() < high
    for number in range(1, count + 1):
        owners = np.unique(labels[0][bodies == number])
        assert len(owners) == 1 and owners[0] > 0


def test_synaptic_densities_lie_at_faces(medium: Simulated) -> None:
    _, labels, _ = medium
    synapse = labels[1] == 2
    assert 0.0003 < synapse.mean() < 0.02 and set(np.unique(labels[1])) == {0, 1, 2, 3}
    low = scipy.ndimage.minimum_filter(np.where(labels[0], labels[0], 2**31), 7)
    high = scipy.ndimage.maximum_filter(labels[0], 7)
    assert (low != high)[synapse].mean() > 0.98


def test_membranes_and_mitochondria_are_dark(medium: Simulated) -> None:
    image, labels, _ = medium
    membrane = labels[0] == 0
    inside = scipy.ndimage.distance_transform_edt(~membrane, MEDIUM.voxel_size_nm) > 50
    cytoplasm = float(np.median(image[inside & (labels[1] == 0)]))
    assert np.median(image[membrane]) < cytoplasm - 40
    assert np.median(image[labels[1] == 1]) < cytoplasm - 35
    assert np.median(image[labels[1] == 2]) < cytoplasm - 45
    assert np.quantile(image[labels[1] == 3], 0.2) < cytoplasm - 35  # a third of them have a bright lumen


# The geometry


def open_drawing(grid: Grid) -> Drawing:
    """One neurite that fills the canvas, without distortion."""
    whole = np.ones(grid.shape, np.int32)
    partition = Partition(whole, whole + 1, np.full(grid.shape, 1e4, np.float32))
    nothing = np.zeros(grid.nodes, np.float32)
    warp = Warp(grid, np.zeros((3, *grid.nodes), np.float32))
    curves = Curves(np.zeros((0, 3)), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    free = np.zeros(grid.shape, np.uint8)
    return Drawing(
        grid, warp, curves, partition, np.zeros(grid.shape, np.float32), free, free > 0, nothing, EMPhantom()
    )


def test_organelles_are_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where space is distorted a body may be longer than planned; the box it is drawn in must not cut it."""
    drawn: list[bool] = []

    def noted(drawing: Drawing, *rest: Any) -> Organelle | None:
        organelle = body_of_balls(drawing, *rest)
        if organelle is not None:
            for axis, (part, n) in enumerate(zip(organelle.box, drawing.grid.shape, strict=True)):
                low, high = (organelle.inside.take(end, axis).any() for end in (0, -1))
                drawn.append(bool((part.start > 0 and low) or (part.stop < n and high)))
        return organelle

    monkeypatch.setattr(em_organelles, "body_of_balls", noted)
    simulate_volume(changed(MEDIUM, {"lysosomes_per_cubic_micrometre": 6.0}), "train", 5)
    assert len(drawn) > 30 and not any(drawn)


@pytest.mark.parametrize("voxel_size_nm", [(24.0, 12.0, 12.0), (8.0, 8.0, 8.0), (45.0, 9.0, 14.0)])
def test_a_ball_in_nm_is_a_ball(voxel_size_nm: tuple[float, float, float]) -> None:
    shape = tuple(int(700 / size) for size in voxel_size_nm)
    grid = canvas(changed(EMPhantom(), {"voxel_size_nm": voxel_size_nm, "shape": shape}))
    middle = grid.extent / 2
    ball = body_of_balls(open_drawing(grid), middle[None], np.array([200.0]), 1)
    assert ball is not None
    volume = len(ball.point) * np.prod(grid.spacing)
    assert volume == pytest.approx(4 / 3 * np.pi * 200**3, rel=0.03)
    reach = np.abs(ball.point - middle).max(0)
    assert (np.abs(reach - 200) <= np.array(grid.spacing)).all()


def test_an_organelle_keeps_clear_of_the_membrane() -> None:
    grid = canvas(changed(EMPhantom(), {"shape": (24, 48, 48)}))
    drawing = open_drawing(grid)
    drawing.partition.depth[...] = 12.0 * np.arange(grid.shape[2], dtype=np.float32)  # a membrane at x = 0
    body = body_of_balls(drawing, np.array([[280.0, 280.0, 60.0]]), np.array([150.0]), 1)
    assert body is not None and body.point[:, 2].min() > CLEARANCE


def test_each_point_belongs_to_the_nearest_tube() -> None:
    """Against all distances, without the shortcuts."""
    grid = canvas(changed(TINY, {"shape": (20, 48, 52)}))
    rng = np.random.default_rng(3)
    count = 60
    neurite = np.sort(rng.integers(1, 12, count))
    curves = Curves(rng.uniform(-100, 700, (count, 3)), rng.uniform(20, 120, count), neurite, np.arange(count))
    partition = divide(curves, grid, Warp(grid, np.zeros((3, *grid.nodes), np.float32)))
    nodes = tuple(slice(None, None, step) for step in grid.steps)  # where nothing is interpolated
    points = grid.points((slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2])))[nodes]
    distance = np.linalg.norm(points[..., None, :] - curves.position, axis=-1) - curves.radius
    tubes = np.stack([distance[..., neurite == k].min(-1) for k in np.unique(neurite)], axis=-1)
    order = np.argsort(tubes, axis=-1)
    known = np.unique(neurite)
    np.testing.assert_array_equal(partition.body[nodes], known[order[..., 0]])
    np.testing.assert_array_equal(partition.neighbour[nodes], known[order[..., 1]])


def test_depth_is_the_distance_to_the_face_in_nm() -> None:
    """Two distant balls of one size part space by a plane; across it, the distance is known."""
    grid = canvas(changed(TINY, {"shape": (24, 48, 48)}))
    middle = grid.extent / 2
    for direction in (np.array([1.0, 0, 0]), np.array([0, 0, 1.0]), np.array([0.6, 0, 0.8])):
        curves = Curves(
            np.stack([middle - 6000 * direction, middle + 6000 * direction]), np.full(2, 50.0), np.array([1, 2]), np.arange(2)
        )  # fmt: skip
        partition = divide(curves, grid, Warp(grid, np.zeros((3, *grid.nodes), np.float32)))
        box = (slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2]))
        expected = np.abs((grid.points(box) - middle) @ direction)
        near = expected < 100
        np.testing.assert_allclose(partition.depth[near], expected[near], atol=5)


def test_the_warp_is_undone() -> None:
    grid = canvas(MEDIUM)
    warp = draw_warp(grid, MEDIUM, np.random.default_rng(0))
    points = np.random.default_rng(1).uniform(100, grid.extent - 100, (500, 3))
    left = np.linalg.norm(warp.to_plan(warp.from_plan(points)) - points, axis=1)
    assert np.percentile(left, 95) < 5  # nm; in the steepest places the iteration needs longer
    amplitude = np.linalg.norm(MEDIUM.warp_nm)
    assert 0.8 * amplitude < (warp.to_plan(points) - points).std() < 1.2 * amplitude


def test_values_between_nodes_are_interpolated() -> None:
    z, y, x = np.meshgrid(np.arange(4.0), np.arange(3.0), np.arange(5.0), indexing="ij")
    finer = refined(2 * z - y + 3 * x, (3, 2, 1))
    assert finer.shape == (9, 4, 4)
    z, y, x = np.meshgrid(np.arange(9) / 3, np.arange(4) / 2, np.arange(4), indexing="ij")
    np.testing.assert_allclose(finer, 2 * z - y + 3 * x, atol=1e-5)


def test_pieces_are_connected_across_faces_only() -> None:
    labels = np.zeros((3, 4, 5), np.int32)
    labels[0, 0, 0] = labels[1, 1, 0] = labels[0, 0, 3] = labels[1, 0, 3] = 7
    pieces = connected_pieces(labels)
    assert len(np.unique(pieces)) == 4
    assert pieces[0, 0, 0] != pieces[1, 1, 0] and pieces[0, 0, 3] == pieces[1, 0, 3]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 3, (9, 10, 11)).astype(np.int32)
    pieces = connected_pieces(noise)
    expected = sum(scipy.ndimage.label(noise == value)[1] for value in range(3))
    assert pieces.max() + 1 == expected and len(np.unique(pieces)) == expected


def test_splinters_join_the_neighbour_with_most_faces() -> None:
    labels = np.full((4, 10, 10), 1, np.int32)
    labels[:, :, 6:] = 2
    labels[1:3, 4:6, 4:6] = 3  # touches 1 more than 2
    joined = without_splinters(labels, 20)
    assert len(np.unique(joined)) == 2 and joined[1, 4, 4] == joined[0, 0, 0] != joined[0, 0, 9]
    assert len(np.unique(without_splinters(labels, 8))) == 3


def test_a_body_cut_by_the_gap_becomes_two() -> None:
    body = np.full((6, 20, 40), 1, np.int32)
    depth = np.full(body.shape, 100, np.float32)
    depth[:, :, 20] = 2
    assert np.unique(instances(body, depth, 12.0, 50)).tolist() == [0, 1, 2]
    depth[:, 10, 20] = 50
    assert np.unique(instances(body, depth, 12.0, 50)).tolist() == [0, 1]


# The faults


def test_shifted_sections_move_image_and_labels_together() -> None:
    settings = changed(TINY, {**SOUND, "largest_shift_voxels": 2})
    still_image, still, _ = simulate_volume(settings, "train", 0)
    moved_settings = changed(settings, {"shifted_share": 1.0})
    image, labels, record = simulate_volume(moved_settings, "train", 0)
    noise = settings.white_noise_grey + settings.correlated_noise_grey
    for number, section in enumerate(record["sections"]):
        dy, dx = section["shift_voxels_yx"]
        assert section["fault"] == "shifted" and min(abs(dy), abs(dx)) >= 1 and max(abs(dy), abs(dx)) <= 2
        here, there = overlap((dy, dx), settings.shape[1:])
        np.testing.assert_array_equal(labels[1, number][here], still[1, number][there])
        agreeing = (labels[0, number][here] == 0) == (still[0, number][there] == 0)
        assert agreeing.mean() > 0.9  # splinters may differ where the border cuts otherwise
        apart = image[number][here].astype(float) - still_image[number][there]
        assert np.abs(apart).mean() < 1.5 * noise


def overlap(shift: tuple[int, int], shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a section moved by a shift shows what the unmoved one shows."""
    here = tuple(slice(max(0, -s), min(n, n - s)) for s, n in zip(shift, shape, strict=True))
    there = tuple(slice(part.start + s, part.stop + s) for part, s in zip(here, shift, strict=True))
    return here, there


def test_missing_sections_are_black_or_copies_as_recorded() -> None:
    settings = changed(TINY, {**SOUND, "missing_share": 0.6})
    image, labels, record = simulate_volume(settings, "train", 1)
    seen = set()
    for number, section in enumerate(record["sections"]):
        if section["fault"] == "":
            assert image[number].mean() > 90
            continue
        seen.add(section["shows"].split()[0])
        if section["shows"] == "black":
            assert image[number].max() < 15
        else:
            assert section["shows"] == f"section {number - 1}"
            np.testing.assert_array_equal(image[number], image[number - 1])
        assert labels[0, number].any()  # the truth stays
    assert seen == {"black", "section"}


@pytest.mark.parametrize("fault", ["folded", "scratched", "blurred", "charged"])
def test_other_faults_change_the_sections_recorded(fault: str) -> None:
    settings = changed(TINY, SOUND)
    sound, labels, _ = simulate_volume(settings, "validation", 0)
    image, same, record = simulate_volume(changed(settings, {f"{fault}_share": 0.4}), "validation", 0)
    np.testing.assert_array_equal(labels, same)
    spoilt = [section["section"] for section in record["sections"] if section["fault"] == fault]
    assert 1 < len(spoilt) < TINY.shape[0]
    assert [z for z in range(TINY.shape[0]) if (image[z] != sound[z]).any()] == spoilt


def test_faults_are_as_frequent_as_set() -> None:
    settings = changed(EMPhantom(), {"shape": (6000, 16, 16)})
    names = draw_faults(settings, np.random.default_rng(0)).names
    for name in ("missing", "shifted", "folded", "scratched", "blurred", "charged"):
        share = getattr(settings, f"{name}_share")
        assert names.count(name) / 6000 == pytest.approx(share, abs=3.5 * np.sqrt(share / 6000))


# The difficulty


def test_a_threshold_finds_no_mitochondria(medium: Simulated) -> None:
    threshold_otsu: Callable[[Any], float] = pytest.importorskip("skimage.filters").threshold_otsu
    image, labels, _ = medium
    truth = labels[1] == 1
    for sigma in (0.0, 1.0, 2.0):
        smooth = scipy.ndimage.gaussian_filter(image.astype(np.float32), (sigma / 2, sigma, sigma))
        assert jaccard(mask_overlap(truth, smooth < threshold_otsu(smooth), np.ones_like(truth))) < 0.35


def test_a_watershed_of_the_picture_finds_no_neurites(medium: Simulated) -> None:
    watershed = pytest.importorskip("skimage.segmentation").watershed
    image, labels, _ = medium
    for sigma in (1.0, 3.0):
        smooth = scipy.ndimage.gaussian_filter(image.astype(np.float32), (sigma / 2, sigma, sigma))
        seeds = scipy.ndimage.label(scipy.ndimage.maximum_filter(smooth, (3, 7, 7)) == smooth)[0]
        found = watershed(-smooth, seeds).astype(np.uint32)
        assert adapted_rand(without_truth(count_overlaps(labels[0], found), 0)).error > 0.5


# The files


def test_equal_arguments_give_equal_bits_and_volumes_differ(written: Path) -> None:
    alone = changed(TINY, {"train_volumes": 1, "test_volumes": 4})
    image, labels, record = simulate_volume(alone, "train", 0)
    np.testing.assert_array_equal(image, np.load(written / "train_0" / "image.npy"))
    np.testing.assert_array_equal(labels, np.load(written / "train_0" / "labels.npy"))
    assert record == json.loads((written / "train_0" / "record.json").read_text())
    names = ("train_0", "train_1", "validation_0")
    assert len({(written / name / "image.npy").read_bytes() for name in names}) == 3


def test_any_number_of_producers_writes_the_same_bits(written: Path, tmp_path: Path) -> None:
    write_phantom(TINY, tmp_path / "phantom", 2)
    assert files_of(tmp_path / "phantom") == files_of(written)


def test_an_interrupted_folder_is_completed(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    shutil.rmtree(folder / "train_1")
    stale = folder / ".train_1.partial"
    stale.mkdir()
    (stale / "image.npy").write_bytes(b"half a volume")
    (folder / "settings.json").rename(folder / "unfinished.json")
    untouched = (folder / "train_0").stat().st_mtime_ns
    write_phantom(TINY, folder, 1)
    assert files_of(folder) == files_of(written)
    assert (folder / "train_0").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("note", ["settings.json", "unfinished.json"])
def test_other_settings_in_the_folder_are_refused(written: Path, tmp_path: Path, note: str) -> None:
    (tmp_path / note).write_bytes((written / "settings.json").read_bytes())
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        write_phantom(changed(TINY, {"seed": 1}), tmp_path, 1)
    assert error.value.exit_code == 2 and "delete" in error.value.problems[0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shape": (8, 100, 100)}, "shape: expected three lengths of at least 16 voxels, got"),
        ({"shape": (16, 16, 100)}, "shape: expected at least 300 nm on every axis, got"),
        ({"voxel_size_nm": (24.0, 0.0, 12.0)}, "voxel_size_nm: expected three sizes between 4 and 60 nm"),
        ({"thin_radius_nm": (130.0, 60.0)}, "thin_radius_nm: expected lowest and highest"),
        ({"missing_share": 1.2}, "missing_share: expected a share"),
        ({"missing_share": 0.6, "blurred_share": 0.6}, "missing_share to charged_share: expected a sum"),
        ({"sheet_share": 0.8}, "thick_share + sheet_share: expected at most 0.9"),
        ({"mitochondria_share": 0.5}, "mitochondria_share: expected at most 0.3"),
        ({"matrix_grey": (90.0, 300.0)}, "matrix_grey: expected grey levels up to 255"),
        ({"white_noise_grey": -1.0}, "white_noise_grey: expected 0 or more"),
        ({"largest_shift_voxels": 40}, "largest_shift_voxels: expected at most a quarter"),
        ({"test_volumes": -1}, "test_volumes: expected 0 or more"),
    ],
)
def test_impossible_settings_are_named_in_one_line(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    settings = changed(TINY, change)
    found = list(settings.problems())
    assert len(found) == 1 and found[0].startswith(line) and "\n" not in found[0]
    with pytest.raises(UserError) as error:
        write_phantom(settings, tmp_path / "none", 1)
    assert error.value.problems == [f"phantom.{found[0]}"] and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"voxel_size_nm": (40.0, 5.0, 5.0), "shape": (16, 64, 64)},
        {"voxel_size_nm": (10.0, 10.0, 10.0), "shape": (40, 40, 40), "largest_shift_voxels": 0, "shifted_share": 0.5},
        {"thick_share": 0.0, "sheet_share": 0.0, "mitochondria_share": 0.0, "microtubules_per_neurite": (0, 0)},
        {"thick_share": 0.9, "sheet_share": 0.0, "thick_radius_nm": (490.0, 500.0), "warp_nm": (0.0, 0.0)},
        {"synapses_per_cubic_micrometre": 0.0, "lysosomes_per_cubic_micrometre": 0.0, "weak_share": 0.0},
        {"reticulum_share": 1.0, "loose_vesicles_per_cubic_micrometre": 0.0, "weak_share": 1.0, "ending_share": 1.0},
    ],
)
def test_unusual_settings_give_a_volume(change: dict[str, Any]) -> None:
    settings = changed(TINY, change)
    assert not list(settings.problems())
    image, labels, record = simulate_volume(settings, "test", 0)
    assert image.shape == labels.shape[1:] == settings.shape and len(record["sections"]) == settings.shape[0]
    assert image.std() > 5 and connected_pieces(labels[0]).max() + 1 >= record["neurites"] > 0


def test_default_settings_are_possible() -> None:
    assert not [*EMPhantom().problems(), *TINY.problems(), *MEDIUM.problems()]
