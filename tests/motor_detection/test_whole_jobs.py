"""The whole job by its own commands, short: the demo on simulated tomograms, and DeepFinder's, which others made.

The whole demo (make demo) reaches an F2 of 0.97; half of its steps 0.86 [0.75, 0.94]. DeepFinder's tomograms with the 600 steps
of their file: 0.97 and more; half of them 0.96.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.common_runs import ROOT, run_as_a_user


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_finds_motors_that_a_blob_picker_does_not(tmp_path: Path) -> None:
    run_as_a_user(tmp_path, "motor_detection/train.py", "run.name=demo", "train.steps=450")
    run_as_a_user(tmp_path, "motor_detection/eval.py", "run.name=demo", "train.steps=450")
    folder = tmp_path / "runs" / "motor_detection" / "demo"
    figures = json.loads((folder / "results" / "metrics.json").read_text())
    assert figures["f2"] >= 0.75 and figures["f2_low"] <= figures["f2"] <= figures["f2_high"]
    assert figures["baseline_f2"] <= 0.5 and figures["n"] >= 40
    assert 0.1 <= 1 - figures["n_with_motor"] / figures["n"] <= 0.6
    assert figures["localisation_error_angstrom"] < 100 and 0 < figures["threshold"] < 1
    for name in ("report.html", "figures/learning_curve.png", "figures/picks.png", "results/picks_test.csv"):
        assert (folder / name).stat().st_size > 1000
    shutil.rmtree(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.alone
def test_particles_of_deepfinders_simulated_tomograms(tmp_path: Path, real_data: Path) -> None:
    run_as_a_user(
        tmp_path,
        "data/import_deepfinder.py",
        str(real_data / "motor" / "deepfinder_synth"),
        "data/generated/deepfinder",
    )
    words = ("--preset", "kaggle", "--config", str(ROOT / "motor_detection" / "deepfinder.yaml"), "train.steps=300")
    for script in ("convert.py", "train.py", "eval.py"):
        run_as_a_user(tmp_path, f"motor_detection/{script}", *words)
    results = tmp_path / "runs" / "motor_detection" / "deepfinder" / "results"
    figures = json.loads((results / "metrics.json").read_text())
    assert figures["f2"] >= 0.92, figures
    assert figures["validation_n"] == figures["n"] == 1
