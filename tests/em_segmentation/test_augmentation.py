"""Augmentation: ids survive, image and labels move together, every change does what its constants say and no more."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from em_segmentation.augmentation import CHANGES, DEFECTS, Patch, augmented, draw, problems
from em_segmentation.config import Augmentation
from em_segmentation.grey_values import bend, blur_in_plane
from em_segmentation.regions import Triple
from em_segmentation.section_defects import (
    BLANK,
    BOX_NOISE,
    MAX_SMEARED_SECTIONS,
    draw_boxes,
    draw_shift,
    line_kernel,
    shift_sections,
)
from em_segmentation.warping import ROTATIONS, ROTATIONS_IN_PLANE, draw_warp, orient, warp_image

CPU = torch.device("cpu")
NAMES = ("flip", *CHANGES, *DEFECTS)
SPATIAL = ("flip", "turn", "affine", "elastic", "misaligned")
THICK = (40.0, 4.0, 4.0)  # nm
ISOTROPIC = (8.0, 8.0, 8.0)
LARGE = 2**41 + 1  # ids that float32 cannot tell apart


def only(**constants: Any) -> Augmentation:
    """All probabilities 0 but those given."""
    return dataclasses.replace(Augmentation(**dict.fromkeys(NAMES, 0.0)), **constants)


def everything(**constants: Any) -> Augmentation:
    return dataclasses.replace(Augmentation(**dict.fromkeys(NAMES, 1.0)), one_defect=False, **constants)


def coordinates(size: Triple) -> Tensor:
    """(3, z, y, x): every voxel's own index."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"))


def traceable(size: Triple, positions: list[int]) -> Patch:
    """Every voxel has an id of its own, and an image of three channels that says where it was."""
    where = coordinates(size)
    ids = (torch.arange(where[0].numel()) + LARGE).view(1, *size)
    labels = torch.stack([torch.cat([ids, ids.flip(1)])] * len(positions))
    image = torch.stack([where.float()] * len(positions))
    return Patch(image, labels, torch.ones_like(labels[:, :1], dtype=torch.bool), torch.tensor(positions))


def noisy(size: Triple, positions: list[int]) -> Patch:
    """A grey image of noise with objects of 4 x 4 x 4 voxels; one corner is not annotated."""
    z, y, x = coordinates(size) // 4
    labels = ((z * 100 + y) * 100 + x + LARGE)[None]
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, *size)).astype(np.float32))
    annotated = torch.ones_like(labels, dtype=torch.bool)
    annotated[:, :1, :2, :3] = False
    parts = (torch.stack([part] * len(positions)) for part in (image, labels, annotated))
    return Patch(*parts, torch.tensor(positions))


def equal(one: Patch, other: Patch) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Patch))


@pytest.mark.parametrize(("size", "voxel"), [((6, 24, 24), THICK), ((16, 16, 16), ISOTROPIC)])
def test_ids_survive_everything(size: Triple, voxel: tuple[float, float, float]) -> None:
    batch = noisy(size, list(range(8)))
    result = augmented(batch, everything(permute=size[0] == size[1]), voxel, 3)
    assert set(result.labels.unique().tolist()) <= {0, *batch.labels.unique().tolist()}
    assert result.labels.dtype == torch.int64
    assert (result.labels != batch.labels).any()
    assert result.image.isfinite().all()
    assert not result.annotated[result.labels == 0].any(), "what came from outside is not annotated"


@pytest.mark.parametrize("name", [*SPATIAL, "all"])
@pytest.mark.parametrize(("size", "voxel"), [((5, 24, 24), THICK), ((14, 14, 14), ISOTROPIC)])
def test_image_labels_and_annotated_move_together(name: str, size: Triple, voxel: tuple[float, float, float]) -> None:
    """The id says which voxel came here, the image where it was: the two differ by half a voxel at most."""
    names = SPATIAL if name == "all" else (name,)
    settings = only(
        **dict.fromkeys(names, 1.0), elastic_spacing_nm=60.0, elastic_amplitude_nm=15.0, permute=size[0] == size[1]
    )
    batch = traceable(size, list(range(6)))
    result = augmented(batch, settings, voxel, 0)
    assert not torch.equal(result.labels, batch.labels)
    kept = result.annotated[:, 0]
    assert torch.equal(kept, result.labels[:, 0] > 0)
    assert torch.equal(kept, result.labels[:, 1] > 0)
    assert kept.float().mean() > 0.3
    came_from = np.unravel_index((result.labels[:, 0] - LARGE)[kept].numpy(), size)
    for axis, index in enumerate(came_from):
        difference = result.image[:, axis][kept].numpy() - index
        assert np.abs(difference).max() < 0.5 + 1e-3
        if name in ("flip", "turn", "misaligned"):
            assert np.abs(difference).max() == 0


