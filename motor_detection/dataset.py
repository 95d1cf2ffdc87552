"""Patch files as samples of an endless, addressed stream."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.config import as_yaml
from common.errors import config_error, data_error
from common.streams import epoch_and_index
from motor_detection.conversion import patches_of
from motor_detection.labels import LabelledTomogram
from motor_detection.patches import read_patch
from motor_detection.places import ConvertSettings


@dataclasses.dataclass(frozen=True)
class Sample:
    """One patch, or a batch of them stacked: B = 1 for a single sample."""

    voxels: Tensor  # (B, 1, z, y, x) uint8
    intensity: Tensor  # (B, 2) mean and standard deviation of the tomogram
    motors: Tensor  # (B, N, 3) voxel index, NaN where there are fewer than N
    spacing_angstrom: Tensor  # (B, 3)
    position: Tensor  # (B,) of the run's stream, or the patch's number in validation
    index: Tensor  # (B,) number of the patch file


def list_patches(folder: Path, settings: ConvertSettings, tomograms: list[LabelledTomogram]) -> list[Path]:
    """The patch files of some tomograms, in order; unconverted tomograms are named and left out."""
    recorded = folder / "settings.yaml"
    if not recorded.exists():
        raise data_error(
            f"data.patches: no patches in {folder}; run motor_detection/convert.py with the same words first"
        )
    if recorded.read_text() != as_yaml(settings):
        raise config_error(f"data.patches: {folder} was converted with other constants than these; see {recorded}")
    patches: list[Path] = []
    missing = []
    for tomogram in tomograms:
        found = patches_of(folder, tomogram)
        if found is None:
            missing.append(tomogram.tomo_id)
        else:
            patches += found
    if missing:
        print(
            f"warning: {len(missing)} tomograms have no patches of these labels and are left out: {', '.join(missing[:5])}"
        )
    if not patches:
        raise data_error(f"data.patches: no patch of the chosen folds in {folder}; run motor_detection/convert.py")
    return patches


def load_sample(path: Path, max_motors: int, position: int, index: int) -> Sample:
    arrays = read_patch(path)
    motors = np.full((max_motors, 3), np.nan, np.float32)
    motors[: len(arrays["motors"])] = arrays["motors"][:max_motors]
    return Sample(
        torch.from_numpy(arrays["patch"])[None, None],
        torch.from_numpy(arrays["intensity"])[None],
        torch.from_numpy(motors)[None],
        torch.from_numpy(arrays["spacing_angstrom"])[None],
        torch.tensor([position]),
        torch.tensor([index]),
    )


def stack(samples: list[Sample]) -> Sample:
    """One batch of several samples."""
    return Sample(*(torch.cat([getattr(s, field.name) for s in samples]) for field in dataclasses.fields(Sample)))


def to_device(batch: Sample, device: torch.device) -> Sample:
    moved = {f.name: getattr(batch, f.name).to(device, non_blocking=True) for f in dataclasses.fields(Sample)}
    return Sample(**moved)


def normalise(batch: Sample) -> Tensor:
    """(B, 1, z, y, x) float32: grey values in standard deviations from their tomogram's mean."""
    mean, deviation = batch.intensity.view(-1, 2, 1, 1, 1, 1).unbind(1)
    return (batch.voxels.float() - mean) / deviation


@dataclasses.dataclass(frozen=True)
class PatchStream(Dataset[Sample]):
    """Item p is the p-th patch the run ever sees: all patches in a fresh order every epoch, endless."""

    patches: list[Path]
    max_motors: int
    seed: int

    def __getitem__(self, position: int) -> Sample:
        _, index = epoch_and_index(position, len(self.patches), self.seed)
        return load_sample(self.patches[index], self.max_motors, position, index)


@dataclasses.dataclass(frozen=True)
class PatchList(Dataset[Sample]):
    """Item i is the i-th patch file."""

    patches: list[Path]
    max_motors: int

    def __getitem__(self, index: int) -> Sample:
        return load_sample(self.patches[index], self.max_motors, index, index)
