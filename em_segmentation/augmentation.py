"""The drawn changes of a training batch: where voxels move, how grey values change, what goes wrong with sections.

What happens to a sample follows from (seed, position) alone, not from its batch. Ids are moved, never mixed.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common.augment import add_noise
from common.streams import random_for
from em_segmentation.config import Augmentation
from em_segmentation.grey_values import blur_in_plane, change_intensity, change_section_intensity
from em_segmentation.regions import Triple, VoxelSize
from em_segmentation.section_defects import (
    add_noise_boxes,
    blank_sections,
    cut_out_boxes,
    draw_shift,
    shift_label_sections,
    shift_sections,
    smear_sections,
)
from em_segmentation.warping import draw_orientation, draw_warp, nearest_voxels, orient, take_nearest, warp_image

CHANGES = ("turn", "affine", "elastic", "intensity", "section_intensity", "noise", "blur")
DEFECTS = ("misaligned", "motion_blur", "cut_out", "cut_noise", "missing_section")
SAME_EDGE = 1.1  # voxel edges whose ratio is below may be turned into each other
MIN_SPACING_VOXELS = 4  # between the knots of a warp; finer ones are noise, and many


@dataclasses.dataclass(frozen=True)
class Patch:
    """A batch of patches of one size."""

    image: Tensor  # (B, C, z, y, x) float32, standard deviations from the mean
    labels: Tensor  # (B, L, z, y, x) int64 ids, L kinds of labels
    annotated: Tensor  # (B, 1, z, y, x) bool
    position: Tensor  # (B,) int64, the sample's number in the run

    def pin_memory(self) -> "Patch":
        """The batch in memory that a GPU copies from while the host goes on; the loader asks for it."""
        return Patch(*(getattr(self, field.name).pin_memory() for field in dataclasses.fields(self)))


@torch.no_grad()
def augmented(batch: Patch, settings: Augmentation, voxel_size_nm: VoxelSize, seed: int) -> Patch:
    """A batch of the same shapes, every sample changed by the draws of its own (seed, position)."""
    assert batch.image.dtype == torch.float32, f"Expected float32 images, got {batch.image.dtype}"
    image, labels, annotated = (torch.empty_like(part) for part in (batch.image, batch.labels, batch.annotated))
    for number, position in enumerate(batch.position.tolist()):
        drawn = draw(settings, seed, position)
        volumes = (batch.image[number], batch.labels[number], batch.annotated[number])
        moved, labels[number], annotated[number] = move(volumes, drawn, settings, voxel_size_nm)
        image[number] = change_grey_values(moved, drawn, settings)
    return Patch(image, labels, annotated, batch.position)


def draw(settings: Augmentation, seed: int, position: int) -> dict[str, np.random.Generator]:
    """What happens to one sample: the names of its changes, each with a generator of its own numbers.

    Every change has its place in the stream whether it happens or not, so that one setting moves one change.
    With one_defect a single number decides among the defects, so that each keeps its probability; probabilities
    that sum to more than 1 are scaled down to that.
    """
    random = random_for("augmentation", seed, position)
    names = ("flip", *CHANGES, *DEFECTS)
    seeds = dict(zip(names, random.integers(2**63, size=len(names)).tolist(), strict=True))
    chances = np.array([getattr(settings, name) for name in (*CHANGES, *DEFECTS)])
    happens = random.random(len(chances)) < chances
    if settings.one_defect:
        upper = np.cumsum(chances[len(CHANGES) :] / max(1.0, chances[len(CHANGES) :].sum()))
        chosen = np.searchsorted(upper, random.random(), side="right")
        happens[len(CHANGES) :] = np.arange(len(DEFECTS)) == chosen
    happening = ["flip", *itertools.compress((*CHANGES, *DEFECTS), happens)]
    return {name: np.random.default_rng(seeds[name]) for name in happening}


def move(
    volumes: tuple[Tensor, Tensor, Tensor],
    drawn: dict[str, np.random.Generator],
    settings: Augmentation,
    voxel_size_nm: VoxelSize,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, labels and annotated (each C, z, y, x) of one sample, moved alike."""
    turn, affine, elastic = (drawn[name] if name in drawn else None for name in ("turn", "affine", "elastic"))
    orientation = draw_orientation(drawn["flip"], settings.flip, turn, settings.permute)
    image, labels, annotated = (orient(volume, orientation) for volume in volumes)
    depth, height, width = image.shape[1:]
    size = (depth, height, width)
    if affine is not None or elastic is not None:
        warp = draw_warp(affine, elastic, size, voxel_size_nm, settings, image.device)
        index, inside = nearest_voxels(warp, size)
        image = warp_image(image, warp)
        labels, annotated = (take_nearest(volume, index, inside) for volume in (labels, annotated))
    if "misaligned" in drawn and depth > 1:
        shift = draw_shift(drawn["misaligned"], size, settings)
        image = shift_sections(image, shift)
        labels, annotated = (shift_label_sections(volume, shift) for volume in (labels, annotated))
    return image, labels, annotated