def test_the_same_draws_give_the_same_bits_whatever_the_batch() -> None:
    settings = everything()
    together = augmented(noisy((6, 20, 20), [7, 3, 11]), settings, THICK, 5)
    for number, position in enumerate([7, 3, 11]):
        alone = augmented(noisy((6, 20, 20), [position]), settings, THICK, 5)
        assert torch.equal(alone.image[0], together.image[number])
        assert torch.equal(alone.labels[0], together.labels[number])
    assert not torch.equal(together.image[0], together.image[1])
    assert not torch.equal(augmented(noisy((6, 20, 20), [7]), settings, THICK, 6).image[0], together.image[0])


def test_nothing_drawn_is_the_identity_and_the_input_is_never_written() -> None:
    batch = noisy((6, 20, 20), [0, 1])
    assert equal(augmented(batch, only(), THICK, 0), batch)
    augmented(batch, everything(), THICK, 0)
    assert equal(batch, noisy((6, 20, 20), [0, 1]))
    for name in DEFECTS:
        augmented(batch, only(**{name: 1.0}), THICK, 0)
    assert equal(batch, noisy((6, 20, 20), [0, 1]))


def test_one_setting_moves_one_change() -> None:
    batch = noisy((6, 20, 20), list(range(4)))
    settings = everything()
    for name in ("noise", "blur", "cut_out", "missing_section"):
        without = augmented(batch, dataclasses.replace(settings, **{name: 0.0}), THICK, 0)
        assert torch.equal(without.labels, augmented(batch, settings, THICK, 0).labels)


@pytest.mark.parametrize("size", [(1, 16, 16), (2, 9, 9), (3, 1, 1), (4, 8, 11)])
def test_thin_and_uneven_patches(size: Triple) -> None:
    settings = everything(turn=float(size[1] == size[2]), misalignment_voxels=4)
    result = augmented(noisy(size, list(range(10))), settings, THICK, 0)
    assert result.image.isfinite().all()
    assert result.image.shape[2:] == size


def test_a_constant_image_stays_finite() -> None:
    batch = dataclasses.replace(noisy((4, 12, 12), [0, 1, 2]), image=torch.zeros(3, 1, 4, 12, 12))
    assert augmented(batch, everything(), THICK, 0).image.isfinite().all()


def test_one_section_is_neither_blanked_nor_shifted() -> None:
    batch = noisy((1, 16, 16), list(range(5)))
    assert equal(augmented(batch, only(missing_section=1.0), THICK, 0), batch)
    assert equal(augmented(batch, only(misaligned=1.0), THICK, 0), batch)


def test_flips_are_exact_and_independent() -> None:
    batch = traceable((3, 4, 5), list(range(200)))
    flipped = augmented(batch, only(flip=1.0), THICK, 0)
    assert torch.equal(flipped.labels, batch.labels.flip(2, 3, 4))
    some = augmented(batch, only(flip=0.3), THICK, 0)
    corner = some.image[:, :, 0, 0, 0] > 0  # (B, 3): is this axis flipped?
    assert len(corner.unique(dim=0)) == 8
    assert torch.all((corner.float().mean(0) - 0.3).abs() < 4 * (0.21 / 200) ** 0.5)


def test_quarter_turns_are_rot90_and_all_three_happen() -> None:
    batch = traceable((3, 6, 6), list(range(60)))
    result = augmented(batch, only(turn=1.0), THICK, 0)
    turns = [batch.labels[0].rot90(k, (2, 3)) for k in range(4)]
    seen = [[torch.equal(labels, turn) for turn in turns].index(True) for labels in result.labels]
    assert set(seen) == {1, 2, 3}


