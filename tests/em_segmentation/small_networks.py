"""Networks and volumes small enough for tests: random weights and statistics, nothing trained."""

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.checkpoint import save_checkpoint
from common.config import as_yaml
from common.parallel import process_group
from common.streams import random_for
from common.volumes.opening import open_volume
from common.volumes.volume import Volume
from em_segmentation.config import BASE, Config
from em_segmentation.inference import predicted_boxes
from em_segmentation.model_defs.registry import KIND, SegmentationModel, build_model
from em_segmentation.volumes import Scale

ROOT = Path(__file__).resolve().parents[2]
SCALE = Scale((128.0,), (40.0,))


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A config with some constants replaced, section by section."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def small_config() -> Config:
    """Affinities and a mask from a narrow rsunet, in exact tiles and float32."""
    return changed(
        BASE,
        data={"voxel_size_nm": (24.0, 12.0, 12.0), "patch_size": (16, 24, 24)},
        targets={"names": ("affinity", "semantic"), "weights": (1.0, 1.0), "label_channels": (0, 1)},
        model={"architecture": "rsunet", "filters": (3, 4, 5)},
        inference={"tiling": "exact", "precision": "32", "tile_size": (8, 16, 16)},
    )


def random_model(config: Config, seed: int) -> SegmentationModel:
    """The network of a config in eval mode, its weights and running statistics drawn at random."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.normal_(module.bias, std=0.5)
    return model


def grey_volume(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Coarse noise, uint8 [z, y, x]."""
    draw = random_for("grey volume", seed)
    coarse = draw.normal(0, 30, [-(-n // 3) for n in shape])
    fine = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: shape[0], : shape[1], : shape[2]]
    return np.clip(128 + fine + draw.normal(0, 15, shape), 0, 255).astype(np.uint8)


def image_at(path: Path, shape: tuple[int, int, int], seed: int) -> Volume:
    """A volume of random grey values; a file that is there stays, as predictions know when theirs was written."""
    if not path.exists():
        np.save(path, grey_volume(shape, seed))
    return open_volume(path, "auto")


def write_checkpoint(config: Config, path: Path, seed: int) -> None:
    """What train.py leaves as best.pt."""
    save_checkpoint({"kind": KIND, "config": as_yaml(config), "weights": random_model(config, seed).state_dict()}, path)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of one."""
    with process_group(True):
        yield


def run_script(name: object, *words: object) -> subprocess.CompletedProcess[str]:
    """An entry script of em_segmentation in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, str(ROOT / "em_segmentation" / str(name)), *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip


def predicted_planes(
    model: SegmentationModel, image: Volume, scale: Scale, config: Config, planes: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """predicted_boxes, those of a row put together: (first plane, bytes [C, dz, y, x])."""
    boxes = predicted_boxes(model, image, scale, config, planes)
    for first, row in itertools.groupby(boxes, lambda box: box[0][0]):
        whole = np.empty(0, np.uint8)
        for (_, y, x), found in row:
            if whole.ndim == 1:
                whole = np.zeros((*found.shape[:2], *image.shape[1:]), np.uint8)
            whole[:, :, y : y + found.shape[2], x : x + found.shape[3]] = found
        yield first, whole
