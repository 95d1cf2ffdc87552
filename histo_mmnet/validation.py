"""What a network says of validation composites, every one exactly once on any number of processes."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from common.losses import focal_loss_with_logits
from common.metrics.classification import confusion, roc_auc
from common.parallel import all_ranks_do, gather_objects
from histo_mmnet.composites import Composite
from histo_mmnet.config import Config
from histo_mmnet.members import Network
from histo_mmnet.predictions import ALL, predict
from histo_mmnet.slides import Album

Floats = npt.NDArray[np.float64]


def composite_logits(network: Network, composites: list[Composite], album: Album, config: Config) -> Floats:
    """A logit for each composite (n,), on every rank; the network must be in eval mode. Flips are for eval.py."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(composites), ranks))
    unflipped = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, flips=False))
    found = np.zeros(len(composites))
    found[mine] = all_ranks_do(lambda: predict(network, [composites[k] for k in mine], album, unflipped, (ALL,)).logits)
    total: Floats = np.sum(gather_objects(found), axis=0)
    return total


def micro_batch_size(config: Config, device: torch.device) -> int:
    """Composites at once on this kind of device."""
    sizes = {"cuda": config.train.micro_batch_cuda, "mps": config.train.micro_batch_mps}
    return sizes[device.type] if device.type in sizes else config.train.micro_batch_cpu


def validate(network: Network, composites: list[Composite], album: Album, config: Config) -> dict[str, float]:
    """Loss without smoothing, balanced accuracy at 0.5 and AUC over all validation composites."""
    labels = np.array([composite.slide.label for composite in composites])
    return validation_figures(labels, composite_logits(network, composites, album, config), config)


def validation_figures(labels: npt.NDArray[np.int64], logits: Floats, config: Config) -> dict[str, float]:
    """Of labels (n,) and logits (n,)."""
    x, t = torch.from_numpy(logits)[:, None], torch.from_numpy(labels).double()[:, None]
    return {
        "val_loss": float(focal_loss_with_logits(x, t, config.loss.focal_gamma, 0.0).mean()),
        "val_balanced_accuracy": confusion(labels, logits >= 0).balanced_accuracy,
        "val_auc": roc_auc(labels, logits),
    }
