"""What results/ holds of an evaluation: one JSON per fold, tables over folds, every prediction."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import config_error
from common.files import parsing, read_text, write_text
from common.logbook import read_metrics
from common.metrics.classification import confusion, roc_auc, roc_curve
from histo_mmnet.config import Config, Protocol
from histo_mmnet.evaluation import LEVELS, FoldVerdict, Level, cases_of, patient_of
from histo_mmnet.judging import Verdict
from histo_mmnet.names import CLASSES, MAGNIFICATIONS
from histo_mmnet.predictions import probability
from histo_mmnet.splits import ROLES, Trial
from histo_mmnet.trainer import Files

PREFIX: dict[Level, str] = {"patient": "patient_", "composite": "", "image": "image_"}  # of a level's figures
SUMMARY = ("accuracy", "balanced_accuracy", "f1", "auc", "precision", "recall")
CURVES = {"train_losses": "train_loss", "val_losses": "val_loss", "val_balanced_accuracies": "val_balanced_accuracy",
          "val_aucs": "val_auc", "learning_rates": "learning_rate"}  # fmt: skip


def fold_results(fold: FoldVerdict, trial: Trial, protocol: Protocol, rule: str, folder: Path) -> dict[str, Any]:
    """What fold_k_results.json holds: figures at three levels, a curve, who was in it, how it was trained.

    test_accuracy and the like are of composites, as the original has them; test_patient_... and test_image_... stand beside.
    """
    cases = cases_of([fold], "composite", protocol)
    counts = confusion(cases.label, cases.positive)
    false_rate, true_rate, thresholds = roc_curve(cases.label, cases.probability)
    records = read_metrics(Files.of(folder, fold.member).metrics, ("val_loss",))
    patients = {role: sorted({name.accession for name in trial.of(role)}) for role in ROLES}
    return {
        "fold": fold.member.fold,
        **{f"test_{PREFIX[level]}{name}": value
           for level in LEVELS for name, value in plain_figures(fold, level, protocol).items()},
        "test_patient_recognition_rate": float(cases_of([fold], "image", protocol).scores().mean()),
        "optimal_threshold": fold.thresholds.patient,
        "thresholds": dataclasses.asdict(fold.thresholds),
        "threshold_rule": rule,
        "confusion_matrix": [[counts.true_negative, counts.false_positive], [counts.false_negative, counts.true_positive]],
        "inference_time": fold.seconds_per_patient,
        "roc_data": {"fpr": false_rate.tolist(), "tpr": true_rate.tolist(),
                     "thresholds": [float(v) if np.isfinite(v) else None for v in thresholds]},
        **importances(fold),
        "training_history": {key: [r[name] for r in records if name in r] for key, name in CURVES.items()},
        **{f"{role}_patients": own for role, own in patients.items()},
        "train_images": len(trial.of("train")),
        "test_images": len(trial.of("test")),
        "test_samples": len(fold.predictions.composites),
    }  # fmt: skip


def plain_figures(fold: FoldVerdict, level: Level, protocol: Protocol) -> dict[str, float]:
    """SUMMARY of one fold at a level."""
    cases = cases_of([fold], level, protocol)
    counts, area = confusion(cases.label, cases.positive), roc_auc(cases.label, cases.probability)
    return {name: area if name == "auc" else getattr(counts, name) for name in SUMMARY}


def importances(fold: FoldVerdict) -> dict[str, Any]:
    """What the network itself gives each magnification, and who attends to whom (rows: 40X, 100X, 200X, 400X); means."""
    found = fold.predictions
    if not np.isfinite(found.importance).any():
        return {"magnification_importance": None, "hierarchical_attention": None}
    mean = np.nanmean(found.importance, 0)
    return {
        "magnification_importance": {str(m): float(v) for m, v in zip(MAGNIFICATIONS, mean, strict=True)},
        "hierarchical_attention": np.nanmean(found.attention, 0).tolist(),
    }


def write_results(
    verdict: Verdict, trials: list[Trial], config: Config, folder: Path, output: Path
) -> list[dict[str, Any]]:
    """Every file of results/ of a run's folder, below output; returns what fold_k_results.json hold.

    What an earlier evaluation left is deleted: all that lies there afterwards is of one.
    """
    results = output / "results"
    clear_evaluation(output)
    of = {trial.number: trial for trial in trials}
    protocol, rule = config.split.protocol, str(verdict.figures["threshold_rule"])
    found = [fold_results(fold, of[fold.member.fold], protocol, rule, folder) for fold in verdict.folds]
    for one in found:
        write_text(results / f"fold_{one['fold']}_results.json", json.dumps(clean(one), indent=1) + "\n")
    rows = [
        {"fold": one["fold"], "level": level} | {name: one[f"test_{PREFIX[level]}{name}"] for name in SUMMARY}
        | {"threshold": one["thresholds"][level], "inference_time": one["inference_time"],
           "train_patients": len(one["train_patients"]), "test_patients": len(one["test_patients"])}
        for level in LEVELS for one in found
    ]  # fmt: skip
    write_text(results / "results_summary.csv", as_csv(rows))
    names = [f"{PREFIX[level]}{name}" for level in LEVELS for name in SUMMARY]
    over_folds = {
        name: dict(zip(("mean", "std"), mean_and_deviation([one[f"test_{name}"] for one in found]), strict=True))
        for name in (*names, "patient_recognition_rate")
    }
    write_text(results / "cross_validation_results.json", json.dumps(clean(over_folds), indent=1) + "\n")
    write_text(results / "metrics.json", json.dumps(clean(verdict.figures), indent=2) + "\n")
    write_text(results / "predictions.csv", as_csv(prediction_rows(verdict.folds, protocol)))
    write_text(results / "patients.csv", as_csv(patient_rows(verdict)))
    return found


def clear_evaluation(output: Path) -> None:
    """Delete what eval.py wrote; the figures of training (*_metrics.csv) stay."""
    for folder in ("results", "plots", "gradcam"):
        for path in (output / folder).glob("*"):
            if path.is_file() and not path.name.endswith("_metrics.csv"):
                path.unlink()
    (output / "report.html").unlink(missing_ok=True)


def patient_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """One row per patient: the mean over composites, the threshold, what is called, and the official score of photographs."""
    patients, scores = verdict.cases["patient"], verdict.cases["image"].scores()
    return [
        {"patient": name, "accession": accession, "label": int(label), "probability": float(p), "threshold": float(limit),
         "called": CLASSES["BM"[int(p >= limit)]], "patient_score": float(score)}
        for name, accession, label, p, limit, score in zip(
            patients.patient, patients.accession, patients.label, patients.probability, patients.threshold, scores, strict=True
        )
    ]  # fmt: skip


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Over folds where the figure is defined: the mean, and the deviation of a sample (n - 1); NaN where there are too few."""
    defined = np.array([value for value in values if np.isfinite(value)])
    mean = float(defined.mean()) if len(defined) else math.nan
    return mean, float(defined.std(ddof=1)) if len(defined) > 1 else math.nan


