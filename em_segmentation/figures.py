"""Pictures of a run: validation patches, learning curves, overlays of three planes, maps of splits and merges."""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from torch import Tensor

from common.figures import save_figure
from common.metrics.segmentation import count_overlaps
from common.streams import random_for
from em_segmentation.augmentation import Patch
from em_segmentation.config import Config
from em_segmentation.objective import channel_ranges
from em_segmentation.targets import Target

LEARNING_CURVES = ("train_loss", "val_loss")
GREY_RANGE = (-2.5, 2.5)  # standard deviations shown from black to white
Image = npt.NDArray[np.float32]


def id_colours(labels: npt.NDArray[np.integer], opacity: float) -> npt.NDArray[np.float32]:
    """RGBA of ids: one fixed colour per id, background clear. (y, x) -> (y, x, 4)"""
    ids, number = np.unique(labels, return_inverse=True)
    colours = np.array([random_for("colour", int(k)).uniform(0.15, 1.0, 3) for k in ids], np.float32)
    alpha = np.where(ids == 0, 0.0, opacity).astype(np.float32)
    picture: npt.NDArray[np.float32] = np.concatenate([colours, alpha[:, None]], 1)[number.reshape(labels.shape)]
    return picture


def draw_patch(batch: Patch, logits: Tensor, targets: list[Target], config: Config, path: Path) -> None:
    """The middle section of one validation patch: image, labels, and each target's first channel beside its prediction."""
    z = batch.image.shape[2] // 2
    image = batch.image[0, 0, z].cpu().numpy()
    panels: list[tuple[str, Image, str]] = []
    for (name, channels), target in zip(channel_ranges(config.targets).items(), targets, strict=True):
        own = logits[0, channels]
        if name == "semantic" and config.targets.semantic_classes > 1:
            found = own.argmax(0)[z].float()
        elif name in ("semantic", "boundary", "affinity"):
            found = own[-1, z].sigmoid() if name == "affinity" else own[0, z].sigmoid()
        else:
            found = own[0, z].tanh() if name == "distance" else own[0, z]
        wanted = target.values[0, -1 if name == "affinity" else 0, z]
        panels += [
            (f"{name}: wanted", wanted.cpu().numpy(), "viridis"),
            (f"{name}: found", found.cpu().numpy(), "viridis"),
        ]
    figure, axes = plt.subplots(1, 2 + len(panels), figsize=(3.2 * (2 + len(panels)), 3.4))
    axes[0].imshow(image, cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1])
    axes[0].set_title("image")
    axes[1].imshow(image, cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1])
    axes[1].imshow(id_colours(batch.labels[0, 0, z].cpu().numpy(), 0.5))
    axes[1].set_title("labels")
    for axis, (title, picture, colours) in zip(axes[2:], panels, strict=True):
        axis.imshow(picture, cmap=colours, vmin=min(0.0, float(picture.min())), vmax=max(1.0, float(picture.max())))
        axis.set_title(title)
    for axis in axes:
        axis.set_axis_off()
    save_figure(figure, path)


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


@dataclasses.dataclass(frozen=True)
class Shown:
    """A volume with what is true and what was found, [z, y, x] each; None where there is no such target."""

    image: Image
    voxel_size_nm: tuple[float, float, float]
    true_classes: npt.NDArray[np.uint8] | None
    found_classes: npt.NDArray[np.uint8] | None
    true_ids: npt.NDArray[np.int64] | None
    found_ids: npt.NDArray[np.integer[Any]] | None


