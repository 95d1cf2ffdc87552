"""Patch files as samples of an endless, addressed stream."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.config import as_yaml
from common.errors import UserError, config_error, data_error
from common.files import read_text
from common.streams import epoch_and_index
from motor_detection.config import Config
from motor_detection.conversion import label_digest, patches_of
from motor_detection.labels import LabelledTomogram
from motor_detection.patches import read_patch
from motor_detection.places import ConvertSettings, check_has_motors, convert_settings, same_cut, tomograms_of_fold


@dataclasses.dataclass(frozen=True)
class Sample:
    """One patch, or a batch of them stacked: B = 1 for a single sample."""

    voxels: Tensor  # (B, 1, z, y, x) uint8
    intensity: Tensor  # (B, 2) mean and standard deviation of the tomogram
    motors: Tensor  # (B, N, 3) voxel index, NaN where there are fewer than N
    spacing_angstrom: Tensor  # (B, 3)
    position: Tensor  # (B,) of the run's stream, or the patch's number in validation
    index: Tensor  # (B,) number of the patch file

    def pin_memory(self) -> "Sample":
        """The batch in memory that a GPU copies from while the host goes on; the loader asks for it."""
        return Sample(*(getattr(self, field.name).pin_memory() for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patch files of one run, and what a checkpoint must remember of them."""

    train: list[Path]
    validation: list[Path]
    patch_size: tuple[int, int, int]
    max_motors: int  # the most that any of them can hold
    tomograms: list[str]  # "train TOMO_ID" and "validation TOMO_ID"
    digest: str  # of roles, labels and files: changes with whatever training reads


def choose_patches(config: Config, folder: Path, tomograms: list[LabelledTomogram]) -> tuple[Patches, list[str]]:
    """Training patches of all folds but the validation and the test fold; and what was left out, in words."""
    data, settings = config.data, convert_settings(config)
    train = [tomogram for tomogram in tomograms if tomogram.fold not in (data.validation_fold, data.test_fold)]
    if not train:
        raise config_error("data.validation_fold: with the test fold it takes all tomograms; none is left to train on")
    validation = tomograms_of_fold(tomograms, data.validation_fold, "data.validation_fold")
    check_has_motors(validation, data.validation_fold, "data.validation_fold")
    check_settings(folder, settings)
    chosen, warnings = [], []
    for group in (train, validation):
        files, missing = list_patches(folder, group)
        chosen.append(files)
        if missing:
            found = (
                f"{len(missing)} tomograms have no patches of these labels and are left out: {', '.join(missing[:5])}"
            )
            warnings.append(f"{folder}: {found}")
    if not any(path.stem.endswith(("_single", "_multi")) for path in chosen[1]):
        raise data_error(
            f"data.patches: no validation patch in {folder} holds a motor; convert with convert.single above 0"
        )
    roles = {"train": (train, chosen[0]), "validation": (validation, chosen[1])}
    names = [f"{role} {tomogram.tomo_id}" for role, (members, _) in roles.items() for tomogram in members]
    content = [
        [role, [(t.tomo_id, label_digest(t)) for t in members], [f"{path.parent.name}/{path.name}" for path in files]]
        for role, (members, files) in roles.items()
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    most = max(1, max(len(tomogram.motors) for tomogram in tomograms))
    return Patches(chosen[0], chosen[1], config.convert.patch_size, most, names, digest), warnings


def check_settings(folder: Path, settings: ConvertSettings) -> None:
    """The patches must have been cut as the config says; heat maps are rendered anew in training, so theirs may differ."""
    recorded = folder / "settings.yaml"
    if not recorded.exists():
        raise data_error(
            f"data.patches: no patches in {folder}; run motor_detection/convert.py with the same words first"
        )
    if not same_cut(read_text(recorded), as_yaml(settings)):
        raise config_error(f"data.patches: {folder} was converted with other constants than these; see {recorded}")


def list_patches(folder: Path, tomograms: list[LabelledTomogram]) -> tuple[list[Path], list[str]]:
    """The patch files of some tomograms, in order; and the names of those that are not converted."""
    patches: list[Path] = []
    missing = []
    for tomogram in tomograms:
        found = patches_of(folder, tomogram)
        if found is None:
            missing.append(tomogram.tomo_id)
        else:
            patches += found
    if not patches:
        raise data_error(f"data.patches: no patch of the chosen folds in {folder}; run motor_detection/convert.py")
    return patches, missing


def load_sample(
    path: Path, patch_size: tuple[int, int, int], max_motors: int, position: int, index: int
) -> Sample | UserError:
    """One patch file as a batch of one; an unreadable one is returned as its error."""
    try:
        arrays = read_patch(path, ("patch", "motors", "spacing_angstrom", "intensity"))
    except UserError as error:
        return error
    found = {name: array.shape for name, array in arrays.items()}
    rows = len(arrays["motors"])
    if found != {"patch": patch_size, "motors": (rows, 3), "spacing_angstrom": (3,), "intensity": (2,)}:
        return data_error(f"{path}: holds arrays of the shapes {found}; delete it and run convert.py again")
    if rows > max_motors or not np.isfinite(arrays["motors"]).all() or not (arrays["spacing_angstrom"] > 0).all():
        return data_error(
            f"{path}: its motors or spacing contradict the label table; delete it and run convert.py again"
        )
    motors = np.full((max_motors, 3), np.nan, np.float32)
    motors[:rows] = arrays["motors"]
    return Sample(
        torch.from_numpy(arrays["patch"])[None, None],
        torch.from_numpy(arrays["intensity"])[None],
        torch.from_numpy(motors)[None],
        torch.from_numpy(arrays["spacing_angstrom"])[None],
        torch.tensor([position]),
        torch.tensor([index]),
    )


def stack(samples: list[Sample | UserError]) -> Sample | UserError:
    """One batch of several samples, or the first error among them."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return Sample(*(torch.cat([getattr(s, field.name) for s in samples]) for field in dataclasses.fields(Sample)))


def to_device(batch: Sample, device: torch.device) -> Sample:
    moved = {f.name: getattr(batch, f.name).to(device, non_blocking=True) for f in dataclasses.fields(Sample)}
    return Sample(**moved)


def normalise(batch: Sample) -> Tensor:
    """(B, 1, z, y, x) float32: grey values in standard deviations from their tomogram's mean."""
    mean, deviation = batch.intensity.view(-1, 2, 1, 1, 1, 1).unbind(1)
    return (batch.voxels.float() - mean) / deviation


@dataclasses.dataclass(frozen=True)
class PatchStream(Dataset[Sample | UserError]):
    """Item p is the p-th patch the run ever sees: all patches in a fresh order every epoch, endless."""

    patches: list[Path]
    patch_size: tuple[int, int, int]
    max_motors: int
    seed: int

    def __getitem__(self, position: int) -> Sample | UserError:
        _, index = epoch_and_index(position, len(self.patches), self.seed)
        return load_sample(self.patches[index], self.patch_size, self.max_motors, position, index)


@dataclasses.dataclass(frozen=True)
class PatchList(Dataset[Sample | UserError]):
    """Item i is the i-th patch file."""

    patches: list[Path]
    patch_size: tuple[int, int, int]
    max_motors: int

    def __getitem__(self, index: int) -> Sample | UserError:
        return load_sample(self.patches[index], self.patch_size, self.max_motors, index, index)
