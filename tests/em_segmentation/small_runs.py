"""Volumes and runs small enough for tests: everything on disk, a network of a few thousand weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import load_checkpoint
from common.config import configure
from common.parallel import process_group
from common.streams import random_for
from em_segmentation.config import BASE, Config
from em_segmentation.dataset import Volumes, open_volumes
from em_segmentation.model_defs.registry import KIND
from em_segmentation.state import begin
from em_segmentation.trainer import train
from tests.common_runs import ROOT, script_command

SHAPES = {"train_0": (14, 26, 38), "train_1": (12, 30, 24), "val_0": (13, 22, 34)}  # voxels z, y, x; no two axes alike
VOXEL_SIZE_NM = (20.0, 10.0, 10.0)
SETTINGS = [
    "data.patch_size=[8,16,16]", "data.batch_size=2", "data.num_workers=0", "data.val_patches=5",
    f"data.voxel_size_nm={list(VOXEL_SIZE_NM)}", "model.architecture=rsunet", "model.filters=[4,6]",
    "model.kernel_z=[3,3]", "targets.names=[semantic, affinity]", "targets.weights=[1,1]", "targets.label_channels=[0,0]",
    "augmentation.misalignment_voxels=3", "optimizer.lr=0.01", "training.max_epochs=3", "training.steps_per_epoch=4",
    "training.ema_decay=0.8", "checkpoint.every_n_steps=3", "logging.log_every_n_steps=3", "logging.pictures=false",
]  # fmt: skip


def labels_of(name: str) -> np.ndarray:
    """Touching objects 1, 2 ... [z, y, x] uint16, parted by voxels of background."""
    random, shape = random_for(f"labels of {name}"), SHAPES[name]
    seeds = random.uniform(0, 1, (7, 3)) * shape
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    distance = np.linalg.norm((grid[..., None, :] - seeds) * VOXEL_SIZE_NM, axis=-1)  # (z, y, x, seeds)
    nearest = np.sort(distance, -1)
    inside = nearest[..., 1] - nearest[..., 0] > 25
    return np.where(inside, 1 + distance.argmin(-1), 0).astype(np.uint16)


def image_of(name: str, labels: np.ndarray) -> np.ndarray:
    """Bright objects, dark background, noise; [z, y, x] uint8."""
    noise = random_for(f"image of {name}").normal(0, 15, labels.shape)
    return np.clip(np.where(labels > 0, 160, 90) + noise, 0, 255).astype(np.uint8)


def write_volumes(folder: Path) -> None:
    """folder/train_0_image.npy, folder/train_0_labels.npy and so on."""
    for name in SHAPES:
        labels = labels_of(name)
        np.save(folder / f"{name}_image.npy", image_of(name, labels))
        np.save(folder / f"{name}_labels.npy", labels)


def small_config(folder: Path) -> Config:
    """Training on the volumes of write_volumes(folder): 3 epochs of 4 short steps."""
    names = {"train": ("train_0", "train_1"), "val": ("val_0",)}
    paths = {
        f"{role}_{kind}": tuple(str(folder / f"{name}_{file}.npy") for name in names[role])
        for role in names
        for kind, file in (("image", "image"), ("label", "labels"))
    }
    config = dataclasses.replace(
        BASE,
        data=dataclasses.replace(BASE.data, **paths),  # type: ignore[arg-type]
        run=dataclasses.replace(BASE.run, root=folder / "runs", name="run"),
    )
    return configure(config, [], SETTINGS)


def changed(config: Config, *changes: str) -> Config:
    return configure(config, [], list(changes))


def in_folder(config: Config, folder: Path, name: str) -> Config:
    """The same run in another folder: its volumes stay where they are."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, root=folder, name=name))


def train_alone(config: Config, folder: Path) -> list[dict[str, float]]:
    """Train in this process; the records."""
    return train_on(open_volumes(config), config, folder)


def train_on(volumes: Volumes, config: Config, folder: Path) -> list[dict[str, float]]:
    with process_group(config.system.deterministic) as device:
        return train(begin(config, device), config, folder, volumes)


def saved(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint of a run without the config, which holds the run's name."""
    state = load_checkpoint(folder / "checkpoints" / name, KIND, {"weights": dict})
    return {key: value for key, value in state.items() if key != "config"}


def script(config: Config, folder: Path, processes: int, words: list[str]) -> list[str]:
    """The command line of train.py under a config; 0 processes: without torchrun."""
    return script_command(ROOT / "em_segmentation" / "train.py", "base", config, folder, processes, words)
