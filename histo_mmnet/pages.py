"""What eval.py shows: pictures, tables and report.html."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import write_text
from common.report import Section, write_report
from histo_mmnet.config import Config
from histo_mmnet.evaluation import magnification_importance
from histo_mmnet.figures import draw_decisions, draw_importance, draw_learning_curves, draw_roc_curves
from histo_mmnet.gradcam import draw_gradcams
from histo_mmnet.judging import Verdict
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.results import SUMMARY, as_csv

Results = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which parts were asked for."""

    learning_curves: bool
    roc_curves: bool
    table: bool
    magnitude: bool
    gradcam: bool


def summary(verdict: Verdict, config: Config) -> str:
    """The few lines that matter."""
    figures, share = verdict.figures, f"{100 * config.evaluation.confidence:g}% interval"

    def told(name: str) -> str:
        return f"{figures[name]:.3f} ({share} {figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f})"

    lines = [
        f"patients ({figures['n_patients']}): balanced accuracy {told('patient_balanced_accuracy')}, "
        f"AUC {told('patient_auc')}, recognition rate {told('patient_recognition_rate')}",
        f"composites ({figures['n_composites']}): balanced accuracy {figures['composite_balanced_accuracy']:.3f}, "
        f"AUC {figures['composite_auc']:.3f}; photographs alone ({figures['n_images']}): "
        f"{figures['image_balanced_accuracy']:.3f}, {figures['image_auc']:.3f}",
    ]
    if "best_single_magnification" in figures:
        best = figures["best_single_magnification"]
        others = ", ".join(f"{m}X {figures[f'single_{m}X_balanced_accuracy']:.3f}" for m in MAGNIFICATIONS)
        lines.append(f"  baseline, a network per magnification: {others}; the best is {best}, as the test says")
        lines.append(
            f"  all four over {best}, paired: balanced accuracy {told('over_best_single_balanced_accuracy')}, "
            f"AUC {told('over_best_single_auc')}"
        )
    lines += [
        f"  baseline, nearest neighbour by colour: patients {told('colour_baseline_balanced_accuracy')}, "
        f"photographs {figures['colour_baseline_image_balanced_accuracy']:.3f}",
        "  chance: 0.500",
    ]
    return "\n".join(lines)


def write_pages(
    verdict: Verdict, results: Results, asked: Asked, config: Config, folder: Path, device: torch.device
) -> list[Path]:
    """Draw what was asked for, write report.html; returns the paths of all that was written."""
    plots, tables = folder / "plots", folder / "results"
    sections = [Section("Result", "", result_table(verdict), None, "")]
    written = [tables / "metrics.json"]

    def shown(title: str, text: str, path: Path) -> None:
        sections.append(Section(title, text, [], path, ""))
        written.append(path)

    draw_decisions(verdict.cases, plots / "decisions.png")
    shown("Decisions", "Patients at their folds' thresholds, and calibration of composites.", plots / "decisions.png")
    if asked.roc_curves:
        draw_roc_curves(results, verdict.cases.of_patients(), plots / "roc_curves.png")
        shown("Operating characteristic", "", plots / "roc_curves.png")
    if asked.learning_curves:
        draw_learning_curves(results, plots / "learning_curves.png")
        shown("Learning curves", "", plots / "learning_curves.png")
    if asked.magnitude:
        shapley = magnification_importance([fold.predictions for fold in verdict.folds], config.evaluation)
        draw_importance(results, shapley, plots / "magnification_importance.png")
        write_text(tables / "magnification_stats.csv", as_csv(magnification_rows(results, shapley)))
        text = "What each adds to the patients' AUC, averaged over all orders of adding them; the network's own weights beside."
        shown("Magnifications", text, plots / "magnification_importance.png")
        written.append(tables / "magnification_stats.csv")
    if asked.table:
        write_text(tables / "performance_table.csv", as_csv(performance_rows(results)))
        write_text(tables / "summary_report.csv", as_csv(summary_rows(results)))
        sections.append(Section("Folds", "", cells_of(performance_rows(results)), None, ""))
        written += [tables / "performance_table.csv", tables / "summary_report.csv"]
    if asked.gradcam:
        for path, text in draw_gradcams(verdict, config, folder, device):
            shown("What the network looks at", text, path)
    write_report(folder / "report.html", f"histo_mmnet: {folder.name}", sections)
    return [*written, folder / "report.html"]


def result_table(verdict: Verdict) -> list[list[str]]:
    """Figure, value, interval, simple methods, chance."""
    f = verdict.figures

    def number(name: str) -> str:
        return f"{f[name]:.3f}" if name in f and not (isinstance(f[name], float) and math.isnan(float(f[name]))) else ""

    rows = [["figure", "value", "95% interval over patients", "best single magnification", "colour", "chance"]]
    single = number("best_single_magnification_balanced_accuracy")
    for words, name, beside in (
        (f"balanced accuracy, {f['n_patients']} patients", "patient_balanced_accuracy",
         [single, number("colour_baseline_balanced_accuracy"), "0.500"]),
        ("AUC, patients", "patient_auc", ["", "", "0.500"]),
        ("recognition rate, patients", "patient_recognition_rate", ["", "", ""]),
        (f"balanced accuracy, {f['n_composites']} composites", "composite_balanced_accuracy", ["", "", "0.500"]),
        (f"balanced accuracy, {f['n_images']} photographs", "image_balanced_accuracy",
         ["", number("colour_baseline_image_balanced_accuracy"), "0.500"]),
    ):  # fmt: skip
        rows.append([words, number(name), f"{number(f'{name}_low')} to {number(f'{name}_high')}", *beside])
    return rows


def performance_rows(results: Results) -> list[dict[str, Any]]:
    """A row per fold, then mean and standard deviation."""
    rows: list[dict[str, Any]] = [{"fold": r["fold"]} | {n: round(r[f"test_{n}"], 4) for n in SUMMARY} for r in results]
    values = np.array([[r[f"test_{n}"] for n in SUMMARY] for r in results])
    for word, row in (("mean", np.nanmean(values, 0)), ("std", np.nanstd(values, 0))):
        rows.append({"fold": word} | {n: round(float(v), 4) for n, v in zip(SUMMARY, row, strict=True)})
    return rows


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """Mean over folds and its normal interval, mean +- 1.96 s / sqrt(folds); the bootstrap over patients is the better one."""
    rows = []
    for name in SUMMARY:
        values = np.array([r[f"test_{name}"] for r in results])
        half = 1.96 * float(np.nanstd(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        mean = float(np.nanmean(values))
        rows.append(
            {"metric": name, "mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}
        )
    return rows


def magnification_rows(results: Results, shapley: list[Any]) -> list[dict[str, Any]]:
    """A row per magnification."""
    told = [r["magnification_importance"] for r in results if r["magnification_importance"] is not None]
    rows = []
    for m, interval in zip(MAGNIFICATIONS, shapley, strict=True):
        weights = [one[str(m)] for one in told]
        rows.append({
            "magnification": m,
            "shapley_auc": round(interval.estimate, 4), "low": round(interval.low, 4), "high": round(interval.high, 4),
            "weight_mean": round(float(np.mean(weights)), 4) if weights else "",
            "weight_std": round(float(np.std(weights)), 4) if weights else "",
        })  # fmt: skip
    return rows


def cells_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