def planes_of(shape: tuple[int, ...]) -> list[tuple[str, tuple[int | slice, ...], tuple[int, int]]]:
    """The three middle planes: words, index, and the axes that they show (rows, columns)."""
    z, y, x = (n // 2 for n in shape)
    every = slice(None)
    return [
        (f"section z = {z}", (z, every, every), (1, 2)),
        (f"plane y = {y}", (every, y, every), (0, 2)),
        (f"plane x = {x}", (every, every, x), (0, 1)),
    ]


def draw_overlay(shown: Shown, path: Path) -> None:
    """Rows: the three middle planes; columns: image, then classes and instances, true and found, over the image."""
    layers: list[tuple[str, npt.NDArray[Any]]] = []
    for title, labels in (
        ("true classes", shown.true_classes),
        ("found classes", shown.found_classes),
        ("true instances", shown.true_ids),
        ("found instances", shown.found_ids),
    ):
        if labels is not None:
            layers.append((title, labels))
    planes = planes_of(shown.image.shape)
    figure, axes = plt.subplots(3, 1 + len(layers), figsize=(3.4 * (1 + len(layers)), 9), squeeze=False)
    for row, (words, index, (down, across)) in enumerate(planes):
        aspect = shown.voxel_size_nm[down] / shown.voxel_size_nm[across]
        for column, panel in enumerate(axes[row]):
            panel.imshow(shown.image[index], cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1], aspect=aspect)
            if column:
                panel.imshow(id_colours(layers[column - 1][1][index], 0.55), aspect=aspect, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                panel.set_title(layers[column - 1][0] if column else "image")
        axes[row, 0].set_ylabel(words)
    scale_bar(axes[0, 0], shown.image.shape[2], shown.voxel_size_nm[2])
    save_figure(figure, path)


def scale_bar(panel: Any, width: int, voxel_nm: float) -> None:
    """A bar of a round length, about a fifth of the panel's width."""
    wanted = width * voxel_nm / 5
    length = max(n * 10**k for k in range(8) for n in (1, 2, 5) if n * 10**k <= max(wanted, 1))
    voxels = length / voxel_nm
    y = panel.get_ylim()[0] * 0.95
    panel.plot([width * 0.05, width * 0.05 + voxels], [y, y], color="white", lw=3)
    words = f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
    panel.text(width * 0.05 + voxels / 2, y * 0.97, words, color="white", ha="center", va="bottom", fontsize=8)


def error_colours(truth: npt.NDArray[np.int64], found: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    """RGBA of a volume's errors: red where a found object joins true ones, blue where a true one is cut. (z, y, x, 4)

    A voxel is wrongly joined if its true object is not the one that its found object shares most voxels with, wrongly
    cut if its found object is not the one that its true object shares most with.
    """
    judged = truth > 0
    table = count_overlaps(truth, np.asarray(found, np.int64))
    shared = table.voxels * (table.truth_ids[table.row] > 0)
    main_truth = best_partner(table.column, table.row, shared, len(table.segment_ids))
    main_segment = best_partner(table.row, table.column, shared, len(table.truth_ids))
    t, f = (
        np.searchsorted(table.truth_ids, truth.astype(np.uint64)),
        np.searchsorted(table.segment_ids, found.astype(np.uint64)),
    )
    merged, cut = judged & (main_truth[f] != t), judged & (main_segment[t] != f)
    colours = np.zeros((*truth.shape, 4), np.float32)
    colours[cut] = (0.2, 0.4, 1.0, 0.65)
    colours[merged] = (1.0, 0.15, 0.1, 0.65)
    return colours


def best_partner(
    of: npt.NDArray[np.int64], partner: npt.NDArray[np.int64], shared: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """For each of `count` ids the partner that shares the most voxels; -1 for none."""
    best = np.full(count, -1, np.int64)
    order = np.argsort(shared, kind="stable")
    order = order[shared[order] > 0]
    best[of[order]] = partner[order]  # the last one written stays: the largest
    return best


def draw_errors(shown: Shown, path: Path) -> None:
    """The three middle planes with splits and merges."""
    assert shown.true_ids is not None and shown.found_ids is not None
    colours = error_colours(shown.true_ids, shown.found_ids)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4))
    for panel, (words, index, (down, across)) in zip(axes, planes_of(shown.image.shape), strict=True):
        aspect = shown.voxel_size_nm[down] / shown.voxel_size_nm[across]
        panel.imshow(shown.image[index], cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1], aspect=aspect)
        panel.imshow(colours[index], aspect=aspect, interpolation="nearest")
        panel.set_title(words)
        panel.set_axis_off()
    save_figure(figure, path)
