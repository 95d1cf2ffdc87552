"""A run that is killed and started again ends in the same bits: alone, with reading processes, under torchrun."""

import dataclasses
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import load_checkpoint
from motor_detection.config import Config
from motor_detection.trainer import KIND
from tests.common_runs import differing, killed_until_complete, run_command, stop_when_saved
from tests.motor_detection.small_runs import script, small_config, small_patches, write_tomograms

KILLS = 5


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("continued")
    write_tomograms(folder, range(7))
    config = small_config(folder)
    small_patches(config)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=120, log_every=7),
        augment=dataclasses.replace(config.augment, mixup=0.5),
        model=dataclasses.replace(config.model, dropout=0.2, drop_path=0.2),
    )


def in_folder(config: Config, folder: Path, name: str) -> Config:
    """Paths of data and patches stay, as they are part of what a checkpoint agrees on."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, root=folder, name=name))


def state(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint without the config, which holds the run's name."""
    saved = load_checkpoint(folder / "checkpoints" / name, KIND, {"weights": dict})
    return {key: value for key, value in saved.items() if key != "config"}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(0, 0), (0, 2), (2, 0)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    small: Config, tmp_path: Path, processes: int, workers: int
) -> None:
    """Weights, their average, optimizer, records and the best weights; and the log in metrics.csv."""
    config = dataclasses.replace(small, train=dataclasses.replace(small.train, workers=workers))
    reference = script("train.py", in_folder(config, tmp_path, "reference"), tmp_path, processes, [])
    done = run_command(reference)
    assert done.returncode == 0, done.stderr
    command = script("train.py", in_folder(config, tmp_path, "killed"), tmp_path, processes, [])
    steps = killed_until_complete(command, tmp_path / "killed", random.Random(processes * 10 + workers), KILLS, 1.2)
    assert len([step for step in steps if step < config.train.steps]) >= 2, "too few kills hit the run"
    for name in ("last.pt", "best.pt"):
        assert not differing(state(tmp_path / "reference", name), state(tmp_path / "killed", name), name)
    logs = [(tmp_path / name / "metrics.csv").read_text() for name in ("reference", "killed")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 1 + 6 + 17


@pytest.mark.slow
def test_reading_processes_change_no_bit(small: Config, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        config = dataclasses.replace(small, train=dataclasses.replace(small.train, workers=workers, steps=30))
        done = run_command(script("train.py", in_folder(config, tmp_path, f"workers-{workers}"), tmp_path, 0, []))
        assert done.returncode == 0, done.stderr
    parts = [state(tmp_path / f"workers-{workers}", "last.pt") for workers in (0, 1, 3)]
    for part in ("model", "weights", "optimizer", "records"):
        assert not differing(parts[0][part], parts[1][part], part)
        assert not differing(parts[0][part], parts[2][part], part)


@pytest.mark.slow
def test_ctrl_c_says_one_line_and_the_run_goes_on_later(small: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(small, train=dataclasses.replace(small.train, workers=2))
    done = run_command(script("train.py", in_folder(config, tmp_path, "reference"), tmp_path, 0, []))
    assert done.returncode == 0, done.stderr
    command = script("train.py", in_folder(config, tmp_path, "stopped"), tmp_path, 0, [])
    stop_when_saved(command, tmp_path / "stopped", signal.SIGINT)
    again = run_command(command)
    assert again.returncode == 0 and "continuing" in again.stdout
    ours, theirs = state(tmp_path / "stopped", "last.pt"), state(tmp_path / "reference", "last.pt")
    assert not differing(theirs, ours, "last.pt")


@pytest.mark.slow
def test_train_py_says_when_a_run_is_complete_and_fresh_starts_it_over(small: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(small, train=dataclasses.replace(small.train, steps=10, validate_every=5))
    config = in_folder(config, tmp_path, "run")
    first, second = (run_command(script("train.py", config, tmp_path, 0, [])) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert str(tmp_path / "run/checkpoints/best.pt") in first.stdout
    assert "is complete" in second.stdout
    other = run_command(script("train.py", config, tmp_path, 0, ["train.seed=1"]))
    assert other.returncode == 2 and "seed: 1" in other.stderr and "Traceback" not in other.stderr
    fresh = run_command(script("train.py", config, tmp_path, 0, ["train.seed=1", "--fresh"]))
    assert fresh.returncode == 0 and "continuing" not in fresh.stdout
