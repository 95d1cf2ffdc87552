"""Predictions for composites, every one exactly once on any number of processes."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

from common.errors import data_error
from common.interrupt import ignore_interrupts
from common.loading import next_batch
from common.losses import focal_loss_with_logits
from common.metrics.classification import confusion, roc_auc
from common.parallel import gather_objects
from common.precision import autocast
from histo_mmnet.augmentation import prepared
from histo_mmnet.composites import Composite
from histo_mmnet.config import Config
from histo_mmnet.dataset import CompositeList, stack
from histo_mmnet.members import Network
from histo_mmnet.slides import Album

Floats = npt.NDArray[np.float64]


@torch.inference_mode()
def composite_logits(network: Network, composites: list[Composite], album: Album, config: Config) -> Floats:
    """A logit for each composite (n,), on every rank; the network must be in eval mode."""
    device = next(network.parameters()).device
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(composites), ranks))
    loader = DataLoader(
        Subset(CompositeList(composites, album), mine),
        batch_size=micro_batch_size(config, device),
        num_workers=config.train.workers,
        collate_fn=stack,
        worker_init_fn=ignore_interrupts,
    )
    found = np.zeros(len(composites))
    for batch in next_batch(loader, "train.workers"):
        batch = batch.mapped(lambda part: part.to(device))
        with autocast(device, config.train.precision):
            logits = network(prepared(batch), batch.magnification, batch.present)
        found[batch.index.cpu().numpy()] = logits.double().cpu().numpy()
    total: Floats = np.sum(gather_objects(found), axis=0)
    check_finite(total, composites)
    return total


def check_finite(logits: Floats, composites: list[Composite]) -> None:
    """A data error where a network says nothing of a composite: a figure without it would be of other patients."""
    lost = [composite for composite, logit in zip(composites, logits, strict=True) if not np.isfinite(logit)]
    if lost:
        shown = ", ".join(path.name for path in lost[0].paths if path is not None)
        raise data_error(
            f"the network gives no number for {len(lost)} of {len(composites)} composites, the first of {shown}; it diverged: "
            "lower train.learning_rate, or train with train.precision=float32"
        )


def micro_batch_size(config: Config, device: torch.device) -> int:
    """Composites at once on this kind of device."""
    sizes = {"cuda": config.train.micro_batch_cuda, "mps": config.train.micro_batch_mps}
    return sizes[device.type] if device.type in sizes else config.train.micro_batch_cpu


def validate(network: Network, composites: list[Composite], album: Album, config: Config) -> dict[str, float]:
    """Loss without smoothing, balanced accuracy at 0.5 and AUC over all validation composites."""
    labels = np.array([composite.slide.label for composite in composites])
    return validation_figures(labels, composite_logits(network, composites, album, config), config)


def validation_figures(labels: npt.NDArray[np.int64], logits: Floats, config: Config) -> dict[str, float]:
    x, t = torch.from_numpy(logits)[:, None], torch.from_numpy(labels).double()[:, None]
    return {
        "val_loss": float(focal_loss_with_logits(x, t, config.loss.focal_gamma, 0.0).mean()),
        "val_balanced_accuracy": confusion(labels, logits >= 0).balanced_accuracy,
        "val_auc": roc_auc(labels, logits),
    }