def test_flips_and_turns_together_reach_every_orientation_alike() -> None:
    batch = traceable((2, 4, 4), list(range(640)))
    result = augmented(batch, only(turn=0.75, flip=0.5), THICK, 0)
    _, counts = np.unique(result.labels[:, 0].flatten(1).numpy(), axis=0, return_counts=True)
    assert len(counts) == 16, "8 in the plane, times 2 along z"
    assert counts.min() > 18
    assert counts.max() < 66


def test_turns_over_all_axes_are_the_rotations_of_a_cube() -> None:
    batch = traceable((4, 4, 4), list(range(300)))
    result = augmented(batch, only(turn=1.0, permute=True), ISOTROPIC, 0)
    found = set()
    for image in result.image:  # three channels: where each voxel was
        steps = [image[(slice(None), *axis)] - image[:, 0, 0, 0] for axis in np.eye(3, dtype=int)]
        matrix = torch.stack(steps)
        assert torch.linalg.det(matrix).round() == 1, "a rotation, not a mirror image"
        found.add(tuple(matrix.flatten().int().tolist()))
    assert len(found) == 23
    assert len(ROTATIONS) == 24
    assert len(ROTATIONS_IN_PLANE) == 4
    assert torch.equal(orient(batch.labels[0], ROTATIONS[0]), batch.labels[0])
    assert torch.equal(orient(batch.labels[0], ROTATIONS_IN_PLANE[0]), batch.labels[0])


def test_an_affine_map_keeps_lengths_in_nm_up_to_its_scale() -> None:
    voxel, size = (40.0, 4.0, 7.0), (3, 21, 31)
    angles = []
    for number in range(50):
        random = np.random.default_rng(number)
        warp = draw_warp(random, None, size, voxel, only(rotation_degrees=20.0, scale=0.2), CPU)
        assert warp.z is None
        y, x = (source[0].double().numpy() * edge for source, edge in ((warp.y, voxel[1]), (warp.x, voxel[2])))
        assert (y[10, 15], x[10, 15]) == pytest.approx((40, 105), abs=1e-4), "the centre stays"
        along_y = np.array([y[11, 15] - y[10, 15], x[11, 15] - x[10, 15]]) / voxel[1]
        along_x = np.array([y[10, 16] - y[10, 15], x[10, 16] - x[10, 15]]) / voxel[2]
        assert along_y @ along_x == pytest.approx(0, abs=1e-4)
        assert np.linalg.norm(along_y) == pytest.approx(np.linalg.norm(along_x), abs=1e-4)
        assert 1 / 1.2 - 1e-4 <= np.linalg.norm(along_y) <= 1 / 0.8 + 1e-4
        angles.append(np.degrees(np.arctan2(along_x[0], along_x[1])))
    assert -20 <= min(angles) < -10
    assert 10 < max(angles) <= 20


@pytest.mark.parametrize(("size", "voxel"), [((5, 16, 16), THICK), ((12, 12, 12), ISOTROPIC)])
def test_a_warped_image_is_the_one_that_scipy_samples(size: Triple, voxel: tuple[float, float, float]) -> None:
    image = noisy(size, [0]).image[0]
    settings = only(elastic_spacing_nm=60.0, elastic_amplitude_nm=12.0)
    for affine, elastic in itertools.product((None, np.random.default_rng(1)), (None, np.random.default_rng(2))):
        warp = draw_warp(affine, elastic, size, voxel, settings, CPU)
        z = torch.arange(size[0], dtype=torch.float32)[:, None, None] if warp.z is None else warp.z
        source = [part.expand(size).numpy() for part in (z, warp.y, warp.x)]
        expected = ndimage.map_coordinates(image[0].numpy(), source, order=1, mode="mirror")
        np.testing.assert_allclose(warp_image(image, warp)[0].numpy(), expected, atol=1e-4)


