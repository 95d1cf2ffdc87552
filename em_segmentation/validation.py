"""Validation on fixed patches: each seen exactly once, on any number of processes, with the averaged weights."""

import difflib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from common.errors import UserError, config_error, data_error
from common.interrupt import ignore_interrupts
from common.loading import next_batch
from common.parallel import all_ranks_do, gather_objects
from em_segmentation.augmentation import Patch
from em_segmentation.config import Config, Targets
from em_segmentation.dataset import PatchList, Volumes, stack, to_device, validation_places, validation_size
from em_segmentation.figures import draw_patch
from em_segmentation.objective import build_targets, channel_ranges, forward, loss_of
from em_segmentation.targets import Target

Row = dict[str, float]  # of one patch: its number, its loss, and counts or sums per target


def possible_figures(settings: Targets) -> dict[str, str]:
    """The names that a validation's figures have, and whether the least ("min") or the most ("max") is best."""
    per_target = {
        "semantic": {"val_dice": "max", "val_jaccard": "max"},
        "boundary": {"val_boundary_dice": "max"},
        "affinity": {"val_cut_f1": "max"},
        "distance": {"val_distance_error": "min"},
        "centre": {"val_centre_error": "min"},
        "lsd": {"val_lsd_error": "min"},
    }
    figures = {"val_loss": "min"}
    for name in settings.names:
        figures |= per_target[name]
    return figures


