"""What eval.py shows: pictures, tables and report.html."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from common.files import read_text, write_text
from common.report import Section, write_report
from histo_mmnet.config import Config
from histo_mmnet.evaluation import LEVELS, magnification_importance
from histo_mmnet.figures import draw_decisions, draw_importance, draw_learning_curves, draw_roc_curves
from histo_mmnet.gradcam import draw_gradcams
from histo_mmnet.judging import Verdict, told_of_silence
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.results import PREFIX, SUMMARY, as_csv, mean_and_deviation

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
        *([f"warning: {leak_words(verdict)}"] if figures["leaking_test_images"] else []),
        *told_of_silence(verdict.folds),
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
    if "best_single_magnification" not in figures:
        lines.append("  baselines of single magnifications are not trained on all folds: train_single_mag.py does")
    return "\n".join(lines)


def leak_words(verdict: Verdict) -> str:
    """What a reader must know of folds that share patients."""
    figures = verdict.figures
    return (
        f"split.protocol={figures['split_protocol']}: {figures['leaking_test_images']} tested photographs, of "
        f"{figures['shared_accessions']} accessions, are of patients that trained or validated the network: figures too good"
    )


def write_pages(
    verdict: Verdict, results: Results, asked: Asked, config: Config, folder: Path, output: Path, device: torch.device
) -> list[Path]:
    """Draw what was asked for of a run's folder, write report.html, both below output; returns all that was written."""
    plots, tables = output / "plots", output / "results"
    told = [*([leak_words(verdict)] if verdict.figures["leaking_test_images"] else []), *told_of_silence(verdict.folds)]
    sections = [Section("Result", "; ".join([*told, described(verdict, config)]), result_table(verdict, config), None,
                        read_text(folder / "config.yaml"))]  # fmt: skip
    written = [tables / "metrics.json"]

    def shown(title: str, text: str, path: Path) -> None:
        sections.append(Section(title, text, [], path, ""))
        written.append(path)

    draw_decisions(verdict.cases["patient"], verdict.cases["composite"], plots / "decisions.png")
    shown("Decisions", "Patients at their folds' thresholds, and calibration of composites.", plots / "decisions.png")
    if asked.roc_curves:
        draw_roc_curves(results, verdict.cases["patient"], plots / "roc_curves.png")
        shown("Operating characteristic", "", plots / "roc_curves.png")
    if asked.learning_curves:
        draw_learning_curves(results, plots / "learning_curves.png")
        shown("Learning curves", "", plots / "learning_curves.png")
    if asked.magnitude:
        shapley = magnification_importance(verdict.folds, config.split.protocol, config.evaluation)
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
        for path, text in draw_gradcams(verdict, config, folder, output, device):
            shown("What the network looks at", text, path)
    write_report(output / "report.html", f"histo_mmnet: {folder.name}", sections)
    return [*written, output / "report.html"]


def described(verdict: Verdict, config: Config) -> str:
    """What was judged, how and of whom, in a sentence."""
    f, limits = verdict.figures, sorted({round(fold.thresholds.patient, 3) for fold in verdict.folds})
    kind = "simulated patients" if config.data.source == "phantom" else "photographs from files"
    words = [
        f"{kind}: {f['n_images']} photographs of {f['n_accessions']} accessions, {f['folds']} folds by {f['split_protocol']}",
        f"thresholds for patients {', '.join(map(str, limits))} (best {f['threshold_rule']})",
        "intervals draw accessions with replacement; networks and thresholds stay",
    ]
    return "; ".join(words) + "."


def result_table(verdict: Verdict, config: Config) -> list[list[str]]:
    """Figure, value, interval, simple methods, chance."""
    f = verdict.figures

    def number(name: str) -> str:
        return f"{f[name]:.3f}" if name in f and not (isinstance(f[name], float) and math.isnan(float(f[name]))) else ""

    interval = f"{100 * config.evaluation.confidence:g}% interval over accessions"
    rows = [["figure", "value", interval, "best single magnification", "colour", "chance"]]
    single = number("best_single_magnification_balanced_accuracy")
    for words, name, beside in (
        (f"balanced accuracy, {f['n_patients']} patients", "patient_balanced_accuracy",
         [single, number("colour_baseline_balanced_accuracy"), "0.500"]),
        ("AUC, patients", "patient_auc", ["", "", "0.500"]),
        ("sensitivity, patients", "patient_recall", ["", "", ""]),
        ("specificity, patients", "patient_specificity", ["", "", ""]),
        ("patient recognition rate (of photographs)", "patient_recognition_rate", ["", "", ""]),
        (f"balanced accuracy, {f['n_composites']} composites", "composite_balanced_accuracy", ["", "", "0.500"]),
        (f"balanced accuracy, {f['n_images']} photographs", "image_balanced_accuracy",
         ["", number("colour_baseline_image_balanced_accuracy"), "0.500"]),
    ):  # fmt: skip
        rows.append([words, number(name), f"{number(f'{name}_low')} to {number(f'{name}_high')}", *beside])
    rows += [
        [f"{words}: {figure}", number(name), f"{number(f'{name}_low')} to {number(f'{name}_high')}", "", "", ""]
        for words, key in [(f"network of {m}X alone", f"single_{m}X") for m in MAGNIFICATIONS]
        + [(f"all four less {f['best_single_magnification']}, paired", "over_best_single")]
        for figure, name in (("balanced accuracy", f"{key}_balanced_accuracy"), ("AUC", f"{key}_auc"))
    ] if "best_single_magnification" in f else []  # fmt: skip
    return rows


def performance_rows(results: Results) -> list[dict[str, Any]]:
    """Of each level a row per fold, then mean and standard deviation."""
    rows: list[dict[str, Any]] = []
    for level in LEVELS:
        of_folds = [{n: r[f"test_{PREFIX[level]}{n}"] for n in SUMMARY} for r in results]
        over = [mean_and_deviation([one[n] for one in of_folds]) for n in SUMMARY]
        named = [(r["fold"], one) for r, one in zip(results, of_folds, strict=True)]
        named += [(word, dict(zip(SUMMARY, values, strict=True)))
                  for word, values in zip(("mean", "std"), zip(*over, strict=True), strict=True)]  # fmt: skip
        rows += [{"level": level, "fold": word} | {n: round(v, 4) for n, v in one.items()} for word, one in named]
    return rows


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """Of each level the mean over folds and its interval, mean +- t s / sqrt(folds) with Student's t of 95 %.

    Folds share training patients, so it is too narrow; the bootstrap over accessions in metrics.json is the better one.
    """
    rows = []
    for level in LEVELS:
        for name in SUMMARY:
            values = [r[f"test_{PREFIX[level]}{name}"] for r in results]
            count, (mean, deviation) = sum(map(math.isfinite, values)), mean_and_deviation(values)
            half = scipy.stats.t.ppf(0.975, count - 1) * deviation / math.sqrt(count) if count > 1 else math.nan
            ends = {
                "low": round(float(np.clip(mean - half, 0, 1)), 4),
                "high": round(float(np.clip(mean + half, 0, 1)), 4),
            }
            rows.append({"level": level, "metric": name, "mean": round(mean, 4)} | ends)
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
    """Rows of equal columns as a table with a head."""
    return [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