def displacement(seed: int, size: Triple, voxel: tuple[float, float, float], settings: Augmentation) -> Tensor:
    """Of one drawn warp, in voxels: (2 or 3, z, y, x)."""
    warp = draw_warp(None, np.random.default_rng(seed), size, voxel, settings, CPU)
    moved = [part for part in (warp.z, warp.y, warp.x) if part is not None]
    return torch.stack(moved) - coordinates(size)[-len(moved) :]


@pytest.mark.parametrize("voxel", [(40.0, 4.0, 8.0), (8.0, 8.0, 8.0)])
def test_elastic_displacements_have_their_amplitude_in_nm_and_are_smooth(
    voxel: tuple[float, float, float],
) -> None:
    size, settings = (4, 10, 60), only(elastic_spacing_nm=100.0, elastic_amplitude_nm=10.0)
    fields = torch.stack([displacement(number, size, voxel, settings) for number in range(400)])
    moved_axes = voxel if voxel[0] == 8.0 else voxel[1:]
    assert fields.shape[1] == len(moved_axes), "thick sections are not warped along z"
    in_nm = fields * torch.tensor(moved_axes)[:, None, None, None]
    apart = in_nm[..., :8] - in_nm[..., -8:]  # four knots apart or more: independent, so twice the variance
    deviation = apart.std(0) / 2**0.5
    assert (deviation.mean() - 10).abs() < 0.25
    assert (deviation - 10).abs().max() < 10 * 5 / 800**0.5
    assert in_nm.mean((2, 3, 4)).abs().max() < 1e-4, "the patch stays as a whole"
    step = in_nm.diff(dim=-1).abs().max() / voxel[2]
    assert step < 1, "no fold: neighbours along x keep their order"
    assert in_nm.diff(dim=-1).diff(dim=-1).abs().max() < 3, "no kink"


def test_misaligned_sections_are_shifted_whole_and_what_they_leave_is_not_annotated() -> None:
    size = (6, 20, 20)
    batch = traceable(size, list(range(80)))
    result = augmented(batch, only(misaligned=1.0, misalignment_voxels=3), THICK, 0)
    shifts, firsts = set(), set()
    for number in range(80):
        image, labels, annotated = result.image[number], result.labels[number], result.annotated[number, 0]
        moved = (image[1:, :, 10, 10] != 10).any(0)
        first = int(moved.float().argmax())
        assert moved[first:].all()
        assert torch.equal(labels[:, :first], batch.labels[number, :, :first])
        dy, dx = (10 - image[1:, first, 10, 10]).int().tolist()
        y, x = slice(max(dy, 0), 20 + min(dy, 0)), slice(max(dx, 0), 20 + min(dx, 0))
        expected = batch.labels[number].roll((dy, dx), (2, 3))
        assert torch.equal(labels[:, first:, y, x], expected[:, first:, y, x])
        vacated = torch.ones(20, 20, dtype=torch.bool)
        vacated[y, x] = False
        assert not annotated[first:, vacated].any()
        assert annotated[:first].all()
        assert annotated[first:, ~vacated].all()
        assert not labels[:, first:, vacated].any()
        shifts.add((dy, dx))
        firsts.add(first)
    assert (0, 0) not in shifts
    assert {max(abs(dy), abs(dx)) for dy, dx in shifts} == {1, 2, 3}
    assert firsts == {1, 2, 3, 4, 5}


def test_a_shift_is_any_but_none() -> None:
    draws = [draw_shift(np.random.default_rng(k), (3, 9, 9), only(misalignment_voxels=1)) for k in range(400)]
    assert {draw[1:] for draw in draws} == {*itertools.product((-1, 0, 1), repeat=2)} - {(0, 0)}
    assert {draw[0] for draw in draws} == {1, 2}


def test_affinities_across_a_shift_are_those_of_the_shifted_objects() -> None:
    """A straight column 6 voxels wide: across the shift it is connected where its two halves still overlap."""
    batch = noisy((4, 16, 16), list(range(30)))
    column = torch.zeros(30, 1, 4, 16, 16, dtype=torch.int64)
    column[..., 5:11, 5:11] = LARGE
    batch = dataclasses.replace(batch, labels=column, annotated=torch.ones_like(column, dtype=torch.bool))
    result = augmented(batch, only(misaligned=1.0, misalignment_voxels=4), THICK, 0)
    same = (result.labels[:, 0, 1:] == result.labels[:, 0, :-1]) & (result.labels[:, 0, 1:] > 0)
    area = result.labels[:, 0].count_nonzero((2, 3))
    assert (area == 36).all(), "no part of the column left the patch"
    for number in range(30):
        rows, columns = ((result.labels[number, 0] > 0).any(axis).int().argmax(1) for axis in (2, 1))
        overlap = (6 - rows.diff().abs()) * (6 - columns.diff().abs())
        assert torch.equal(same[number].count_nonzero((1, 2)), overlap)


