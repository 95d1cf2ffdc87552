"""The drawn changes of a training batch: where each patch is placed, its grey values, its blend with a neighbour."""

import numpy as np
import torch
from torch import Tensor

from common.augment import Placement, add_noise, draw_affine, place
from common.streams import random_for
from motor_detection.config import Augment
from motor_detection.dataset import Sample, normalise
from motor_detection.heatmap import render_heatmaps


def augmented_batch(
    batch: Sample, settings: Augment, seed: int, sigma_angstrom: float, stride: int
) -> tuple[Tensor, Tensor]:
    """Images (B, 1, z, y, x) normalised and augmented, heat maps (B, 1, cells...) rendered where the motors went."""
    images = normalise(batch)
    size = (images.shape[2], images.shape[3], images.shape[4])
    moved, motors, sigmas = [], [], []
    for number, position in enumerate(batch.position.tolist()):
        random = random_for("augment", seed, position)
        placement, magnification = draw_placement(random, settings, size)
        image, points = place(images[number], batch.motors[number], placement)
        moved.append(change_intensity(image, random, settings))
        motors.append(points)
        turned = batch.spacing_angstrom[number]
        if placement.quarter_turns % 2:
            turned = turned[[0, 2, 1]]
        sigmas.append(sigma_angstrom / turned * torch.tensor([1.0, magnification, magnification], device=turned.device))
    image, heat = torch.stack(moved), render_heatmaps(torch.stack(motors), torch.stack(sigmas), size, stride)
    return blend_neighbours(image, heat, batch.position.tolist(), settings.mixup, seed)


def plain_batch(batch: Sample, sigma_angstrom: float, stride: int) -> tuple[Tensor, Tensor]:
    """Images and heat maps as they are on disk, for validation."""
    size = (batch.voxels.shape[2], batch.voxels.shape[3], batch.voxels.shape[4])
    return normalise(batch), render_heatmaps(batch.motors, sigma_angstrom / batch.spacing_angstrom, size, stride)


def draw_placement(
    random: np.random.Generator, settings: Augment, size: tuple[int, int, int]
) -> tuple[Placement, float]:
    """A placement and its magnification. All numbers are drawn whether used or not, so that one setting moves one."""
    flips = random.random(3) < settings.flip
    turns = int(random.integers(1, 4)) * int(random.random() < settings.turn)
    matrix, shift = draw_affine(random, settings.rotation_degrees, settings.scale, settings.shift * np.array(size))
    magnification = float(np.sqrt(np.linalg.det(matrix)))  # in the y-x plane
    if random.random() >= settings.affine:
        return Placement((bool(flips[0]), bool(flips[1]), bool(flips[2])), turns, None, np.zeros(3)), 1.0
    return Placement((bool(flips[0]), bool(flips[1]), bool(flips[2])), turns, matrix, shift), magnification


def change_intensity(image: Tensor, random: np.random.Generator, settings: Augment) -> Tensor:
    """Contrast, brightness and noise, in standard deviations of the tomogram."""
    contrast = random.uniform(1 - settings.contrast, 1 + settings.contrast)
    brightness = random.uniform(-settings.brightness, settings.brightness)
    level, seed = random.uniform(0, settings.noise_level), int(random.integers(2**62))
    if random.random() < settings.intensity:
        image = image * contrast + brightness
    if random.random() < settings.noise:
        image = add_noise(image, level, seed)
    return image


def blend_neighbours(
    images: Tensor, heats: Tensor, positions: list[int], probability: float, seed: int
) -> tuple[Tensor, Tensor]:
    """mixup (Zhang et al. 2018): blend a sample and its target with the next of the micro-batch, share ~ U(0.5, 1)."""
    shares = []
    for position in positions:
        random = random_for("mixup", seed, position)
        share = random.uniform(0.5, 1.0)
        shares.append(share if random.random() < probability else 1.0)
    if min(shares) == 1.0 or len(shares) == 1:
        return images, heats
    own = torch.tensor(shares, device=images.device, dtype=images.dtype).view(-1, 1, 1, 1, 1)
    return own * images + (1 - own) * images.roll(-1, 0), own * heats + (1 - own) * heats.roll(-1, 0)
