"""Patches: which are planned, where they lie, and that a motor's coordinates stay on its voxel."""

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.streams import random_for
from motor_detection.config import KAGGLE, Convert
from motor_detection.heatmap import render_heatmaps
from motor_detection.labels import LabelledTomogram
from motor_detection.patches import (
    MARGIN,
    PATCH_ARRAYS,
    ByteVolume,
    PatchPlan,
    cut_patch,
    plan_patches,
    read_patch,
    write_patch,
)

SHAPE = (120, 260, 320)  # no two axes alike
SIZE = (64, 96, 128)


def settings(single: float, multi: float, hard_negative: float, negative: float) -> Convert:
    counts = {"single": single, "multi": multi, "hard_negative": hard_negative, "negative": negative}
    return dataclasses.replace(KAGGLE.convert, patch_size=SIZE, **counts)


def labelled(tomo_id: str, motors: np.ndarray) -> LabelledTomogram:
    return LabelledTomogram(tomo_id, SHAPE, 13.1, np.asarray(motors, np.float64).reshape(-1, 3), 0)


def random_motors(random: np.random.Generator, number: int) -> np.ndarray:
    return random.uniform(-0.5, np.array(SHAPE) - 0.5, (number, 3))


def kinds(plans: list[PatchPlan]) -> dict[str, int]:
    return dict(collections.Counter(plan.patch_type for plan in plans))


def inside(motors: np.ndarray, plan: PatchPlan) -> np.ndarray:
    """Which motors lie inside a planned patch (n,)."""
    relative = motors - np.array(plan.origin)
    return ((relative >= -0.5) & (relative <= np.array(SIZE) - 0.5)).all(1)


def margin_kept(motor: np.ndarray, plan: PatchPlan) -> bool:
    """At least MARGIN voxels to each face, less the rounding to whole voxels, or the volume itself ends there."""
    origin, end = np.array(plan.origin), np.array(plan.origin) + SIZE
    below = (motor - origin >= MARGIN - 1) | (origin == 0)
    above = (end - 1 - motor >= MARGIN - 1) | (end >= np.array(SHAPE))
    return bool((below & above).all())


def test_plans_are_a_function_of_label_counts_and_seed() -> None:
    label = labelled("tomo_a", random_motors(random_for("plans"), 3))
    counts = settings(5, 2, 1, 3)
    plans = plan_patches(label, SHAPE, counts)
    assert plans == plan_patches(label, SHAPE, counts)
    assert plans != plan_patches(label, SHAPE, dataclasses.replace(counts, seed=counts.seed + 1))
    assert plans != plan_patches(dataclasses.replace(label, tomo_id="tomo_b"), SHAPE, counts)
    assert len({plan.origin for plan in plans}) > len(plans) // 2, "origins are drawn, not repeated"


def test_every_patch_lies_inside_the_tomogram() -> None:
    room = np.array(SHAPE) - SIZE
    for number in range(30):
        label = labelled(f"tomo_{number}", random_motors(random_for("inside", number), number % 4))
        origins = np.array([plan.origin for plan in plan_patches(label, SHAPE, settings(3, 2, 2, 2))])
        assert ((origins >= 0) & (origins <= room)).all()


def test_single_patches_hold_their_motor_with_a_margin() -> None:
    for number in range(100):
        motors = random_motors(random_for("single", number), 1)
        plans = plan_patches(labelled(f"tomo_{number}", motors), SHAPE, settings(3, 0, 0, 0))
        assert kinds(plans) == {"single": 3}
        assert all(inside(motors, plan).all() and margin_kept(motors[0], plan) for plan in plans)


def test_motors_at_the_faces_of_the_volume_are_held() -> None:
    """Labels reach from half a voxel before the first centre to half a voxel behind the last."""
    ends = [(-0.5, 0.0, n - 1.0, n - 0.5) for n in SHAPE]
    for number, motor in enumerate(np.array(np.meshgrid(*ends)).reshape(3, -1).T):
        plans = plan_patches(labelled(f"tomo_{number}", motor), SHAPE, settings(2, 0, 0, 0))
        assert len(plans) == 2 and all(inside(motor[None], plan).all() for plan in plans)


