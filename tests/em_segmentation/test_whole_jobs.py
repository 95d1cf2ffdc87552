"""The whole job by its own commands: a short demo on simulated neuropil.

The whole demo (make demo) reaches a Jaccard of 0.87 and an adapted Rand error of 0.09; here a quarter of its steps on half of
its volumes: 0.73 and 0.12.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.common_runs import run_as_a_user

SHORT = ("run.name=demo", "training.max_epochs=1", "training.steps_per_epoch=600", "scheduler.warmup_epochs=0.2",
         "phantom.train_volumes=6", "phantom.validation_volumes=1", "phantom.test_volumes=2")  # fmt: skip


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_finds_mitochondria_and_neurites_that_simple_methods_do_not(tmp_path: Path) -> None:
    run_as_a_user(tmp_path, "em_segmentation/train.py", *SHORT)
    run_as_a_user(tmp_path, "em_segmentation/eval.py", *SHORT)
    folder = tmp_path / "runs" / "em_segmentation" / "demo"
    figures = json.loads((folder / "results" / "metrics.json").read_text())
    assert figures["mitochondria_jaccard"] >= 0.6
    assert (
        figures["mitochondria_jaccard_low"] <= figures["mitochondria_jaccard"] <= figures["mitochondria_jaccard_high"]
    )
    assert figures["adapted_rand_error"] <= 0.25
    assert figures["baseline_mitochondria_jaccard"] < 0.35 and figures["baseline_adapted_rand_error"] > 0.4
    assert figures["voi_split"] + figures["voi_merge"] < 1.6
    for name in ("report.html", "figures/learning_curve.png", "figures/overlay.png", "figures/errors.png"):
        assert (folder / name).stat().st_size > 1000
    shutil.rmtree(tmp_path / "data")