def clean(figures: Any) -> Any:
    """Figures that are not defined (NaN) as null, at any depth: JSON knows no NaN."""
    if isinstance(figures, dict):
        return {name: clean(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [clean(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def prediction_rows(folds: list[FoldVerdict], protocol: Protocol) -> list[dict[str, Any]]:
    """One row per test composite, with the threshold for composites."""
    return [
        {"fold": fold.member.fold, "patient": patient_of(c.slide.name, c.slide.accession, fold.member.fold, protocol),
         "accession": c.slide.accession, "slide": c.slide.name, "label": c.slide.label,
         "probability": float(said), "threshold": fold.thresholds.composite,
         **{f"{m}X": " ".join(path.name for path, own in zip(c.paths, c.magnification, strict=True)
                              if own == slot and path is not None)
            for slot, m in enumerate(MAGNIFICATIONS)}}
        for fold in folds
        for c, said in zip(fold.predictions.composites, probability(fold.predictions.logits), strict=True)
    ]  # fmt: skip


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows of equal columns as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def fold_thresholds(run: Path) -> dict[int, float]:
    """Fold -> the threshold for patients that eval.py chose for it."""
    found = {}
    for path in sorted((run / "results").glob("fold_*_results.json")):
        with parsing(path, "eval.py writes it anew"):
            one = json.loads(read_text(path))
            found[int(one["fold"])] = float(one["optimal_threshold"])
            if not 0 <= found[int(one["fold"])] <= 1:
                raise ValueError(f"a threshold of {one['optimal_threshold']}")
    if not found:
        raise config_error(
            f"--run: no results/fold_k_results.json in {run}; eval.py --run {run} chooses the thresholds (of all folds: those "
            "of eval.py --fold are not used)"
        )
    return found
