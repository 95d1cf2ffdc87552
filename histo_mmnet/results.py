"""What results/ holds of an evaluation: one JSON per fold, tables over folds, every prediction."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import config_error
from common.files import parsing, read_text, write_text
from common.logbook import read_metrics
from common.metrics.classification import confusion, roc_auc, roc_curve
from histo_mmnet.evaluation import Figures, balanced_accuracy_of, cases_of
from histo_mmnet.judging import FoldVerdict, Verdict
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.predictions import ALL, probability
from histo_mmnet.splits import Trial
from histo_mmnet.trainer import Files

SUMMARY = ("accuracy", "balanced_accuracy", "f1", "auc", "precision", "recall")
CURVES = {"train_losses": "train_loss", "val_losses": "val_loss", "val_balanced_accuracies": "val_balanced_accuracy",
          "val_aucs": "val_auc", "learning_rates": "learning_rate"}  # fmt: skip


def fold_results(fold: FoldVerdict, trial: Trial, folder: Path) -> dict[str, Any]:
    """What fold_k_results.json holds: the fold's composites at its threshold, its curve, who was in it, how it was trained."""
    cases = cases_of([fold.predictions], [fold.threshold], ALL)
    counts = confusion(cases.label, cases.positive)
    rates = roc_curve(cases.label, cases.probability)
    records = read_metrics(Files.of(folder, fold.member).metrics, ("val_loss",))
    patients = {role: sorted({name.accession for name in trial.of(role)}) for role in ("train", "val", "test")}
    importance = np.nanmean(fold.predictions.importance, 0) if np.isfinite(fold.predictions.importance).any() else None
    return {
        "fold": fold.member.fold,
        **{f"test_{name}": getattr(counts, name) for name in SUMMARY if name != "auc"},
        "test_auc": roc_auc(cases.label, cases.probability),
        "test_patient_balanced_accuracy": balanced_accuracy_of(cases.of_patients()),
        "optimal_threshold": fold.threshold,
        "confusion_matrix": [[counts.true_negative, counts.false_positive], [counts.false_negative, counts.true_positive]],
        "inference_time": fold.seconds_per_patient,
        "roc_data": {name: [float(v) for v in rate if np.isfinite(v)]
                     for name, rate in zip(("fpr", "tpr", "thresholds"), rates, strict=True)},
        "magnification_importance": None if importance is None else
                                    {str(m): float(v) for m, v in zip(MAGNIFICATIONS, importance, strict=True)},
        "training_history": {key: [r[name] for r in records if name in r] for key, name in CURVES.items()},
        **{f"{role}_patients": own for role, own in patients.items()},
        "train_samples": len(trial.of("train")),
        "test_samples": len(fold.predictions.composites),
    }  # fmt: skip


def write_results(verdict: Verdict, trials: list[Trial], folder: Path) -> list[dict[str, Any]]:
    """Every file of results/; returns what fold_k_results.json hold."""
    results = folder / "results"
    of = {trial.number: trial for trial in trials}
    found = [fold_results(fold, of[fold.member.fold], folder) for fold in verdict.folds]
    for one in found:
        write_text(results / f"fold_{one['fold']}_results.json", json.dumps(one, indent=1) + "\n")
    rows = [
        {"fold": one["fold"]} | {name: one[f"test_{name}"] for name in SUMMARY}
        | {"threshold": one["optimal_threshold"], "inference_time": one["inference_time"],
           "train_patients": len(one["train_patients"]), "test_patients": len(one["test_patients"])}
        for one in found
    ]  # fmt: skip
    write_text(results / "results_summary.csv", as_csv(rows))
    over_folds = {
        name: {
            "mean": float(np.nanmean([row[name] for row in rows])),
            "std": float(np.nanstd([row[name] for row in rows])),
        }
        for name in SUMMARY
    }
    write_text(results / "cross_validation_results.json", json.dumps(over_folds, indent=1) + "\n")
    write_text(results / "metrics.json", json.dumps(clean(verdict.figures), indent=2) + "\n")
    write_text(results / "predictions.csv", as_csv(prediction_rows(verdict.folds)))
    return found


def clean(figures: Figures) -> dict[str, Any]:
    """Figures that are not defined (NaN) as null."""
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in figures.items()}


def prediction_rows(folds: list[FoldVerdict]) -> list[dict[str, Any]]:
    """One row per test composite."""
    return [
        {"fold": fold.member.fold, "accession": c.slide.accession, "slide": c.slide.name, "label": c.slide.label,
         "probability": float(probability(fold.predictions.logits[k : k + 1])[0]), "threshold": fold.threshold,
         **{f"{m}X": path.name if path is not None else "" for m, path in zip(MAGNIFICATIONS, c.paths, strict=True)}}
        for fold in folds for k, c in enumerate(fold.predictions.composites)
    ]  # fmt: skip


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def fold_thresholds(run: Path) -> dict[int, float]:
    """Fold -> the threshold that eval.py chose for it."""
    found = {}
    for path in sorted((run / "results").glob("fold_*_results.json")):
        with parsing(path, "eval.py writes it anew"):
            one = json.loads(read_text(path))
            found[int(one["fold"])] = float(one["optimal_threshold"])
    if not found:
        raise config_error(
            f"--run: no results/fold_k_results.json in {run}; eval.py chooses the thresholds and writes them"
        )
    return found
