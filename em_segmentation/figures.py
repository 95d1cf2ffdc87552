"""Pictures of a run: a validation patch, learning curves, how thresholds were chosen."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from torch import Tensor

from common.figures import save_figure
from em_segmentation.augmentation import Patch
from em_segmentation.config import Config
from em_segmentation.evaluation import Curve
from em_segmentation.objective import channel_ranges
from em_segmentation.overlays import GREY_RANGE, class_colour, id_colours, numbered, outlined
from em_segmentation.targets import Target

LEARNING_CURVES = ("train_loss", "val_loss")


def draw_patch(batch: Patch, logits: Tensor, targets: list[Target], config: Config, path: Path) -> None:
    """The middle section of one validation patch: image and labels; a channel of each target, wanted and found.

    Grey: does not count (edges that leave the patch, voxels that are not annotated). Classes have the colours of overlays.
    """
    z = batch.image.shape[2] // 2
    image = batch.image[0, 0, z].cpu().numpy()
    ranges = channel_ranges(config.targets)
    size = config.data.voxel_size_nm
    shape, aspect = image.shape, 1.0 if size is None else size[1] / size[2]
    high = min(6.0, 2.9 * aspect * shape[0] / shape[1])
    columns = 1 + len(ranges)
    figure, axes = plt.subplots(2, columns, figsize=(2.9 * columns, 2 * high + 0.6), layout="constrained")
    for axis in axes[:, 0]:
        axis.imshow(image, cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1], aspect=aspect)
    ids, labels = numbered(batch.labels[0, 0, z].cpu().numpy())
    colours = np.concatenate([np.zeros((1, 3)), id_colours(ids[1:])])
    over = outlined(labels, (aspect, 1.0), colours, 0.4)
    axes[1, 0].imshow(over, extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5), aspect=aspect)
    axes[0, 0].set_title("image")
    axes[1, 0].set_title("labels")
    for column, ((name, channels), target) in enumerate(zip(ranges.items(), targets, strict=True), 1):
        title, found, wanted = shown_channel(name, logits[0, channels, z], target.values[0, :, z], config)
        valid = target.valid.expand_as(target.values)[0, -1 if name == "affinity" else 0, z].cpu().numpy()
        low, high = min(0.0, float(wanted.min())), max(1.0, float(wanted.max()))
        map_of_colours = colormaps["viridis"].with_extremes(bad="0.5")  # grey: does not count
        if title == "classes":
            numbers = range(config.targets.semantic_classes)
            map_of_colours = ListedColormap(["black", *map(class_colour, numbers[1:])]).with_extremes(bad="0.5")
            low, high = -0.5, len(numbers) - 0.5
        for axis, values, words in zip(axes[:, column], (wanted, found), ("wanted", "found"), strict=True):
            counted = np.ma.masked_where(~valid, values.float().cpu().numpy())
            axis.imshow(counted, cmap=map_of_colours, vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
            axis.set_title(f"{title}: {words}")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save_figure(figure, path)


def shown_channel(name: str, logits: Tensor, wanted: Tensor, config: Config) -> tuple[str, Tensor, Tensor]:
    """Title, found and wanted (y, x) of the channel that tells most of a target; logits and wanted (C, y, x)."""
    if name == "semantic" and config.targets.semantic_classes > 1:
        return "classes", logits.argmax(0), wanted[0]
    if name == "affinity":
        return f"affinity {list(config.targets.affinity_offsets[-1])}", logits[-1].sigmoid(), wanted[-1]
    if name == "distance":
        return name, logits[0].tanh(), wanted[0]
    return name, logits[0].sigmoid() if name in ("semantic", "boundary") else logits[0], wanted[0]


def draw_learning_curve(records: list[dict[str, float]], path: Path) -> None:
    """Losses over steps, and every other validation figure below."""
    names = list(dict.fromkeys(name for record in records for name in record))
    others = [name for name in names if name.startswith("val_") and name not in LEARNING_CURVES]
    figure, grid = plt.subplots(2 if others else 1, 1, sharex=True, figsize=(7, 6 if others else 3.4), squeeze=False)
    axes = grid[:, 0]
    for axis, group in zip(axes, (LEARNING_CURVES, others), strict=False):
        for name in group:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 60 else ""
                )
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss")
    axes[-1].set_xlabel("optimizer step")
    save_figure(figure, path)


def draw_thresholds(curves: list[Curve], path: Path) -> None:
    """Validation figures over the thresholds that were tried, the chosen one marked; one panel per figure."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.2), squeeze=False, layout="constrained")
    for axis, curve in zip(axes[0], curves, strict=True):
        order = np.argsort(curve.thresholds)
        thresholds = np.array(curve.thresholds)[order]
        values = np.array(curve.values)[order]
        chosen = (curve.chosen, curve.values[curve.thresholds.index(curve.chosen)])
        axis.plot(thresholds, values, color="#0072b2", marker="." if len(values) < 60 else "")
        axis.plot(*chosen, marker="o", ms=9, mfc="none", mec="#d55e00", mew=2)
        words = f"{curve.name} on validation\n{chosen[1]:.3f} at {chosen[0]}"
        axis.set(xlabel="threshold (255: certain)", title=words, xlim=(0, 255))
        axis.margins(y=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    save_figure(figure, path)