def test_shifted_sections_repeat_the_images_border() -> None:
    image = torch.arange(12.0).view(1, 2, 2, 3)
    assert shift_sections(image, (1, 1, -1))[0].tolist() == [[[0, 1, 2], [3, 4, 5]], [[7, 8, 8], [7, 8, 8]]]


def test_intensity_keeps_the_order_of_grey_values() -> None:
    batch = noisy((3, 16, 16), list(range(20)))
    result = augmented(batch, only(intensity=1.0), THICK, 0)
    before, after = batch.image.flatten(1), result.image.flatten(1)
    order = before[0].argsort()
    assert (after[:, order].diff() > -1e-5).all()
    assert torch.equal(result.labels, batch.labels)
    assert ((after.mean(1) - before.mean(1)).abs() <= 0.3 + 0.02).all()
    assert (after.std(1).min(), after.std(1).max()) == pytest.approx((0.7, 1.3), abs=0.15)
    assert after.mean(1).std() > 0.1


def test_gamma_changes_the_shape_of_the_histogram_only() -> None:
    image = noisy((8, 32, 32), [0]).image[0]
    for gamma in (0.7, 1.0, 1.4):
        bent = bend(image, gamma)
        assert bent.mean() == pytest.approx(float(image.mean()), abs=1e-5)
        assert bent.std() == pytest.approx(float(image.std()), abs=1e-5)
        skew = float(((bent - bent.mean()) ** 3).mean())
        assert skew == pytest.approx(0, abs=0.05) if gamma == 1 else skew * (gamma - 1) > 0.01
    torch.testing.assert_close(bend(image, 1.0), image)


def test_every_section_gets_its_own_contrast_and_brightness() -> None:
    batch = noisy((20, 12, 12), [0])
    result = augmented(batch, only(section_intensity=1.0), THICK, 0)
    before, after = batch.image[0, 0].flatten(1), result.image[0, 0].flatten(1)
    contrast = after.std(1) / before.std(1)
    brightness = after.mean(1) - contrast * before.mean(1)
    torch.testing.assert_close(after, contrast[:, None] * before + brightness[:, None], atol=1e-4, rtol=0)
    assert 0.7 <= contrast.min() < 0.85
    assert 1.15 < contrast.max() <= 1.3
    assert -0.3 <= brightness.min() < -0.15
    assert 0.15 < brightness.max() <= 0.3


def test_noise_is_gaussian_of_a_level_up_to_its_constant() -> None:
    batch = noisy((8, 24, 24), list(range(40)))
    added = (augmented(batch, only(noise=1.0, noise_level=0.5), THICK, 0).image - batch.image).flatten(1)
    levels = added.std(1)
    assert 0 < levels.min() < 0.1
    assert 0.4 < levels.max() < 0.52
    assert ((added.mean(1) / levels).abs() < 5 / added.shape[1] ** 0.5).all()
    kurtosis = ((added / levels[:, None]) ** 4).mean(1)
    assert kurtosis.mean() == pytest.approx(3, abs=0.05)


def test_blur_is_a_gaussian_of_every_section() -> None:
    image = noisy((3, 40, 30), [0]).image[0]
    expected = ndimage.gaussian_filter(image[0].double().numpy(), (0, 1.4, 1.4), truncate=8)
    inner = (slice(None), slice(12, -12), slice(12, -12))
    np.testing.assert_allclose(blur_in_plane(image, 1.4)[0].numpy()[inner], expected[inner], atol=1e-5)
    torch.testing.assert_close(blur_in_plane(torch.full((1, 2, 9, 7), 3.0), 1.4), torch.full((1, 2, 9, 7), 3.0))
    torch.testing.assert_close(blur_in_plane(image, 0.0), image)


