"""Validation on patches: every patch scored exactly once, on any number of processes, with the averaged weights."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from common.errors import data_error
from common.interrupt import ignore_interrupts
from common.loading import next_batch
from common.metrics.detection import ScoredTomogram, average_precision, precision_recall_curve
from common.metrics.heatmaps import comprehensive_heatmap_metric, peak_sharpness, soft_dice_score, topk_accuracy
from common.parallel import all_ranks_do, gather_objects
from common.precision import autocast
from motor_detection.augmentation import plain_batch
from motor_detection.config import Config
from motor_detection.dataset import Patches, PatchList, Sample, stack, to_device
from motor_detection.losses import heatmap_loss
from motor_detection.peaks import find_peaks

# Constants of the measure, not of config: two runs are compared by it, whatever they change at inference.
TOLERANCE_SIGMAS = 2.0  # of the heat map: how far off a pick still counts (400 Å; 1000 Å is most of a small patch)
MIN_DISTANCE_SIGMAS = 1.5  # between two picks: 300 Å
MIN_SCORE = 0.02
MAX_PICKS = 50
MIN_PEAK = 0.1  # of a target: below it a patch holds no motor whose place could be found
PEAK_SCALE_CELLS = 60.0  # of the comprehensive heat-map metric, as published
TOP_CELLS = 10  # of the top-k accuracy
FIGURES = ("validation_loss", "soft_dice", "heatmap_metric", "top_10_accuracy", "peak_sharpness")

Row = tuple[int, list[float], ScoredTomogram]  # a patch's number, its FIGURES, its picks beside its motors


@torch.inference_mode()
def validate(model: nn.Module, patches: Patches, config: Config, device: torch.device) -> dict[str, float]:
    """Loss, heat-map metrics and detection over all validation patches.

    average_precision is that of all picks, matched one to one within two sigma of the heat map: the metric that decides
    which weights are best.
    """
    rows = all_ranks_do(lambda: score_own_patches(model, patches, config, device))
    together = sorted((row for part in gather_objects(rows) for row in part), key=lambda row: row[0])
    tolerance = TOLERANCE_SIGMAS * config.heatmap.sigma_angstrom
    picked = [row[2] for row in together]
    curve = all_ranks_do(lambda: precision_recall_curve(picked, tolerance, 1.0))  # average precision needs no beta
    scores = np.array([row[1] for row in together])
    figures = {name: float(np.nanmean(scores[:, column])) for column, name in enumerate(FIGURES)}
    return figures | {"average_precision": average_precision(curve)}


def score_own_patches(model: nn.Module, patches: Patches, config: Config, device: torch.device) -> list[Row]:
    """Rows of this rank's share of the validation patches."""
    mine = list(range(dist.get_rank(), len(patches.validation), dist.get_world_size()))
    loader = DataLoader(
        Subset(PatchList(patches.validation, patches.patch_size, patches.max_motors), mine),
        batch_size=config.train.micro_batch_size,
        num_workers=config.train.workers,
        collate_fn=stack,
        worker_init_fn=ignore_interrupts,
    )
    rows: list[Row] = []
    for host_batch in next_batch(loader, "train.workers"):
        batch = to_device(host_batch, device)
        images, heat = plain_batch(batch, config.heatmap.sigma_angstrom, config.model.stride)
        with autocast(device, config.train.precision):
            logits = model(images.contiguous(memory_format=torch.channels_last_3d)).float()
        if not torch.isfinite(logits).all():
            raise data_error("train: the validation output is not finite; lower the learning rates")
        rows += score_patches(host_batch, logits, heat, config)
    return rows


def score_patches(batch: Sample, logits: Tensor, heat: Tensor, config: Config) -> list[Row]:
    """The rows of one validation batch; logits and heat (B, 1, z, y, x cells)."""
    probabilities = logits.sigmoid()
    has_peak = heat.flatten(1).amax(1) >= MIN_PEAK
    figures = torch.stack(
        [
            heatmap_loss(logits, heat, config.loss),
            soft_dice_score(probabilities, heat).where(has_peak, torch.nan),
            comprehensive_heatmap_metric(probabilities, heat, PEAK_SCALE_CELLS, MIN_PEAK),
            topk_accuracy(probabilities, heat, TOP_CELLS, MIN_PEAK),
            peak_sharpness(probabilities).where(has_peak, torch.nan),
        ],
        1,
    ).tolist()
    return [
        (index, figures[number], picks_of_patch(probabilities[number, 0].cpu().numpy(), batch, number, config))
        for number, index in enumerate(batch.index.tolist())
    ]


def picks_of_patch(heat: npt.NDArray[np.float32], batch: Sample, number: int, config: Config) -> ScoredTomogram:
    """The picks of one patch beside the motors inside it.

    A motor just outside reaches into the patch with its tail, and a pick there is right: such picks count neither way.
    """
    sigma = config.heatmap.sigma_angstrom
    spacing = batch.spacing_angstrom[number].double().numpy()
    min_distance = MIN_DISTANCE_SIGMAS * sigma
    peaks = find_peaks(heat, config.model.stride, spacing, sigma, min_distance, MIN_SCORE, MAX_PICKS)
    motors = batch.motors[number].double().numpy()
    motors = motors[~np.isnan(motors).any(1)]
    inside = ((motors >= -0.5) & (motors <= np.array(batch.voxels.shape[2:]) - 0.5)).all(1)
    gaps = np.linalg.norm((peaks.points[:, None] - motors) * spacing, axis=2) <= TOLERANCE_SIGMAS * sigma  # (n, m)
    counts = gaps[:, inside].any(1) | ~gaps[:, ~inside].any(1)
    return ScoredTomogram(peaks.points[counts], peaks.scores[counts], motors[inside], spacing)
