"""The pictures of a run: learning curve, precision-recall curve, picks in their tomograms."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.checkpoint import write_atomically
from common.metrics.detection import DetectionCurve
from motor_detection.evaluation import Picked

SLICE_REACH_ANGSTROM = 150.0  # how far from a slice a point is still drawn on it


@dataclasses.dataclass(frozen=True)
class PickView:
    """What one column of the picks' picture shows."""

    slices: tuple[np.ndarray, np.ndarray]  # (y, x) from above, (z, x) from the side
    motors: np.ndarray  # (n, 3) voxels
    picks: np.ndarray  # (m, 3) voxels, score above the threshold
    centre: np.ndarray  # (3,) voxel that the slices pass through
    spacing_angstrom: np.ndarray  # (3,)
    title: str


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and free it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)


def draw_learning_curve(records: list[dict[str, float]], path: Path) -> None:
    """Training and validation loss beside the validation figures, over optimizer steps."""
    validated = [record for record in records if "validation_loss" in record]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    left.plot(steps, losses, color="0.8", lw=0.8, label="training, single batches")
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(steps[window - 1 :], smooth, color="0.4", lw=1.5, label=f"training, mean of {window}")
    steps = [record["step"] for record in validated]
    left.plot(steps, [r["validation_loss"] for r in validated], color="C0", marker=".", label="validation")
    left.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    for name, label in (("average_precision", "average precision"), ("soft_dice", "soft Dice"),
                        ("top_10_accuracy", "peak among the top 10 cells")):  # fmt: skip
        right.plot(steps, [record[name] for record in validated], label=label, marker=".")
    right.set(xlabel="optimizer step", ylabel="validation patches", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    save_figure(figure, path)


def draw_precision_recall(curves: dict[str, DetectionCurve], at: float, path: Path) -> None:
    """Precision over recall of several methods; a cross marks the first at its threshold."""
    figure, axes = plt.subplots(figsize=(4.6, 4.2))
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(curve.recall, curve.precision, label=name, color=f"C{number}", drawstyle="steps-post")
        if number == 0 and (curve.thresholds >= at).any():
            chosen = int(np.flatnonzero(curve.thresholds >= at)[-1])
            axes.plot(curve.recall[chosen], curve.precision[chosen], "kx", ms=9, label=f"at threshold {at:.2f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), title="test tomograms")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


def draw_picks(shown: list[PickView], tolerance_angstrom: float, path: Path) -> None:
    """The slice through each tomogram's best pick, from above (x-y) and from the side (x-z).

    Green circles: true motors, their radius the C-ring's; orange crosses: picks with their score. Motors and picks
    within 150 angstrom of the slice are drawn.
    """
    figure, axes = plt.subplots(2, len(shown), figsize=(2.6 * len(shown), 4.4), squeeze=False,
                                gridspec_kw={"height_ratios": [3, 1.3]})  # fmt: skip
    for column, view in enumerate(shown):
        for row, (across, horizontal, vertical) in enumerate(((0, 2, 1), (1, 2, 0))):
            panel = axes[row][column]
            image = view.slices[row]
            panel.imshow(image, cmap="gray", interpolation="nearest", aspect="auto" if row else "equal")
            mark_points(panel, view, across, horizontal, vertical)
            panel.set(xticks=[], yticks=[])
        axes[0][column].set_title(view.title, fontsize=7)
    figure.suptitle(f"o true motor   x pick   (a pick within {tolerance_angstrom:g} Å counts)", fontsize=8, y=1.02)
    figure.tight_layout()
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
    title = f"{picked.picks.tomo_id}, {len(scored.truths)} motors\n{score}"
    return PickView((above, side), scored.truths, kept, centre, spacing, title)