def test_blur_is_drawn_up_to_its_constant() -> None:
    batch = noisy((4, 40, 40), list(range(40)))
    blurred = augmented(batch, only(blur=1.0, blur_voxels=2.0), THICK, 0).image.flatten(1).std(1)
    assert blurred.min() >= blur_in_plane(batch.image[0], 2.0).std()
    assert blurred.min() < blur_in_plane(batch.image[0], 1.7).std()
    assert blurred.max() > blur_in_plane(batch.image[0], 0.3).std()


def test_missing_sections_are_dark_and_their_labels_stay() -> None:
    batch = noisy((6, 12, 12), list(range(60)))
    result = augmented(batch, only(missing_section=1.0, missing_sections=3), THICK, 0)
    blank = result.image.std((1, 3, 4)) == 0  # (B, z)
    assert set(blank.sum(1).tolist()) == {1, 2, 3}
    assert blank.any(0).all()
    assert BLANK[0] <= result.image[:, 0][blank].min()
    assert result.image[:, 0][blank].max() <= BLANK[1]
    assert torch.equal(result.image[:, 0][~blank], batch.image[:, 0][~blank])
    assert torch.equal(result.labels, batch.labels)
    assert torch.equal(result.annotated, batch.annotated)


def test_motion_smears_a_point_along_a_line() -> None:
    batch = noisy((5, 21, 21), list(range(60)))
    points = torch.zeros_like(batch.image)
    points[..., 10, 10] = 1
    result = augmented(dataclasses.replace(batch, image=points), only(motion_blur=1.0, motion_voxels=7), THICK, 0)
    smeared = result.image[:, 0, :, 10, 10] < 1  # (B, z)
    assert set(smeared.sum(1).tolist()) == set(range(1, MAX_SMEARED_SECTIONS + 1))
    torch.testing.assert_close(result.image.sum((3, 4)), torch.ones(60, 1, 5))
    offset = torch.arange(21.0) - 10
    sections = result.image[:, 0][smeared]  # (N, y, x)
    assert sections.sum((1, 2), keepdim=True).allclose(torch.ones(()))
    assert (sections * offset).sum((1, 2)).abs().max() < 1e-5, "centred"
    reach = [(offset[:, None] ** 2 + offset**2)[section > 0].max().sqrt() for section in sections]
    assert min(reach) > 0.9
    assert max(reach) < 3 + 2**0.5
    rows, columns = ((sections.sum(axis) > 0.01).sum(1) for axis in (2, 1))
    assert ((rows - columns) > 2).any(), "some more along y"
    assert ((columns - rows) > 2).any(), "some more along x"
    assert torch.equal(result.labels, batch.labels)


def test_a_line_along_an_axis_is_even() -> None:
    line = np.zeros((5, 5))
    line[2] = 0.2
    np.testing.assert_allclose(line_kernel(5, 0.0), line, atol=1e-12)
    np.testing.assert_allclose(line_kernel(5, np.pi / 2), line.T, atol=1e-12)
    for length, angle in itertools.product(range(2, 10), np.linspace(0, np.pi, 7)):
        kernel = line_kernel(length, angle)
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)


def test_boxes_lie_in_the_patch_and_have_their_share_of_its_edges() -> None:
    size, shares, counts = (10, 40, 80), [], set()
    for number in range(200):
        boxes = draw_boxes(np.random.default_rng(number), size, only(cut_share=0.4))
        counts.add(len(boxes))
        for box in boxes:
            assert all(0 <= part.start < part.stop <= n for part, n in zip(box[1:], size, strict=True))
            shares.append([(part.stop - part.start) / n for part, n in zip(box[1:], size, strict=True)])
    assert counts == {1, 2, 3}
    assert (np.min(shares, 0) == (0.1, 0.1, 0.1)).all()
    assert (np.max(shares, 0) == (0.4, 0.4, 0.4)).all()
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)


