"""Images as the network sees them: bytes to brightness, and in training a random change of each image.

Draws are named by the composite's position, so a replayed step sees the same pixels; the work is done on the device, all
images of a batch at once.
"""

import math

import numpy as np
import torch
from torch import Tensor

from common.streams import random_for
from histo_mmnet.config import Augment
from histo_mmnet.dataset import Batch
from histo_mmnet.model_defs.slots import into_slots
from histo_mmnet.stain import estimate, random_stain, reference_stain

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which backbones' weights expect
GREY = (0.299, 0.587, 0.114)
BLUR = (0.5, 1.5)  # pixels
BLUR_RADIUS = 4


def standardised(images: Tensor) -> Tensor:
    """Brightness 0..1 (N, 3, y, x) -> with ImageNet's mean and deviation taken out."""
    mean, deviation = images.new_tensor(MEAN)[:, None, None], images.new_tensor(DEVIATION)[:, None, None]
    return (images - mean) / deviation


def prepared(batch: Batch) -> Tensor:
    """The images of a batch to judge, (B, S, 3, y, x) float32; empty slots are 0."""
    return into_slots(standardised(batch.images[batch.present].float() / 255), batch.present)


@torch.no_grad()
def augmented(batch: Batch, settings: Augment, normalisation: str, seed: int) -> Tensor:
    """The images of a batch to train on, each changed at random, (B, S, 3, y, x) float32; empty slots are 0.

    normalisation: by macenko, images have its reference stain; else each image's own is estimated before it is changed.
    """
    draws = torch.tensor(np.array([draw(seed, int(p), batch.images.shape[1], settings) for p in batch.index.tolist()]))
    draws = draws.to(batch.images.device, torch.float32)[batch.present]  # (N, DRAWN)
    images = turned(batch.images[batch.present].float() / 255, draws)
    if settings.stain or settings.stain_shift:
        stain = reference_stain(images) if normalisation == "macenko" else estimate(images)
        images = random_stain(images, stain, 1 + draws[:, 3:5], draws[:, 5:7])
    images = coloured(images, draws)
    if settings.blur:
        images = blurred(images, draws[:, 10])
    return into_slots(standardised(images), batch.present)


def draw(seed: int, position: int, slots: int, settings: Augment) -> np.ndarray:
    """(slots, 11): flips along y, x; radians; two stains' factors, their shifts; brightness, contrast, saturation; blur."""
    random = random_for("augment", seed, position)
    flips = random.random((slots, 2)) < settings.flips
    radians = random.uniform(-1, 1, (slots, 1)) * math.radians(settings.rotation_degrees)
    limits = (settings.stain, settings.stain, settings.stain_shift, settings.stain_shift,
              settings.brightness, settings.contrast, settings.saturation)  # fmt: skip
    shares = random.uniform(-1, 1, (slots, len(limits))) * np.array(limits)
    sigma = np.where(random.random((slots, 1)) < settings.blur, random.uniform(*BLUR, (slots, 1)), 0)
    return np.concatenate([flips, radians, shares, sigma], 1)


def turned(images: Tensor, draws: Tensor) -> Tensor:
    """Flipped and rotated about the middle, mirrored at the border; (N, 3, y, x)."""
    if not draws[:, 2].any():
        for axis in (2, 3):
            flips = draws[:, axis - 2] > 0
            images = torch.where(flips[:, None, None, None], images.flip(axis), images)
        return images
    height, width = images.shape[2:]
    sign_y, sign_x = 1 - 2 * draws[:, 0], 1 - 2 * draws[:, 1]
    cos, sin = draws[:, 2].cos(), draws[:, 2].sin()
    zero = torch.zeros_like(cos)
    rows = [torch.stack([cos * sign_x, -sin * sign_x * height / width, zero], 1),
            torch.stack([sin * sign_y * width / height, cos * sign_y, zero], 1)]  # fmt: skip
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def coloured(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast about the image's mean, saturation about its grey; within 0..1."""
    bright, contrast, saturation = (1 + draws[:, number, None, None, None] for number in (7, 8, 9))
    images = images * bright
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + contrast * (images - mean)
    grey = (images * images.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    return (grey + saturation * (images - grey)).clamp(0, 1)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image under a Gaussian of its own deviation in pixels (N,), 0 for none."""
    chosen = (sigma > 0).nonzero()[:, 0]
    if len(chosen) == 0:
        return images
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    weight = torch.exp(-0.5 * (offset / sigma[chosen][:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)  # (n, taps)
    own = images[chosen].transpose(0, 1)  # (3, n, y, x): one group per image
    for axis in (2, 3):
        padding = [0, 0, 0, 0]
        padding[2 * (3 - axis) : 2 * (3 - axis) + 2] = [BLUR_RADIUS, BLUR_RADIUS]
        shape = (len(chosen), 1, -1, 1) if axis == 2 else (len(chosen), 1, 1, -1)
        padded = torch.nn.functional.pad(own, padding, "replicate")
        own = torch.nn.functional.conv2d(padded, weight.reshape(shape), groups=len(chosen))
    return images.index_put((chosen,), own.transpose(0, 1))
