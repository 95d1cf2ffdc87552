"""The pictures of a run: learning curve, precision-recall curve, picks in their tomograms."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.checkpoint import write_atomically


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and free it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)


def draw_learning_curve(records: list[dict[str, float]], beta: float, path: Path) -> None:
    """Training and validation loss beside the validation figures, over optimizer steps."""
    steps = [record["step"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    left.plot(steps, [record["loss"] for record in records], label="training (one batch)", color="0.6", lw=1)
    left.plot(steps, [record["validation_loss"] for record in records], label="validation", color="C0", marker=".")
    left.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    for name, label in (("f_beta", f"F{beta:g} at its best threshold"), ("soft_dice", "soft Dice"),
                        ("top_10_accuracy", "peak among the top 10 cells")):  # fmt: skip
        right.plot(steps, [record[name] for record in records], label=label, marker=".")
    right.set(xlabel="optimizer step", ylabel="validation patches", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    save_figure(figure, path)