def test_cut_out_boxes_are_grey_and_change_the_image_only() -> None:
    batch = noisy((12, 32, 32), list(range(40)))
    result = augmented(batch, only(cut_out=1.0, cut_share=0.5), THICK, 0)
    assert torch.equal(result.labels, batch.labels)
    assert torch.equal(result.annotated, batch.annotated)
    for before, after in zip(batch.image[:, 0], result.image[:, 0], strict=True):
        changed = before != after
        greys = after[changed].unique()
        assert 1 <= len(greys) <= 3
        assert greys.abs().max() <= 2
        if len(greys) == 1:
            (box,) = ndimage.find_objects(changed.int().numpy())
            assert changed[box].all()


def test_noise_boxes_are_noisy_and_change_the_image_only() -> None:
    batch = noisy((12, 32, 32), list(range(40)))
    result = augmented(batch, only(cut_noise=1.0), THICK, 0)
    assert torch.equal(result.labels, batch.labels)
    added = result.image - batch.image
    assert ((added != 0).float().mean((1, 2, 3, 4)) < 3 * 0.3**3 * 1.3).all()
    for one in added:
        # three boxes may overlap, and their noise then adds up
        assert BOX_NOISE[0] * 0.8 < one[one != 0].std() < BOX_NOISE[1] * 3**0.5


def frequencies(settings: Augmentation, count: int) -> tuple[dict[str, float], list[set[str]]]:
    happened = [set(draw(settings, 1, position)) for position in range(count)]
    return {name: sum(name in names for names in happened) / count for name in NAMES}, happened


@pytest.mark.parametrize("one_defect", [True, False])
def test_changes_happen_as_often_as_their_probabilities_say(one_defect: bool) -> None:
    count, settings = 4000, Augmentation(one_defect=one_defect)
    frequency, happened = frequencies(settings, count)
    for name in (*CHANGES, *DEFECTS):
        chance = getattr(settings, name)
        assert abs(frequency[name] - chance) < 4.5 * (chance * (1 - chance) / count) ** 0.5, name
    together = sum(len(names & set(DEFECTS)) > 1 for names in happened)
    assert together == 0 if one_defect else together > 200


def test_every_change_has_numbers_of_its_own() -> None:
    first = [random.random() for position in (0, 1) for random in draw(everything(), 0, position).values()]
    assert len(set(first)) == 2 * len(NAMES)


def test_certain_defects_take_turns_where_only_one_may_happen() -> None:
    frequency, happened = frequencies(only(**dict.fromkeys(DEFECTS, 1.0), one_defect=True), 1000)
    assert all(len(names & set(DEFECTS)) == 1 for names in happened)
    assert all(abs(frequency[name] - 0.2) < 0.06 for name in DEFECTS)


def test_patches_that_do_not_fit_are_refused_in_one_line() -> None:
    fitting = Augmentation()
    assert list(problems((24, 96, 96), (45.0, 4.6, 4.6), fitting)) == []
    assert list(problems((48, 48, 48), ISOTROPIC, dataclasses.replace(fitting, permute=True))) == []
    assert list(problems((24, 96, 64), (45.0, 4.0, 8.0), only())) == []
    wrong = {
        "augmentation.turn: expected patches as high as wide, got data.patch_size=[24, 96, 64]": (
            (24, 96, 64), THICK, fitting,
        ),
        "augmentation.turn: expected cubic patches": ((24, 96, 96), ISOTROPIC, only(turn=0.5, permute=True)),
        "augmentation.turn: expected voxels as long": ((24, 96, 96), (40.0, 4.0, 6.0), fitting),
        "augmentation.elastic_spacing_nm: expected at least 4 voxels": (
            (24, 96, 96), THICK, only(elastic=0.1, elastic_spacing_nm=10.0, elastic_amplitude_nm=1.0),
        ),
        "augmentation.elastic_amplitude_nm: expected at most a quarter": (
            (24, 96, 96), THICK, only(elastic=0.1, elastic_amplitude_nm=200.0),
        ),
        "augmentation.misalignment_voxels: expected less than": ((24, 8, 8), THICK, only(misaligned=0.1)),
    }  # fmt: skip
    for beginning, arguments in wrong.items():
        (problem,) = problems(*arguments)
        assert problem.startswith(beginning), problem
        assert "\n" not in problem
        assert "give" in problem