def change_grey_values(image: Tensor, drawn: dict[str, np.random.Generator], settings: Augmentation) -> Tensor:
    """One image (C, z, y, x) with the drawn changes, in the order in which specimen, microscope and archive make them."""
    if "blur" in drawn:
        image = blur_in_plane(image, drawn["blur"].uniform(0, settings.blur_voxels))
    if "motion_blur" in drawn:
        image = smear_sections(image, drawn["motion_blur"], settings)
    if "intensity" in drawn:
        image = change_intensity(image, drawn["intensity"], settings)
    if "section_intensity" in drawn:
        image = change_section_intensity(image, drawn["section_intensity"], settings)
    if "noise" in drawn:
        level, seed = drawn["noise"].uniform(0, settings.noise_level), int(drawn["noise"].integers(2**63))
        image = add_noise(image, level, seed)
    if "cut_out" in drawn:
        image = cut_out_boxes(image, drawn["cut_out"], settings)
    if "cut_noise" in drawn:
        image = add_noise_boxes(image, drawn["cut_noise"], settings)
    if "missing_section" in drawn:
        image = blank_sections(image, drawn["missing_section"], settings)
    return image


def problems(patch_size: Triple, voxel_size_nm: VoxelSize, settings: Augmentation) -> Iterator[str]:
    """One line per constant that does not fit the patches or their voxels, which are known when the volumes are open."""
    patch, voxel = list(patch_size), list(voxel_size_nm)
    turned = range(0 if settings.permute else 1, 3)
    edges, sizes = [patch_size[axis] for axis in turned], [voxel_size_nm[axis] for axis in turned]
    kind = "cubic patches (augmentation.permute)" if settings.permute else "patches as high as wide"
    if settings.turn > 0 and len(set(edges)) > 1:
        yield f"augmentation.turn: expected {kind}, got data.patch_size={patch}; give augmentation.turn=0 or another patch"
    if settings.turn > 0 and max(sizes) > SAME_EDGE * min(sizes):
        yield f"augmentation.turn: expected voxels as long along each axis that is turned, got {voxel} nm (z, y, x); give 0"
    if settings.elastic > 0 and settings.elastic_spacing_nm < MIN_SPACING_VOXELS * max(voxel_size_nm[1:]):
        yield (
            f"augmentation.elastic_spacing_nm: expected at least {MIN_SPACING_VOXELS} voxels, "
            f"got {settings.elastic_spacing_nm:g} at {voxel} nm (z, y, x); give more"
        )
    if settings.elastic > 0 and settings.elastic_amplitude_nm > settings.elastic_spacing_nm / 4:
        yield (
            "augmentation.elastic_amplitude_nm: expected at most a quarter of elastic_spacing_nm (a warp beyond that folds "
            f"objects), got {settings.elastic_amplitude_nm:g} at {settings.elastic_spacing_nm:g}; give less"
        )
    if settings.misaligned > 0 and settings.misalignment_voxels >= min(patch_size[1:]):
        yield (
            f"augmentation.misalignment_voxels: expected less than the patch's edges, got {settings.misalignment_voxels} "
            f"at data.patch_size={patch}; give less"
        )