def test_multi_patches_hold_both_motors_with_a_margin_and_wide_pairs_are_left_out() -> None:
    fitting = 0
    for number in range(100):
        motors = random_motors(random_for("multi", number), 2)
        fits = (np.abs(motors[0] - motors[1]) < np.array(SIZE) - 2 * MARGIN).all()
        plans = plan_patches(labelled(f"tomo_{number}", motors), SHAPE, settings(0, 3, 0, 0))
        assert kinds(plans) == ({"multi": 3} if fits else {})
        assert all(inside(motors, plan).all() for plan in plans)
        assert all(margin_kept(motor, plan) for motor in motors for plan in plans)
        fitting += bool(fits)
    assert fitting >= 5, "the draw must hold pairs that fit"


def test_multi_counts_pairs() -> None:
    """Three motors close together are three pairs."""
    motors = np.array([[50.0, 100, 100], [55, 105, 110], [60, 110, 90]])
    assert kinds(plan_patches(labelled("tomo", motors), SHAPE, settings(0, 2, 0, 0))) == {"multi": 6}


@pytest.mark.parametrize("kind", ["hard_negative", "negative"])
def test_negative_patches_hold_no_motor(kind: str) -> None:
    """Nor one within a margin around them; of hard negatives the nearest motor is not far."""
    wanted = settings(0, 0, 3, 0) if kind == "hard_negative" else settings(0, 0, 0, 3)
    found = 0
    for number in range(60):
        motors = random_motors(random_for(kind, number), 1 + number % 3)
        plans = plan_patches(labelled(f"tomo_{number}", motors), SHAPE, wanted)
        found += len(plans)
        for plan in plans:
            assert plan.patch_type == kind
            relative = motors - np.array(plan.origin)
            outside = np.maximum(-relative, relative - (np.array(SIZE) - 1))
            assert (outside.max(1) > MARGIN).all()
            if kind == "hard_negative":
                assert (outside <= 0.3 * np.array(SIZE) + 1.5).all(1).any()
    assert found > 60


def test_a_tomogram_without_motors_gives_only_negatives() -> None:
    assert kinds(plan_patches(labelled("tomo", np.zeros((0, 3))), SHAPE, settings(5, 5, 5, 4))) == {"negative": 4}


def test_a_patch_that_has_no_place_is_left_out() -> None:
    """Motors everywhere: no origin is free of them, and the search ends."""
    grid = np.stack(np.meshgrid(*[np.arange(10, n, 40) for n in SHAPE], indexing="ij"), -1).reshape(-1, 3)
    assert plan_patches(labelled("tomo", grid), SHAPE, settings(0, 0, 1, 5)) == []


def test_fractional_counts_are_met_on_average() -> None:
    """2.4 patches per motor are 2 or 3 of them, 2.4 in the mean over many motors."""
    each = []
    for number in range(400):
        label = labelled(f"tomo_{number}", random_motors(random_for("fractions", number), 1))
        each.append(len(plan_patches(label, SHAPE, settings(2.4, 0, 0, 0))))
    assert set(each) == {2, 3}
    assert np.mean(each) == pytest.approx(2.4, abs=4 * np.sqrt(0.24 / 400))


def numbered_volume(shape: tuple[int, int, int], motors: np.ndarray) -> ByteVolume:
    """Grey values up to 100 that differ from voxel to voxel; the voxel of each motor is 255."""
    voxels = (np.arange(np.prod(shape)) * 7 % 101).astype(np.uint8).reshape(shape)
    for z, y, x in np.rint(motors).astype(int):
        voxels[z, y, x] = 255
    return ByteVolume(voxels, (13.1, 13.1, 13.1), float(voxels.mean()), float(voxels.std()))


def test_coordinates_in_a_patch_point_to_the_motor_s_voxel() -> None:
    for number in range(8):
        motors = random_for("bright", number).integers(0, SHAPE, (3, 3)).astype(np.float64)
        label = labelled(f"tomo_{number}", motors)
        volume = numbered_volume(SHAPE, motors)
        for plan in plan_patches(label, SHAPE, settings(2, 0, 1, 1)):
            arrays = cut_patch(volume, plan, label, SIZE)
            bright = {tuple(place) for place in np.argwhere(arrays["patch"] == 255).tolist()}
            held = arrays["motors"][((arrays["motors"] >= 0) & (arrays["motors"] < SIZE)).all(1)]
            assert {tuple(motor) for motor in held.astype(int).tolist()} == bright
            assert len(bright) == inside(motors, plan).sum()
            window = tuple(slice(o, o + n) for o, n in zip(plan.origin, SIZE, strict=True))
            np.testing.assert_array_equal(arrays["patch"], volume.voxels[window])