def check_monitors(config: Config, validated: bool) -> None:
    """A config error for a monitor that is no figure of these targets, or whose mode is the wrong way round.

    validated: whether there are validation volumes; without them monitors are ignored, and nothing can reach a plateau.
    """
    if not validated:
        if config.scheduler.name == "plateau":
            raise config_error(
                "scheduler.name: plateau follows a validation; give data.val_image, or another scheduler"
            )
        return
    figures, problems = possible_figures(config.targets), []
    for section, settings in (("checkpoint", config.checkpoint), ("early_stopping", config.early_stopping)):
        if settings.monitor not in figures:
            close = difflib.get_close_matches(settings.monitor, figures, 1, 0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(
                f"{section}.monitor: validation has no {settings.monitor}; expected {', '.join(figures)}{hint}"
            )
        elif settings.mode != figures[settings.monitor]:
            best = figures[settings.monitor]
            problems.append(
                f"{section}.mode: the {'least' if best == 'min' else 'highest'} {settings.monitor} is best; "
                f"expected {best}, got {settings.mode}"
            )
    if problems:
        raise config_error(*problems)


def num_readers(config: Config) -> int:
    """data.num_workers, but not more than there are processors; no bit depends on it."""
    return min(config.data.num_workers, os.cpu_count() or 1)


def validation_loader(volumes: Volumes, config: Config) -> DataLoader[Patch | UserError]:
    """This rank's share of the validation patches."""
    size = validation_size(volumes.val, config.data.patch_size) if volumes.val else config.data.patch_size
    places = validation_places(volumes.val, size, config.data.val_patches)
    mine = list(range(dist.get_rank(), len(places), dist.get_world_size()))
    return DataLoader(
        Subset(PatchList(volumes.val, places, size), mine),
        batch_size=1,  # so that no figure depends on how many processes share the patches
        num_workers=num_readers(config),
        persistent_workers=config.data.persistent_workers and num_readers(config) > 0,
        collate_fn=stack,
        worker_init_fn=ignore_interrupts,
    )


@torch.inference_mode()
def validate(
    model: nn.Module, loader: DataLoader[Patch | UserError], volumes: Volumes, config: Config, folder: Path
) -> dict[str, float]:
    """Loss and figures over all validation patches; none without validation volumes.

    Dice and Jaccard pool all voxels (of several classes: their mean over the foreground classes); cut F1 is that of
    edges between different objects; errors are mean absolute ones. loader: validation_loader's, on every rank.
    """
    if not volumes.val:
        return {}
    rows = all_ranks_do(lambda: score_own_patches(model, loader, volumes, config, folder))
    together = sorted((row for part in gather_objects(rows) for row in part), key=lambda row: row["patch"])
    return figures_of(together, config.targets)


def score_own_patches(
    model: nn.Module, loader: DataLoader[Patch | UserError], volumes: Volumes, config: Config, folder: Path
) -> list[Row]:
    """Rows of this rank's share of the validation patches; the first patch is drawn into figures/validation.png."""
    device = next(model.parameters()).device
    rows: list[Row] = []
    for host_batch in next_batch(loader, "data.num_workers"):
        batch = to_device(host_batch, device)
        targets = build_targets(batch, config.targets, volumes.voxel_size_nm)
        logits = forward(model, batch.image, config.training.precision)[0].float()
        loss = loss_of([logits], targets, config)[0].item()
        if not math.isfinite(loss) or not torch.isfinite(logits).all():
            raise data_error("train: the validation output is not finite; lower optimizer.lr")
        rows.append(score_patch(batch, logits, targets, config.targets) | {"val_loss": loss})
        if config.logging.pictures and rows[-1]["patch"] == 0:
            draw_patch(batch, logits, targets, config, folder / "figures" / "validation.png")
    return rows


def score_patch(batch: Patch, logits: Tensor, targets: list[Target], settings: Targets) -> Row:
    """Counts and sums of one patch (batch of one), from which figures_of makes figures."""
    row: Row = {"patch": float(batch.position[0]), "annotated": float(batch.annotated.sum())}
    for (name, channels), target in zip(channel_ranges(settings).items(), targets, strict=True):
        own = logits[:, channels]
        valid = target.valid.expand_as(target.values)
        if name in ("semantic", "boundary", "affinity"):
            for key, (truth, found) in masks_of(name, own, target.values, settings).items():
                row[f"{name} {key} both"] = float((truth & found & valid).sum())
                row[f"{name} {key} truth"] = float((truth & valid).sum())
                row[f"{name} {key} found"] = float((found & valid).sum())
        else:
            output = own.tanh() if name == "distance" else own
            row[f"{name} error"] = float(((output - target.values).abs() * valid).sum())
            row[f"{name} voxels"] = float(valid.sum())
    return row


def masks_of(name: str, logits: Tensor, values: Tensor, settings: Targets) -> dict[str, tuple[Tensor, Tensor]]:
    """What a target's masks are called, and each as truth and as found (1, C, z, y, x): cut edges of affinities."""
    if name == "semantic" and settings.semantic_classes > 1:
        classes = logits.argmax(1, keepdim=True)
        return {f"class {k}": (values == k, classes == k) for k in range(1, settings.semantic_classes)}
    if name == "affinity":
        return {"cut": (values < 0.5, logits < 0)}
    return {"mask": (values > 0.5, logits > 0)}


def figures_of(rows: list[Row], settings: Targets) -> dict[str, float]:
    """The figures of a validation from its patches' rows."""
    totals = {name: sum(row[name] for row in rows) for name in rows[0]}
    if not totals["annotated"]:
        raise data_error("data.val_mask: no voxel of the validation patches is annotated; expected some to judge")
    figures = {"val_loss": totals["val_loss"] / len(rows)}
    for name in settings.names:
        if name in ("semantic", "boundary", "affinity"):
            keys = [key.removesuffix(" both") for key in totals if key.startswith(f"{name} ") and key.endswith(" both")]
            sums = np.array([[totals[f"{key} {part}"] for part in ("both", "truth", "found")] for key in keys])
            both, either = sums[:, 0], sums[:, 1] + sums[:, 2]
            dice = float(np.where(either > 0, 2 * both / np.maximum(either, 1), 1.0).mean())
            jaccard = float(np.where(either > 0, both / np.maximum(either - both, 1), 1.0).mean())
            if name == "semantic":
                figures |= {"val_dice": dice, "val_jaccard": jaccard}
            else:
                figures["val_boundary_dice" if name == "boundary" else "val_cut_f1"] = dice
        else:
            figures[f"val_{name}_error"] = totals[f"{name} error"] / max(1.0, totals[f"{name} voxels"])
    return figures
