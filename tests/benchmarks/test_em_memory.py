"""Memory of prediction and decoding: it follows tiles and blocks, not the volume.

A volume of smooth cells, mirrored to its size; the network marks bright lines as membranes. Run alone for figures:
python -m pytest -m slow tests/benchmarks/test_em_memory.py -s
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from common.checkpoint import save_checkpoint
from common.config import as_yaml
from common.streams import random_for
from em_segmentation.config import BASE, Config
from em_segmentation.model_defs.registry import KIND

PREDICT = """
import sys
sys.argv = ["predict.py", *sys.argv[1:]]
import torch
from em_segmentation.model_defs.registry import register_architecture
from tests.benchmarks.test_em_memory import BrightLines
register_architecture("bright_lines", lambda config, channels: BrightLines())
from em_segmentation.predict import main
code = main(sys.argv[1:])
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


class BrightLines(torch.nn.Module):
    """Logits (B, 1, z, y, x) of grey values (B, 1, z, y, x): above where one voxel in six is."""

    halo, alignment = (0, 0, 0), (1, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.steepness = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.steepness * (volume - 1)


def mirrored_cells(shape: tuple[int, int, int]) -> np.ndarray:
    """Bright surfaces between smooth cells of some 12 voxels, uint8."""
    noise = scipy.ndimage.gaussian_filter(random_for("cells", 0).standard_normal((64, 96, 96)), 3)
    lines = np.exp(-np.square(3 * noise / noise.std()))
    margins = [(0, n - m) for n, m in zip(shape, lines.shape, strict=True)]
    return np.pad(np.rint(lines * 200 + 20).astype(np.uint8), margins, mode="reflect")


def config() -> Config:
    return dataclasses.replace(
        BASE,
        model=dataclasses.replace(BASE.model, architecture="bright_lines"),
        data=dataclasses.replace(BASE.data, voxel_size_nm=(10.0, 10.0, 10.0), patch_size=(32, 32, 32)),
        inference=dataclasses.replace(BASE.inference, tiling="exact", tile_size=(32, 256, 256)),
        decoding=dataclasses.replace(BASE.decoding, target="membrane", block_size=(64, 256, 256)),
    )


def peak_of(depth: int, folder: Path) -> float:
    """GiB that predict.py needs for the probabilities and the instances of depth x 512 x 512 voxels."""
    folder.mkdir()
    np.save(folder / "image.npy", mirrored_cells((depth, 512, 512)))
    weights = {"network.steepness": torch.tensor(4.0)}
    save_checkpoint({"kind": KIND, "config": as_yaml(config()), "weights": weights}, folder / "best.pt")
    command = [sys.executable, "-c", PREDICT, "--checkpoint", str(folder / "best.pt"),
               "--input", str(folder / "image.npy"), "--output", str(folder / "probabilities.npy"),
               "--instances", str(folder / "cells.npy")]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert int(np.load(folder / "cells.npy", mmap_mode="r").max()) > 50
    return int(done.stdout.rsplit("peak ", 1)[1]) / 2**20


@pytest.mark.slow
@pytest.mark.alone
def test_memory_follows_blocks_and_not_the_volume(tmp_path: Path) -> None:
    """The probabilities alone of the larger volume are four times what may be added for it."""
    small, large = peak_of(64, tmp_path / "small"), peak_of(256, tmp_path / "large")
    print(f"\npeak memory of predict.py: {small:.2f} GiB for 64 x 512 x 512, {large:.2f} GiB for 256 x 512 x 512")
    assert large < 1.5
    assert large - small < 0.25
