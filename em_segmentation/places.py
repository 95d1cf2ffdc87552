"""Where a config's volumes and runs lie; the phantom is generated on first use."""

import dataclasses
import hashlib
from pathlib import Path

from common.config import as_yaml, fingerprint
from data.phantoms.em import write_phantom
from em_segmentation.config import Config

SHAPING = ("system", "model", "data", "phantom", "targets", "augmentation", "optimizer", "scheduler", "training",
           "checkpoint", "early_stopping")  # fmt: skip

PRODUCERS = 2  # processes that simulate volumes


def resolve(config: Config) -> Config:
    """The config with the phantom's real paths; files must exist as given."""
    data = config.data
    if data.source == "files":
        return config
    folder = data.root.with_name(f"{data.root.name}-{fingerprint(config.phantom)}")
    volumes = write_phantom(config.phantom, folder, PRODUCERS)

    def files(role: str, name: str) -> tuple[str, ...]:
        return tuple(str(volume / f"{name}.npy") for volume in volumes[role])

    data = dataclasses.replace(
        data,
        train_image=files("train", "image"),
        train_label=files("train", "labels"),
        val_image=files("validation", "image"),
        val_label=files("validation", "labels"),
        test_image=files("test", "image"),
        test_label=files("test", "labels"),
        voxel_size_nm=config.phantom.voxel_size_nm,
    )
    return dataclasses.replace(config, data=data)


def training_identity(config: Config) -> str:
    """YAML of the sections that shape the weights: what a run's folder and its checkpoints must agree on."""
    # these change no bit; voxel sizes, given or read from the files, are known to the volumes' digest
    data = dataclasses.replace(config.data, num_workers=0, persistent_workers=True, use_cache=False, voxel_size_nm=None)
    data = dataclasses.replace(data, test_image=(), test_label=(), test_mask=(), test_sections=None)
    same = dataclasses.replace(
        config,
        data=data,
        system=dataclasses.replace(config.system, num_cpus=0, num_gpus=1),
        checkpoint=dataclasses.replace(config.checkpoint, every_n_steps=1, save_last=True),
    )
    return "".join(f"{name}:\n{as_yaml(getattr(same, name))}" for name in SHAPING)


def run_folder(config: Config) -> Path:
    """runs/em_segmentation/PRESET-<hash of what shapes the weights>, or run.name."""
    digest = hashlib.sha256(training_identity(config).encode()).hexdigest()[:8]
    return config.run.root / (config.run.name if config.run.name is not None else f"{config.run.preset}-{digest}")
