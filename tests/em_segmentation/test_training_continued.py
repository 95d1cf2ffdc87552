"""A run that is killed and started again ends in the same bits: alone, with reading processes, under torchrun."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest

from em_segmentation.config import Config
from tests.common_runs import differing, killed_until_complete, run_command, stop_when_saved
from tests.em_segmentation.small_runs import changed, in_folder, saved, script, small_config, write_volumes

KILLS = 5


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """160 steps with every augmentation, a plateau that follows validation, and the two best epochs kept."""
    folder = tmp_path_factory.mktemp("continued")
    write_volumes(folder)
    return changed(
        small_config(folder), "training.max_epochs=8", "training.steps_per_epoch=20", "checkpoint.every_n_steps=7",
        "checkpoint.save_top_k=2", "scheduler.name=plateau", "scheduler.patience=1", "scheduler.factor=0.5",
        "checkpoint.monitor=val_dice", "checkpoint.mode=max",
    )  # fmt: skip


def assert_same(one: Path, other: Path) -> None:
    """Weights, their average, optimizer, records, the best weights, and the log in metrics.csv."""
    names = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints").iterdir()) and len(names) == 4
    for name in names:
        assert not differing(saved(one, name), saved(other, name), name)
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(0, 0), (0, 2), (2, 0)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    small: Config, tmp_path: Path, processes: int, workers: int
) -> None:
    config = changed(small, f"data.num_workers={workers}")
    done = run_command(script(in_folder(config, tmp_path, "reference"), tmp_path, processes, []))
    assert done.returncode == 0, done.stderr
    command = script(in_folder(config, tmp_path, "killed"), tmp_path, processes, [])
    steps = killed_until_complete(command, tmp_path / "killed", random.Random(processes * 10 + workers), KILLS, 0.6)
    assert len([step for step in steps if step < 160]) >= 2, "too few kills hit the run"
    assert_same(tmp_path / "reference", tmp_path / "killed")


@pytest.mark.slow
def test_other_networks_and_optimizers_are_continued_in_the_same_bits_too(small: Config, tmp_path: Path) -> None:
    """Other networks than the small one: dropout is drawn anew for every step."""
    for number, changes in enumerate((
        ("model.architecture=unet", "model.filters=[4,6]", "model.dropout=0.3", "optimizer.name=SGD"),
        ("model.architecture=mednext_custom", "model.mednext_base_channels=4", "data.patch_size=[16,16,32]",
         "augmentation.turn=0", "model.deep_supervision=true", "model.mednext_block_counts=[1,1,1,1,1,1,1,1,1]",
         "data.val_image=[]", "data.val_label=[]", "scheduler.name=cosine"),
    )):  # fmt: skip
        config = changed(thick(small, tmp_path) if number else small, *changes, "training.max_epochs=2")
        done = run_command(script(in_folder(config, tmp_path, f"reference-{number}"), tmp_path, 0, []))
        assert done.returncode == 0, done.stderr
        command = script(in_folder(config, tmp_path, f"killed-{number}"), tmp_path, 0, [])
        killed_until_complete(command, tmp_path / f"killed-{number}", random.Random(number), 2, 1.0)
        assert_same(tmp_path / f"reference-{number}", tmp_path / f"killed-{number}")


def thick(config: Config, folder: Path) -> Config:
    """Training on one volume of enough sections for MedNeXt."""
    grey = np.random.default_rng(0).integers(0, 255, (18, 20, 34), np.uint8)
    np.save(folder / "thick_image.npy", grey)
    np.save(folder / "thick_labels.npy", (grey > 128).astype(np.uint8))
    return changed(config, f"data.train_image={folder}/thick_image.npy", f"data.train_label={folder}/thick_labels.npy",
                   "data.val_image=[]", "data.val_label=[]")  # fmt: skip


@pytest.mark.slow
def test_reading_processes_change_no_bit(small: Config, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        config = changed(small, f"data.num_workers={workers}", "training.max_epochs=2")
        done = run_command(script(in_folder(config, tmp_path, f"workers-{workers}"), tmp_path, 0, []))
        assert done.returncode == 0, done.stderr
    for workers in (1, 3):
        assert_same(tmp_path / "workers-0", tmp_path / f"workers-{workers}")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_one_line_and_goes_on_later(small: Config, tmp_path: Path, asked: signal.Signals) -> None:
    config = changed(small, "data.num_workers=2")
    done = run_command(script(in_folder(config, tmp_path, "reference"), tmp_path, 0, []))
    assert done.returncode == 0, done.stderr
    command = script(in_folder(config, tmp_path, "stopped"), tmp_path, 0, [])
    stop_when_saved(command, tmp_path / "stopped", asked)
    again = run_command(command)
    assert again.returncode == 0 and "continuing" in again.stdout
    assert_same(tmp_path / "reference", tmp_path / "stopped")
