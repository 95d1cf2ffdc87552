"""Augmentation: image, motors and blob width move together, and a patch's draw depends on its position alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from common.augment import Placement, place
from common.streams import random_for
from motor_detection.augmentation import augmented_batch, draw_placement, plain_batch
from motor_detection.config import KAGGLE, PRESETS, Augment
from motor_detection.dataset import Sample, stack

SIZE = (40, 48, 48)
MEAN, DEVIATION = 40.0, 200.0  # of grey values: a normalised blob is 1 high, its surroundings 0
SIGMA_ANGSTROM = 60.0
SEED = 3
NOTHING = Augment(flip=0.0, turn=0.0, affine=0.0, intensity=0.0, noise=0.0, mixup=0.0)


def blob_sample(position: int, spacing: tuple[float, float, float]) -> Sample:
    """A patch whose grey values are the heat map of its one motor, a Gaussian of SIGMA_ANGSTROM on every axis."""
    motor = random_for("blob", position).uniform(0.4, 0.6, 3) * np.array(SIZE)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"), -1)
    squared = (((grid - motor) * np.array(spacing) / SIGMA_ANGSTROM) ** 2).sum(-1)
    grey = np.rint(MEAN + DEVIATION * np.exp(-squared / 2)).astype(np.uint8)
    motors = torch.tensor(np.stack([motor, [np.nan] * 3]), dtype=torch.float32)
    return Sample(
        torch.from_numpy(grey)[None, None],
        torch.tensor([[MEAN, DEVIATION]]),
        motors[None],
        torch.tensor([spacing]),
        torch.tensor([position]),
        torch.tensor([0]),
    )


def changed(sample: Sample, settings: Augment) -> tuple[Tensor, Tensor]:
    """Augmented image and heat map at one cell per voxel, so that they can be laid over each other."""
    return augmented_batch(sample, settings, SEED, SIGMA_ANGSTROM, 1)


def with_settings(**chosen: float) -> Augment:
    return dataclasses.replace(NOTHING, **chosen)


def test_without_augmentation_a_batch_is_the_plain_one() -> None:
    batch = stack([blob_sample(position, (12.0, 12.0, 12.0)) for position in range(3)])
    for ours, plain in zip(changed(batch, NOTHING), plain_batch(batch, SIGMA_ANGSTROM, 1), strict=True):
        assert torch.equal(ours, plain)
    image, heat = changed(batch, NOTHING)
    torch.testing.assert_close(image, heat, atol=0.5 / DEVIATION + 1e-6, rtol=0)


@pytest.mark.parametrize("spacing", [(12.0, 12.0, 12.0), (8.0, 12.0, 20.0)])
def test_flips_and_turns_move_image_and_target_alike(spacing: tuple[float, float, float]) -> None:
    """Also where voxels are no cubes: after a quarter turn the blob is wide on the other axis."""
    seen = set()
    for position in range(40):
        sample = blob_sample(position, spacing)
        image, heat = changed(sample, with_settings(flip=0.5, turn=0.7))
        torch.testing.assert_close(image, heat, atol=0.5 / DEVIATION + 1e-6, rtol=0)
        placement, magnification = draw_placement(
            random_for("augment", SEED, position), with_settings(flip=0.5, turn=0.7), SIZE
        )
        assert magnification == 1.0
        seen.add((*placement.flips, placement.quarter_turns))
    assert len(seen) > 15, "of 32 orientations"


def test_rotation_scale_and_shift_move_image_and_target_alike() -> None:
    """To trilinear interpolation; the blob grows with the image."""
    strong = with_settings(flip=0.5, turn=0.5, affine=1.0, rotation_degrees=40.0, scale=0.3, shift=0.1)
    widths = []
    for position in range(40):
        image, heat = changed(blob_sample(position, (12.0, 12.0, 12.0)), strong)
        assert (image - heat).abs().max() < 0.03
        widths.append(float(heat.sum()))
    assert max(widths) > 2 * min(widths), "volumes of blobs follow the drawn scale"


def test_the_brightest_voxel_follows_its_point() -> None:
    """The same for a placement chosen by hand, on a single voxel."""
    image = torch.zeros(1, *SIZE)
    image[0, 5, 9, 30] = 1.0
    point = torch.tensor([[5.0, 9.0, 30.0], [np.nan] * 3])
    turned, moved = place(image, point, Placement((True, False, False), 1, None, np.zeros(3)))
    assert tuple(np.unravel_index(int(turned[0].argmax()), SIZE)) == tuple(moved[0].int().tolist())
    assert moved[1].isnan().all()
    unmoved, same = place(image, point, Placement((False, False, False), 0, np.eye(3), np.zeros(3)))
    torch.testing.assert_close(unmoved, image, atol=1e-4, rtol=0)
    torch.testing.assert_close(same[0], point[0])


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """Not on the batch, on neighbours or on what was drawn before."""
    everything = dataclasses.replace(KAGGLE.augment, flip=0.5, turn=0.5, affine=0.7, intensity=0.7, noise=0.7)
    samples = [blob_sample(position, (12.0, 12.0, 12.0)) for position in (4, 17, 1000, 4)]
    images, heats = changed(stack(samples), everything)
    for number, sample in enumerate(samples):
        image, heat = changed(sample, everything)
        assert torch.equal(images[number], image[0]) and torch.equal(heats[number], heat[0])
    assert torch.equal(images[0], images[3])
    other_seed, _ = augmented_batch(samples[0], everything, SEED + 1, SIGMA_ANGSTROM, 1)
    assert not torch.equal(images[:1], other_seed)
    later = dataclasses.replace(samples[0], position=torch.tensor([5]))
    assert not torch.equal(images[:1], changed(later, everything)[0]), "the next epoch draws anew"


@pytest.mark.parametrize("name", ["flip", "turn", "affine", "intensity", "noise"])
def test_one_setting_does_not_shift_the_draws_of_the_others(name: str) -> None:
    """So that two runs which differ in one augmentation differ in nothing else."""
    for position in range(20):
        draws = []
        for probability in (0.3, 0.6):
            settings = dataclasses.replace(dataclasses.replace(KAGGLE.augment, affine=1.0), **{name: probability})
            random = random_for("augment", SEED, position)
            placement, _ = draw_placement(random, settings, SIZE)
            draws.append((placement, random.random()))
        first, second = (placement for placement, _ in draws)
        assert draws[0][1] == draws[1][1]
        if name != "affine":
            assert first.matrix is not None and second.matrix is not None
            np.testing.assert_array_equal(first.matrix, second.matrix)
        if name != "flip":
            assert first.flips == second.flips
        if name != "turn":
            assert first.quarter_turns == second.quarter_turns


def test_contrast_brightness_and_noise_leave_the_target_alone() -> None:
    batch = stack([blob_sample(position, (12.0, 12.0, 12.0)) for position in range(30)])
    plain, heat = changed(batch, NOTHING)
    brighter, same = changed(batch, with_settings(intensity=1.0, contrast=0.2, brightness=0.3))
    assert torch.equal(heat, same)
    for before, after in zip(plain, brighter, strict=True):
        slope, offset = np.polyfit(before.flatten().numpy(), after.flatten().numpy(), 1)
        assert 0.8 <= slope <= 1.2 and -0.3 <= offset <= 0.3
        torch.testing.assert_close(after, before * slope + offset, atol=1e-4, rtol=0)
    noisy, same = changed(batch, with_settings(noise=1.0, noise_level=0.5))
    assert torch.equal(heat, same)
    levels = (noisy - plain).std((1, 2, 3, 4))
    assert (levels <= 0.51).all() and levels.max() > 0.4 and levels.min() < 0.1
    assert len({round(float(level), 6) for level in levels}) == 30


def test_probabilities_are_met() -> None:
    """Half of the axes flipped, half of the patches turned, a third warped."""
    draws = [draw_placement(random_for("augment", SEED, p), KAGGLE.augment, SIZE)[0] for p in range(2000)]
    flips = np.mean([placement.flips for placement in draws], axis=0)
    np.testing.assert_allclose(flips, KAGGLE.augment.flip, atol=0.05)
    assert np.mean([p.quarter_turns > 0 for p in draws]) == pytest.approx(KAGGLE.augment.turn, abs=0.05)
    assert np.mean([p.matrix is not None for p in draws]) == pytest.approx(KAGGLE.augment.affine, abs=0.05)
    assert {p.quarter_turns for p in draws} == {0, 1, 2, 3}


def test_mixup_blends_images_and_targets_by_the_same_share() -> None:
    batch = stack([blob_sample(position, (12.0, 12.0, 12.0)) for position in range(6)])
    images, heats = changed(batch, with_settings(flip=0.5))
    mixed, targets = changed(batch, with_settings(flip=0.5, mixup=1.0))
    for number in range(6):
        own, other = images[number], images[(number + 1) % 6]
        share = float(((mixed[number] - other) * (own - other)).sum() / (own - other).square().sum())
        assert 0.5 <= share <= 1.0
        torch.testing.assert_close(mixed[number], share * own + (1 - share) * other, atol=1e-5, rtol=0)
        expected = share * heats[number] + (1 - share) * heats[(number + 1) % 6]
        torch.testing.assert_close(targets[number], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_known_defect_11_every_preset_augments(preset: str) -> None:
    """The original's presets all returned nothing: its last version trained on the plain patches."""
    batch = stack([blob_sample(position, (12.0, 12.0, 12.0)) for position in range(16)])
    image, heat = changed(batch, PRESETS[preset].augment)
    plain, plain_heat = plain_batch(batch, SIGMA_ANGSTROM, 1)
    moved = [not torch.equal(a, b) for a, b in zip(image, plain, strict=True)]
    targets = [not torch.equal(a, b) for a, b in zip(heat, plain_heat, strict=True)]
    assert sum(moved) >= 10 and sum(targets) >= 10, f"{sum(moved)} images and {sum(targets)} targets of 16 changed"
