"""Changes of an image (C, z, y, x), float32 in standard deviations from the mean, that leave every voxel in its place."""

import math

import numpy as np
import torch
from torch import Tensor

from em_segmentation.config import Augmentation


def change_intensity(image: Tensor, random: np.random.Generator, settings: Augmentation) -> Tensor:
    """Gamma, then contrast and brightness: an increasing map of the grey values."""
    bent = bend(image, math.exp(random.uniform(-settings.gamma, settings.gamma)))
    contrast = random.uniform(1 - settings.contrast, 1 + settings.contrast)
    brightness = random.uniform(-settings.brightness, settings.brightness)
    return bent * contrast + brightness


def bend(image: Tensor, gamma: float) -> Tensor:
    """Raise grey values to a power, where the darkest is 0 and the brightest 1; mean and deviation stay as they were.

    So gamma changes the histogram's shape only, and brightness and contrast are left to their own constants.
    """
    darkest, brightest = torch.aminmax(image)
    span = (brightest - darkest).clamp_min(1e-6)
    bent = torch.pow((image - darkest) / span, gamma)
    mean, bent_mean = image.mean(), bent.mean()
    # vector_norm is ten times faster than torch.std
    deviation, bent_deviation = (torch.linalg.vector_norm(x) for x in (image - mean, bent - bent_mean))
    restored: Tensor = (bent - bent_mean) * (deviation / bent_deviation.clamp_min(1e-6)) + mean
    return restored


def change_section_intensity(image: Tensor, random: np.random.Generator, settings: Augmentation) -> Tensor:
    """Contrast and brightness drawn anew for every section."""
    sections = image.shape[1]
    contrast = random.uniform(1 - settings.contrast, 1 + settings.contrast, sections)
    brightness = random.uniform(-settings.brightness, settings.brightness, sections)
    factor, shift = torch.tensor(np.stack([contrast, brightness]), dtype=image.dtype, device=image.device)
    changed: Tensor = image * factor[:, None, None] + shift[:, None, None]
    return changed


def blur_in_plane(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of every section, sigma in voxels; at the border the weights of what exists sum to 1."""
    over_y, over_x = (gaussian_weights(n, sigma, image) for n in image.shape[2:])
    blurred: Tensor = over_y @ image @ over_x.T
    return blurred


def gaussian_weights(n: int, sigma: float, like: Tensor) -> Tensor:
    """Weights (n, n) by which n voxels become n blurred ones: as one product faster than a convolution with padding."""
    index = torch.arange(n, device=like.device, dtype=like.dtype)
    weights = torch.exp(-0.5 * ((index - index[:, None]) / max(sigma, 1e-3)) ** 2)
    normalised: Tensor = weights / weights.sum(1, keepdim=True)
    return normalised
