"""What goes wrong with serial sections: lost, shifted, smeared, covered. Volumes are (C, z, y, x).

Only a shift moves labels: where a section is lost or covered, the objects go on, and a network should bridge them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from common.augment import add_noise
from em_segmentation.config import Augmentation
from em_segmentation.regions import Triple

BLANK = (-4.0, -2.0)  # grey of a lost section, standard deviations from the mean: dark, as empty tiles are stored
MAX_SMEARED_SECTIONS = 3  # by one motion
MAX_BOXES = 3
BOX_GREY = (-2.0, 2.0)  # standard deviations from the mean
BOX_NOISE = (1.0, 2.0)  # standard deviation


def draw_shift(random: np.random.Generator, size: Triple, settings: Augmentation) -> tuple[int, int, int]:
    """The first section that is shifted, and how far along y and x in voxels, not 0 both; of two sections or more."""
    most_y, most_x = (min(settings.misalignment_voxels, n - 1) for n in size[1:])
    first = int(random.integers(1, size[0]))
    shift = int(random.integers(1, max(2, (2 * most_y + 1) * (2 * most_x + 1))))
    dy, dx = divmod(shift, 2 * most_x + 1)  # the upper half of either stands for shifts to the other side
    return first, dy - (2 * most_y + 1) * (dy > most_y), dx - (2 * most_x + 1) * (dx > most_x)


def shift_sections(image: Tensor, shift: tuple[int, int, int]) -> Tensor:
    """An image whose sections from a first one on are moved by whole voxels (y, x); its border is repeated."""
    (first, dy, dx), (height, width) = shift, image.shape[2:]
    y = (torch.arange(height, device=image.device) - dy).clamp(0, height - 1)
    x = (torch.arange(width, device=image.device) - dx).clamp(0, width - 1)
    moved = image[:, first:].index_select(2, y).index_select(3, x)
    return torch.cat([image[:, :first], moved], 1)


def shift_label_sections(volume: Tensor, shift: tuple[int, int, int]) -> Tensor:
    """Labels or a mask moved like shift_sections moves the image; what came from outside is 0."""
    first, dy, dx = shift
    moved = shift_sections(volume, shift)
    moved[:, first:, : max(dy, 0)] = 0
    moved[:, first:, volume.shape[2] + min(dy, 0) :] = 0
    moved[:, first:, :, : max(dx, 0)] = 0
    moved[:, first:, :, volume.shape[3] + min(dx, 0) :] = 0
    return moved


def blank_sections(image: Tensor, random: np.random.Generator, settings: Augmentation) -> Tensor:
    """An image with some sections of one dark grey, one section at least being kept."""
    depth = image.shape[1]
    most = min(settings.missing_sections, depth - 1)
    if most == 0:
        return image
    lost = random.choice(depth, int(random.integers(1, most + 1)), replace=False)
    blanked = image.clone()
    blanked[:, torch.from_numpy(lost).to(image.device)] = random.uniform(*BLANK)
    return blanked


def smear_sections(image: Tensor, random: np.random.Generator, settings: Augmentation) -> Tensor:
    """An image of which one to three sections are blurred along a line of one direction and length."""
    depth = image.shape[1]
    smeared = random.choice(depth, int(random.integers(1, min(MAX_SMEARED_SECTIONS, depth) + 1)), replace=False)
    angle, length = random.uniform(0, math.pi), int(random.integers(2, settings.motion_voxels + 1))
    kernel = torch.from_numpy(line_kernel(length, angle)).to(image.device, image.dtype)
    where, margin = torch.from_numpy(smeared).to(image.device), len(kernel) // 2
    sections = image[:, where]  # (C, sections, y, x)
    padded = torch.nn.functional.pad(sections, (margin,) * 4, mode="replicate")
    blurred = torch.nn.functional.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None])
    result = image.clone()
    result[:, where] = blurred.view_as(sections)
    return result


def line_kernel(length: int, angle: float) -> np.ndarray:
    """A centred line of `length` voxels, turned by an angle (radians from x to y), drawn linearly; it sums to 1.

    Its edge is odd and large enough for the line.
    """
    reach = math.ceil((length - 1) / 2)
    along = np.arange(length) - (length - 1) / 2
    offset = np.arange(-reach, reach + 1)
    y, x = (along * side for side in (math.sin(angle), math.cos(angle)))
    near_y = np.clip(1 - np.abs(offset - y[:, None]), 0, None)  # (length, edge)
    near_x = np.clip(1 - np.abs(offset - x[:, None]), 0, None)
    kernel: np.ndarray = np.einsum("ny,nx->yx", near_y, near_x) / length
    return kernel


def draw_boxes(random: np.random.Generator, size: Triple, settings: Augmentation) -> list[tuple[slice, ...]]:
    """One to three boxes within a volume; their edges are a share of its own, uniform from a quarter of cut_share."""
    boxes = []
    for _ in range(int(random.integers(1, MAX_BOXES + 1))):
        box = [slice(None)]
        for n, share in zip(size, random.uniform(settings.cut_share / 4, settings.cut_share, 3), strict=True):
            edge = max(1, round(share * n))
            first = int(random.integers(0, n - edge + 1))
            box.append(slice(first, first + edge))
        boxes.append(tuple(box))
    return boxes


def cut_out_boxes(image: Tensor, random: np.random.Generator, settings: Augmentation) -> Tensor:
    """An image with boxes of constant grey."""
    depth, height, width = image.shape[1:]
    result = image.clone()
    for box in draw_boxes(random, (depth, height, width), settings):
        result[box] = random.uniform(*BOX_GREY)
    return result


def add_noise_boxes(image: Tensor, random: np.random.Generator, settings: Augmentation) -> Tensor:
    """An image with boxes of strong Gaussian noise."""
    depth, height, width = image.shape[1:]
    result = image.clone()
    for box in draw_boxes(random, (depth, height, width), settings):
        result[box] = add_noise(result[box], random.uniform(*BOX_NOISE), int(random.integers(2**63)))
    return result
