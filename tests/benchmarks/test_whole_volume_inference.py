"""A whole tomogram at full size: exact tiles against the half-overlapping windows of the original system.

Both run the same network in one process. The windows are the original's: 160 x 288 x 288 voxels, half overlap, Gaussian
weights, float32. They all cost the same, so the better of two rows along x counts as often as there are rows; beside it
the median of three rounds of ours around it. Run alone for figures:
python -m pytest -m slow tests/benchmarks -s
"""

import dataclasses
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.memory import keep_freed_memory
from common.tiling import run_blended, window_starts
from common.volumes.opening import open_volume
from motor_detection.config import KAGGLE
from motor_detection.dataset import Patches
from motor_detection.inference import SlabCache, heatmap_logits, working_copy
from motor_detection.intensity import measure_intensity
from motor_detection.tomograms import Tomogram
from motor_detection.trainer import begin
from tests.hardware import COMPUTES_BFLOAT16, DEFAULT

TIMES_FASTER = 8 if COMPUTES_BFLOAT16 else 4  # half-overlapping windows compute 8 voxels for one, tiles a halo more
SHAPE = (300, 960, 928)  # the median tomogram of the BYU data
CPU = torch.device("cpu")

PREDICT = """
import sys
sys.argv = ["predict.py", *sys.argv[1:]]
from motor_detection.predict import main
code = main(sys.argv[1:])
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def tomogram(tmp_path_factory: pytest.TempPathFactory) -> Tomogram:
    path = tmp_path_factory.mktemp("volume") / "tomo.npy"
    random = np.random.default_rng(0)
    np.save(path, random.integers(90, 165, SHAPE, dtype=np.uint8))
    return Tomogram("tomo", open_volume(path, "zyx"), (15.6, 15.6, 15.6))


@pytest.mark.slow
@pytest.mark.alone
def test_exact_tiles_are_eight_times_faster_than_half_overlapping_windows(tomogram: Tomogram) -> None:
    keep_freed_memory()  # as predict.py does; the windows gain from it too
    model = begin(KAGGLE, CPU).average
    intensity = measure_intensity(tomogram.volume)
    fast = working_copy(model, KAGGLE.inference.precision)

    def exact() -> None:
        heatmap_logits(fast, SlabCache(tomogram, intensity, {}), (), KAGGLE, CPU)

    window = KAGGLE.convert.patch_size
    row = (window[0], window[1], SHAPE[2])
    rows = math.prod(len(window_starts(n, edge, 0.5)) for n, edge in zip(SHAPE[:2], window[:2], strict=True))

    @torch.inference_mode()
    def windows(network: torch.nn.Module) -> None:
        run_blended(network, SlabCache(tomogram, intensity, {}).read, row, window, model.stride, 0.5)

    plain = working_copy(model, "float32").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    channels_last = working_copy(model, "float32")
    first = seconds(exact)  # around the long ones, so that a busy moment meets all
    windows_seconds = rows * min(seconds(lambda: windows(plain)) for _ in range(2))
    second = seconds(exact)
    windows_channels_last = rows * min(seconds(lambda: windows(channels_last)) for _ in range(2))
    exact_seconds = statistics.median([first, second, seconds(exact)])
    print(f"\nexact tiles, {str(DEFAULT)[6:]} {exact_seconds:.1f} s; half overlap, float32 {windows_seconds:.1f} s "
          f"({windows_seconds / exact_seconds:.1f} x), channels last {windows_channels_last:.1f} s "
          f"({windows_channels_last / exact_seconds:.1f} x)")  # fmt: skip
    assert min(windows_seconds, windows_channels_last) / exact_seconds > TIMES_FASTER


@pytest.mark.slow
@pytest.mark.alone
def test_tiled_logits_equal_the_untiled_ones_at_full_size(tmp_path: Path) -> None:
    """On a crop that fits into memory whole: float32, tiles of a fraction of it."""
    random = np.random.default_rng(1)
    np.save(tmp_path / "crop.npy", random.integers(90, 165, (150, 330, 290), dtype=np.uint8))
    tomogram = Tomogram("crop", open_volume(tmp_path / "crop.npy", "zyx"), (15.6, 15.6, 15.6))
    model = begin(KAGGLE, CPU).average
    torch.nn.init.normal_(model.logit.weight)  # as the initial head is all zero
    intensity = measure_intensity(tomogram.volume)
    with torch.inference_mode():
        untiled = model(SlabCache(tomogram, intensity, {}).read(((0, 0, 0), tomogram.volume.shape)))[0, 0]
    tile = dataclasses.replace(KAGGLE.inference, tile_size=(64, 128, 96), precision="float32")
    tiled = heatmap_logits(
        model, SlabCache(tomogram, intensity, {}), (), dataclasses.replace(KAGGLE, inference=tile), CPU
    )
    difference = (tiled - untiled).abs().max().item()
    print(f"\nlargest difference of logits {difference:.1e} (logits up to {untiled.abs().max().item():.1f})")
    assert difference < 1e-3


@pytest.mark.slow
@pytest.mark.alone
def test_predict_needs_less_than_three_gigabytes(tomogram: Tomogram, tmp_path: Path) -> None:
    from common.checkpoint import save_checkpoint

    save_checkpoint(
        begin(KAGGLE, CPU).as_checkpoint(KAGGLE, Patches([], [], (32, 32, 32), 1, [], "")), tmp_path / "best.pt"
    )
    command = [sys.executable, "-c", PREDICT, "--checkpoint", str(tmp_path / "best.pt"), "--input",
               str(tomogram.volume.path), "--output", str(tmp_path / "out"), "data.voxel_spacing_angstrom=15.6"]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rsplit("peak ", 1)[1]) / 2**20
    print(f"\npeak memory of predict.py {peak:.2f} GiB")
    assert peak < 3
