"""A run of seconds on a small phantom, and what the tests do with it."""

import json
from pathlib import Path
from typing import Any

import torch

from common.config import configure
from data.phantoms.histo import write_phantom
from data.phantoms.histo_settings import HistoPhantom
from histo_mmnet.config import PHANTOM, Config
from tests.common_runs import ROOT, script_command

SMALL = HistoPhantom(benign_accessions=3, malignant_accessions=4, sites=(2, 2), size=(38, 58))


def small_config(folder: Path) -> Config:
    """Three folds of a phantom of seven patients, two epochs each, every augmentation, mixup, dropout."""
    breast = write_phantom(SMALL, folder / "phantom", 1)
    return changed(
        PHANTOM, "data.source=files", f"data.root={breast}", "data.image_size=[36,56]", "data.normalisation=none",
        "split.num_folds=3", "model.backbone=shufflenet_v2_x0_5", "model.stages=0", "model.width=8",
        "train.epochs=2", "train.batch_size=4",
        "train.micro_batch_cuda=2", "train.micro_batch_mps=2", "train.micro_batch_cpu=2", "train.epoch_multiplier=1.0",
        "train.precision=float32", "augment.rotation_degrees=15", "augment.blur=0.5", "augment.missing_view=0.3",
        "loss.mixup_alpha=0.4", "loss.focal_gamma=2", "loss.label_smoothing=0.1", "train.single_magnifications=false",
        "train.patience=0", f"run.root={folder}", "run.name=run",
    )  # fmt: skip


def records_of(breast: Path) -> dict[str, dict[str, Any]]:
    """What a phantom's files show, by name."""
    folder = breast.parents[1] / "truth"
    return {row["file"]: row for path in folder.glob("*.json") for row in json.loads(path.read_text())}


def changed(config: Config, *words: str) -> Config:
    return configure(config, [], list(words))


def in_folder(config: Config, folder: Path, name: str) -> Config:
    return changed(config, f"run.root={folder}", f"run.name={name}")


def script(config: Config, folder: Path, processes: int, words: list[str]) -> list[str]:
    """train.py under a config."""
    return script_command(ROOT / "histo_mmnet" / "train.py", "phantom", config, folder, processes, words)


def saved(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint of a run, without the config, which names the run."""
    state: dict[str, Any] = torch.load(folder / "models" / name, weights_only=True)
    return {key: value for key, value in state.items() if key != "config"}
