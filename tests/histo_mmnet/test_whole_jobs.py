"""The whole job by its own commands: a short demo on simulated slides.

The whole demo (make demo) has 80 patients and five folds and reaches a balanced accuracy of 0.95; here 45 patients and three
folds, 15 of them to train on: an AUC of 0.87.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.common_runs import run_as_a_user

SHORT = ("run.name=demo", "split.num_folds=3", "phantom.benign_accessions=20", "phantom.malignant_accessions=25")


@pytest.mark.slow
@pytest.mark.alone
def test_the_demo_tells_malignant_from_benign_where_colour_does_not(tmp_path: Path) -> None:
    run_as_a_user(tmp_path, "histo_mmnet/train.py", *SHORT)
    run_as_a_user(tmp_path, "histo_mmnet/eval.py", "--all", *SHORT)
    folder = tmp_path / "runs" / "histo_mmnet" / "demo"
    figures = json.loads((folder / "results" / "metrics.json").read_text())
    print({name: value for name, value in figures.items() if "balanced" in name or "auc" in name})
    assert figures["n_patients"] == 45 and figures["leaking_test_images"] == 0
    assert figures["patient_auc"] >= 0.75
    assert figures["patient_auc_low"] <= figures["patient_auc"] <= figures["patient_auc_high"]
    assert figures["colour_baseline_balanced_accuracy"] <= 0.7
    for name in ("report.html", "plots/roc_curves.png", "plots/decisions.png", "plots/magnification_importance.png"):
        assert (folder / name).stat().st_size > 1000
    shutil.rmtree(tmp_path / "data")
