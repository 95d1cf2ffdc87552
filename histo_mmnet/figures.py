"""The pictures of an evaluation: curves, operating characteristic, importance, calibration."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from common.figures import save_figure
from common.metrics.classification import calibration, confusion, roc_auc, roc_curve
from common.metrics.intervals import Interval
from histo_mmnet.evaluation import CALIBRATION_BINS, Cases
from histo_mmnet.names import MAGNIFICATIONS

PANELS = {"train_losses": "training loss (with that of single photographs)", "val_losses": "validation loss",
          "val_balanced_accuracies": "validation balanced accuracy", "val_aucs": "validation AUC"}  # fmt: skip


def draw_learning_curves(results: list[dict[str, Any]], path: Path) -> None:
    """Four panels, a line per fold."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    for panel, (key, words) in zip(axes.flat, PANELS.items(), strict=True):
        for one in results:
            values = one["training_history"][key]
            panel.plot(range(1, len(values) + 1), values, lw=1.2, marker=".", ms=4, label=f"fold {one['fold']}")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key in ("val_balanced_accuracies", "val_aucs"):
            panel.axhline(0.5, color="grey", ls=":", lw=1)
        panel.set_title(words, fontsize=10)
        panel.grid(alpha=0.3)
    axes[1, 0].set_xlabel("epoch")
    axes[1, 1].set_xlabel("epoch")
    axes[0, 1].legend(fontsize=8)
    save_figure(figure, path)


def draw_roc_curves(results: list[dict[str, Any]], patients: Cases, path: Path) -> None:
    """A curve of composites per fold, and that of all patients."""
    figure, panel = plt.subplots(figsize=(5.2, 5))
    for one in results:
        rates = one["roc_data"]
        panel.plot(
            rates["fpr"], rates["tpr"], lw=1, alpha=0.7, label=f"fold {one['fold']}, composites: {one['test_auc']:.3f}"
        )
    false_rate, true_rate, _ = roc_curve(patients.label, patients.probability)
    auc = roc_auc(patients.label, patients.probability)
    panel.plot(false_rate, true_rate, "k", lw=2, label=f"all {len(patients.label)} patients: {auc:.3f}")
    panel.plot([0, 1], [0, 1], ":", color="grey", lw=1, label="chance: 0.5")
    panel.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    panel.legend(fontsize=8, loc="lower right", title="area under the curve", title_fontsize=8)
    panel.grid(alpha=0.3)
    save_figure(figure, path)


def draw_importance(results: list[dict[str, Any]], shapley: list[Interval], path: Path) -> None:
    """What the network says of each magnification, per fold, beside what each adds to the patients' AUC."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    names = [f"{m}X" for m in MAGNIFICATIONS]
    told = [one["magnification_importance"] for one in results if one["magnification_importance"] is not None]
    if told:
        left.boxplot([[one[str(m)] for one in told] for m in MAGNIFICATIONS], tick_labels=names)
        left.axhline(1 / len(names), color="grey", ls=":", lw=1)
    left.set_title(f"importance in the fusion, {len(told)} folds", fontsize=10)
    left.set_ylabel("mean weight over composites")
    middle = np.array([interval.estimate for interval in shapley])
    ends = np.array([[i.estimate - i.low, i.high - i.estimate] for i in shapley]).T
    right.bar(names, middle, color="#7a9cc6", yerr=np.maximum(ends, 0), capsize=4)
    right.axhline(0, color="k", lw=0.8)
    right.set_title("Shapley value of the patients' AUC", fontsize=10)
    for panel in (left, right):
        panel.grid(alpha=0.3, axis="y")
    save_figure(figure, path)


def draw_decisions(patients: Cases, cases: Cases, path: Path) -> None:
    """The patients' confusion matrix, and how often composites of a probability are malignant."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    counts = confusion(patients.label, patients.positive)
    table = np.array([[counts.true_negative, counts.false_positive], [counts.false_negative, counts.true_positive]])
    left.imshow(table, cmap="Blues", vmin=0)
    for (row, column), number in np.ndenumerate(table):
        colour = "white" if number > table.max() / 2 else "black"
        left.text(column, row, str(number), ha="center", va="center", fontsize=14, color=colour)
    left.set(xticks=[0, 1], yticks=[0, 1], xlabel="called", ylabel="truly")
    left.set_xticklabels(["benign", "malignant"])
    left.set_yticklabels(["benign", "malignant"], rotation=90, va="center")
    left.set_title(f"{len(patients.label)} patients at their folds' thresholds", fontsize=10)
    said, was, count, error = calibration(cases.label, cases.probability, CALIBRATION_BINS)
    right.plot([0, 1], [0, 1], ":", color="grey", lw=1)
    right.scatter(said, was, s=10 + 300 * count / count.sum(), alpha=0.7)
    right.plot(said, was, lw=1)
    right.set(xlabel="mean probability", ylabel="share that is malignant", xlim=(0, 1), ylim=(-0.03, 1.03))
    right.set_title(
        f"calibration of {len(cases.label)} composites (area: how many): expected error {error:.3f}", fontsize=10
    )
    right.grid(alpha=0.3)
    save_figure(figure, path)
