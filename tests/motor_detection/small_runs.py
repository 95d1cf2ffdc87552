"""Tomograms, patches and runs small enough for tests: everything on disk, a network of a few thousand weights."""

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

from common.blocks import NormName
from common.parallel import process_group
from common.streams import random_for
from common.volumes.slices import write_slice_folder
from data.phantoms.relabelled import relabelled_row
from motor_detection import conversion
from motor_detection.config import KAGGLE, Config
from motor_detection.convert import convert
from motor_detection.dataset import Patches, choose_patches
from motor_detection.labels import LabelledTomogram
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.places import read_tomograms
from motor_detection.trainer import build_model, train
from tests.common_runs import ROOT, script_command

NO_PATCHES = Patches([], [], (32, 32, 32), 1, [], "")  # for checkpoints of no run
SPACING_ANGSTROM = 13.1
SHAPE = (34, 46, 58)  # voxels z, y, x; no two axes alike
FOLDS = (2, 3, 2, 3, 0, 0, 1)  # of tomograms 0, 1 ...: four to train on, two to validate, one to test


def small_config(folder: Path) -> Config:
    """Training on the tomograms of write_tomograms(folder): 60 short steps."""
    convert_settings = dataclasses.replace(
        KAGGLE.convert, patch_size=(32, 32, 32), single=4.0, multi=1.0, hard_negative=0.0, negative=2.0, producers=1
    )
    return dataclasses.replace(
        KAGGLE,
        data=dataclasses.replace(
            KAGGLE.data, root=folder / "tomograms", labels=folder / "labels.csv", patches=folder / "patches"
        ),
        convert=convert_settings,
        model=dataclasses.replace(KAGGLE.model, channels=(4, 4, 8, 8, 8), fusion_channels=8),
        loss=dataclasses.replace(KAGGLE.loss, positive_weight=10.0),
        train=dataclasses.replace(
            KAGGLE.train, steps=60, batch_size=4, micro_batch_size=2, learning_rate_backbone=1e-3,
            learning_rate_head=2e-3, precision="float32", validate_every=20, checkpoint_every=5, workers=0,
        ),
        inference=dataclasses.replace(KAGGLE.inference, precision="float32", tile_size=(32, 32, 32)),
        run=dataclasses.replace(KAGGLE.run, root=folder / "runs", name="run"),
    )  # fmt: skip


def tomogram_label(number: int) -> LabelledTomogram:
    """Tomogram `number` has 0, 1 or 2 motors."""
    motors = random_for("small motors", number).uniform(4, np.array(SHAPE) - 4, (number % 3, 3))
    return LabelledTomogram(f"tomo_{number}", SHAPE, SPACING_ANGSTROM, motors, FOLDS[number])


def tomogram_voxels(label: LabelledTomogram) -> np.ndarray:
    """Noise around 140, dark blobs where the motors are; uint8 [z, y, x]."""
    voxels = random_for(f"voxels of {label.tomo_id}").normal(140, 25, label.shape)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in label.shape], indexing="ij"), -1)
    for motor in label.motors:
        voxels -= 80 * np.exp(-((grid - motor) ** 2).sum(-1) / (2 * 6.0**2))
    return np.clip(np.rint(voxels), 0, 255).astype(np.uint8)


def write_tomograms(folder: Path, numbers: range) -> None:
    """folder/tomograms/tomo_*/slice_*.png and folder/labels.csv."""
    labels = [tomogram_label(number) for number in numbers]
    (folder / "tomograms").mkdir(parents=True)
    for label in labels:
        write_slice_folder(tomogram_voxels(label), folder / "tomograms" / label.tomo_id, ".png", 95)
    write_labels(folder / "labels.csv", labels)


def write_labels(path: Path, labels: list[LabelledTomogram]) -> None:
    """The relabelled layout."""
    rows = [relabelled_row(t.tomo_id, t.shape, t.spacing_angstrom, t.motors, t.fold) for t in labels]
    pd.DataFrame(rows).to_csv(path, index=False)


@contextlib.contextmanager
def producers_forked() -> Iterator[None]:
    """Spawned producers import torch for seconds; forked ones start at once."""
    forked = multiprocessing.get_context("fork")
    with mock.patch.object(conversion.multiprocessing, "get_context", lambda _kind: forked):
        yield


def small_patches(config: Config) -> Patches:
    """Convert the tomograms of a small config and choose the run's patches."""
    with producers_forked():
        summary = convert(config, False, -1)
    assert not summary.failed, summary.failed
    labelled, _ = read_tomograms(config.data, True)
    return choose_patches(config, config.data.patches, labelled)[0]


def train_alone(config: Config, folder: Path, patches: Patches) -> list[dict[str, float]]:
    """Train in this process; the records."""
    with process_group(config.train.deterministic) as device:
        return train(config, folder, patches, device)


def random_network(stride: int, norm: NormName, squeeze_excitation: bool) -> MotorIdentifier:
    """A narrow network, in eval mode, whose every weight, bias and running statistic was drawn at random."""
    torch.manual_seed(7)
    settings = dataclasses.replace(
        KAGGLE.model, channels=(3, 4, 4, 5, 5), fusion_channels=4, stride=stride,
        norm=norm, squeeze_excitation=squeeze_excitation,
    )  # fmt: skip
    model = build_model(settings)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and "conv" not in name and "stem" not in name:
                spread, middle = (3.0 if "logit" in name else 0.3), float("norm" in name and "weight" in name)
                value.copy_(middle + spread * torch.randn_like(value))
    return model.eval()


def script(name: str, config: Config, folder: Path, processes: int, words: list[str]) -> list[str]:
    """The command line of an entry script under a config; 0 processes: without torchrun."""
    return script_command(ROOT / "motor_detection" / name, "kaggle", config, folder, processes, words)