def test_fractions_of_a_voxel_are_kept() -> None:
    label = labelled("tomo", np.array([[50.25, 100.5, 120.75]]))
    plan = PatchPlan("single", (20, 60, 70))
    arrays = cut_patch(numbered_volume(SHAPE, np.zeros((0, 3))), plan, label, SIZE)
    np.testing.assert_array_equal(arrays["motors"], [[30.25, 40.5, 50.75]])
    np.testing.assert_array_equal(arrays["origin"], plan.origin)
    np.testing.assert_allclose(arrays["spacing_angstrom"], 13.1, rtol=1e-6)


def test_a_motor_outside_still_draws_its_tail_into_the_patch() -> None:
    """The heat map of a patch equals the crop of the tomogram's own, also where only the flank of a blob is inside."""
    random = random_for("tails")
    sigma = torch.full((1, 3), 15.3)
    volume = numbered_volume(SHAPE, np.zeros((0, 3)))
    for _ in range(20):
        motors = random_motors(random, 4)
        origin = 16 * random.integers(0, [4, 11, 13])
        plan = PatchPlan("negative", (int(origin[0]), int(origin[1]), int(origin[2])))
        label = labelled("tomo", motors)
        kept = cut_patch(volume, plan, label, SIZE)["motors"]
        found = render_heatmaps(torch.from_numpy(kept)[None], sigma, SIZE, 16)[0, 0]
        whole = render_heatmaps(torch.from_numpy(motors)[None], sigma, SHAPE, 16)[0, 0]
        crop = whole[tuple(slice(o // 16, o // 16 + n // 16) for o, n in zip(origin, SIZE, strict=True))]
        shared = tuple(slice(0, n) for n in crop.shape)
        torch.testing.assert_close(found[shared], crop, atol=1e-3, rtol=0)


def test_a_tomogram_smaller_than_the_patch_is_filled_with_its_mean() -> None:
    shape = (40, 200, 100)
    label = LabelledTomogram("tomo", shape, 13.1, np.array([[30.0, 150.0, 99.5]]), 0)
    volume = numbered_volume(shape, np.array([[30, 150, 99]]))
    plans = plan_patches(label, shape, settings(2, 0, 1, 1))
    assert "single" in kinds(plans)
    for plan in plans:
        assert plan.origin[0] == plan.origin[2] == 0 and plan.origin[1] + SIZE[1] <= shape[1]
        patch = cut_patch(volume, plan, label, SIZE)["patch"]
        assert patch.shape == SIZE
        assert (patch[40:] == round(volume.mean)).all() and (patch[:, :, 100:] == round(volume.mean)).all()
        y = plan.origin[1]
        np.testing.assert_array_equal(patch[:40, :, :100], volume.voxels[:, y : y + SIZE[1]])


def test_a_patch_file_gives_back_its_arrays(tmp_path: Path) -> None:
    label = labelled("tomo_é", np.array([[50.0, 100, 120]]))
    arrays = cut_patch(numbered_volume(SHAPE, label.motors), PatchPlan("single", (20, 60, 70)), label, SIZE)
    arrays["heatmap"] = np.zeros((4, 6, 6), np.float32)
    path = tmp_path / "0000_single.npz"
    write_patch(path, arrays)
    again = read_patch(path, tuple(PATCH_ARRAYS))
    assert again.keys() == arrays.keys() and str(again["tomo_id"]) == "tomo_é"
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["0000_single.npz"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "array", "pickle", "missing"])
def test_a_damaged_patch_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "0000_single.npz"
    np.savez(path, patch=np.zeros((8, 8, 8), np.uint8))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "text":
        path.write_text("not a patch")
    elif damage == "pickle":
        np.savez(path, patch=np.array([{"a": 1}], dtype=object))
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        read_patch(path, tuple(PATCH_ARRAYS))
    assert caught.value.exit_code == 1 and str(path) in caught.value.problems[0]
