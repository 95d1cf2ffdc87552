"""The whole job by its own commands: the demo on simulated neuropil."""

import json
import shutil
from pathlib import Path

import pytest

from tests.common_runs import run_as_a_user


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_finds_mitochondria_and_neurites_that_simple_methods_do_not(tmp_path: Path) -> None:
    run_as_a_user(tmp_path, "em_segmentation/train.py", "run.name=demo")
    run_as_a_user(tmp_path, "em_segmentation/eval.py", "run.name=demo")
    folder = tmp_path / "runs" / "em_segmentation" / "demo"
    figures = json.loads((folder / "results" / "metrics.json").read_text())
    assert figures["mitochondria_jaccard"] >= 0.85
    assert (
        figures["mitochondria_jaccard_low"] <= figures["mitochondria_jaccard"] <= figures["mitochondria_jaccard_high"]
    )
    assert figures["adapted_rand_error"] <= 0.12
    assert figures["baseline_mitochondria_jaccard"] < 0.35 and figures["baseline_adapted_rand_error"] > 0.4
    assert figures["voi_split"] + figures["voi_merge"] < 1.5
    for name in ("report.html", "figures/learning_curve.png", "figures/overlay.png", "figures/errors.png"):
        assert (folder / name).stat().st_size > 1000
    shutil.rmtree(tmp_path / "data")
