"""The pictures of a run: learning curve, precision-recall curve, picks in their tomograms."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from common.figures import save_figure
from common.metrics.detection import DetectionCurve
from motor_detection.evaluation import Picked

LEARNING_CURVE = {  # figures of a validation and their words
    "average_precision": "average precision",
    "soft_dice": "soft Dice",
    "top_10_accuracy": "peak among the top 10 cells",
}
SCALE_BAR_ANGSTROM = 1000.0
SLICE_REACH_ANGSTROM = 250.0  # how far from a slice a point is still drawn on it; about a C-ring's radius


@dataclasses.dataclass(frozen=True)
class PickView:
    """What one column of the picks' picture shows."""

    slices: tuple[np.ndarray, np.ndarray]  # (y, x) from above, (z, x) from the side
    motors: np.ndarray  # (n, 3) voxels
    picks: np.ndarray  # (m, 3) voxels, score above the threshold
    centre: np.ndarray  # (3,) voxel that the slices pass through
    spacing_angstrom: np.ndarray  # (3,)
    title: str


def draw_learning_curve(records: list[dict[str, float]], path: Path) -> None:
    """Training and validation loss beside the validation figures, over optimizer steps."""
    validated = [record for record in records if "validation_loss" in record]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    left.plot(steps, losses, color="0.8", lw=0.8, label="training, single batches")
    window = max(1, len(losses) // 9)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(steps[window - 1 :], smooth, color="0.4", lw=1.5, label=f"training, mean of {window}")
    steps = [record["step"] for record in validated]
    left.plot(
        steps, [r["validation_loss"] for r in validated], color="C0", marker=".", label="validation (averaged weights)"
    )
    left.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    for name, label in LEARNING_CURVE.items():
        right.plot(steps, [record[name] for record in validated], label=label, marker=".")
    right.set(xlabel="optimizer step", ylabel="on validation patches", ylim=(0, 1.02), xlim=left.get_xlim())
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    save_figure(figure, path)


def draw_precision_recall(curves: dict[str, tuple[DetectionCurve, float]], path: Path) -> None:
    """Precision over recall of several methods, each with a cross at its threshold."""
    figure, axes = plt.subplots(figsize=(4.6, 4.2))
    for number, (name, (curve, threshold)) in enumerate(curves.items()):
        axes.plot(curve.recall, curve.precision, label=name, color=f"C{number}", drawstyle="steps-post")
        if (curve.thresholds >= threshold).any():
            chosen = int(np.flatnonzero(curve.thresholds >= threshold)[-1])
            label = f"at its threshold {threshold:.2f}"
            axes.plot(curve.recall[chosen], curve.precision[chosen], "x", color=f"C{number}", ms=9, mew=2, label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), title="test tomograms")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


def draw_picks(shown: list[PickView], tolerance_angstrom: float, path: Path) -> None:
    """The slice through each tomogram's best pick, from above (x-y) and from the side (x-z), all axes to scale.

    Green circles: true motors; orange crosses: picks above the threshold. Motors and picks within 250 angstrom of the
    slice are drawn. The white bar is 1000 angstrom long.
    """
    heights = [max(view.slices[row].shape[0] / view.slices[row].shape[1] for view in shown) for row in range(2)]
    width = 2.6
    figure, axes = plt.subplots(2, len(shown), figsize=(width * len(shown), width * sum(heights) + 0.9), squeeze=False,
                                gridspec_kw={"height_ratios": heights}, layout="constrained")  # fmt: skip
    for column, view in enumerate(shown):
        for row, (across, horizontal, vertical) in enumerate(((0, 2, 1), (1, 2, 0))):
            panel = axes[row][column]
            panel.imshow(view.slices[row], cmap="gray", interpolation="nearest")
            mark_points(panel, view, across, horizontal, vertical)
            height, edge = view.slices[row].shape
            if row == 0:
                length = SCALE_BAR_ANGSTROM / view.spacing_angstrom[2]
                panel.plot([0.05 * edge, 0.05 * edge + length], [0.94 * height] * 2, color="white", lw=2.5)
            panel.set(xticks=[], yticks=[], xlim=(-0.5, edge - 0.5), ylim=(height - 0.5, -0.5))
            panel.set_anchor("N")  # titles in one line, whatever the heights
        axes[0][column].set_title(view.title, fontsize=8)
    axes[0][0].set_ylabel("from above", fontsize=8)
    axes[1][0].set_ylabel("from the side", fontsize=8)
    figure.suptitle(
        f"green: true motor, orange: pick above the threshold (right if within {tolerance_angstrom:g} Å of a motor), "
        f"both within {SLICE_REACH_ANGSTROM:g} Å of the slice; bar: {SCALE_BAR_ANGSTROM:g} Å",
        fontsize=9,
    )
    save_figure(figure, path)


def mark_points(panel: Any, view: PickView, across: int, horizontal: int, vertical: int) -> None:
    """Circles at true motors, crosses at picks, near the slice across one axis."""
    for points, style in ((view.motors, {"marker": "o", "s": 220, "facecolors": "none", "edgecolors": "#2ecc71"}),
                          (view.picks, {"marker": "x", "s": 50, "color": "#ff9f1c"})):  # fmt: skip
        near = np.abs(points[:, across] - view.centre[across]) * view.spacing_angstrom[across] < SLICE_REACH_ANGSTROM
        panel.scatter(points[near, horizontal], points[near, vertical], linewidths=1.4, **style)


def view_of(picked: Picked, threshold: float) -> PickView:
    """The slices through a tomogram's best pick, or its first motor, or its middle."""
    volume, spacing = picked.tomogram.volume, np.array(picked.tomogram.spacing_angstrom)
    scored = picked.scored
    kept = scored.points[scored.scores >= threshold]
    candidates = [*kept[:1], *scored.truths[:1], (np.array(volume.shape) - 1) / 2]
    centre = np.clip(np.rint(candidates[0]).astype(int), 0, np.array(volume.shape) - 1)
    depth, height, width = volume.shape
    first = max(0, int(centre[0]) - 1)
    above = volume.read((first, 0, 0), (min(3, depth - first), height, width)).mean(0)  # three slices, less noise
    side_first = max(0, int(centre[1]) - 1)
    side = volume.read((0, side_first, 0), (depth, min(3, height - side_first), width)).mean(1)
    score = f"best score {scored.scores[0]:.2f}" if len(scored.scores) else "no pick"
    motors = (
        {0: "no motor", 1: "1 motor"}[len(scored.truths)] if len(scored.truths) < 2 else f"{len(scored.truths)} motors"
    )
    verdict = "answered" if len(kept) else "no answer"
    title = f"{picked.picks.tomo_id}: {motors}\n{score}, {verdict}"
    return PickView((above, side), scored.truths, kept, centre, spacing, title)
