"""What a trained network says of every composite: for all magnifications, and for each set of them.

Every photograph passes the backbone once; the composites of any of the 15 sets of magnifications are then put together from
its vectors.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.checkpoint import load_checkpoint, load_weights
from common.config import restore
from common.errors import data_error
from common.precision import autocast
from histo_mmnet.augmentation import standardised
from histo_mmnet.composites import Composite
from histo_mmnet.config import BREAKHIS, Config
from histo_mmnet.members import KIND, Member, Network, build_network
from histo_mmnet.model_defs.mmnet import MMNet
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.slides import Album
from histo_mmnet.validation import check_finite

Floats = npt.NDArray[np.float64]
NUM_SETS = 2 ** len(MAGNIFICATIONS)  # of magnifications, by bits: bit m is MAGNIFICATIONS[m]; 0 is the empty one
ALL = NUM_SETS - 1  # whatever there is
FLIPS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3))  # of axes y and x
AT_ONCE = 16  # images, and composites, that pass a network at once


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Logits of composites; NaN for a set of which a composite shows nothing."""

    composites: list[Composite]
    logits: Floats  # (n,) of all that is there
    of_sets: Floats  # (n, 16)
    importance: Floats  # (n, 4) that the network gave each magnification; NaN where it gives none


def load_member(path: Path, member: Member, device: torch.device) -> tuple[Network, Config]:
    """The best weights of a member in eval mode, and the config they were trained with."""
    saved = load_checkpoint(path, KIND, {"config": str, "identity": str, "weights": dict})
    config = restore(BREAKHIS, saved["config"], path)
    if f"member: {member.name} of trial {member.fold}\n" not in saved["identity"]:
        raise data_error(f"{path}: holds other weights than {member.name} of fold {member.fold}; restore the file")
    without_file = dataclasses.replace(config.model, pretrained=None)
    network = build_network(member, without_file)
    load_weights(network, saved["weights"], path)
    return network.eval().to(device), config


@torch.inference_mode()
def predict(
    network: Network, composites: list[Composite], album: Album, config: Config, sets: Sequence[int]
) -> Predictions:
    """Logits of all composites with sets of their magnifications, flips averaged where the config says so.

    sets: numbers of those that are wanted; the others are NaN.
    """
    if not composites:  # of one magnification a fold may have none
        return Predictions([], np.zeros(0), np.zeros((0, NUM_SETS)), np.zeros((0, 4)))
    flips = FLIPS if config.evaluation.flips else FLIPS[:1]
    found = [_predict_flipped(network, composites, album, config, axes, sets) for axes in flips]
    logits, of_sets, importance = (np.mean([part[k] for part in found], 0) for k in range(3))
    check_finite(logits, composites)
    return Predictions(composites, logits, of_sets, importance)


def _predict_flipped(
    network: Network,
    composites: list[Composite],
    album: Album,
    config: Config,
    axes: tuple[int, ...],
    sets: Sequence[int],
) -> tuple[Floats, Floats, Floats]:
    """Predictions' three arrays for images that are flipped along axes."""
    device = next(network.parameters()).device
    paths = sorted({(path, slot) for c in composites for slot, path in enumerate(c.paths) if path is not None})
    place = {path: at for at, (path, _) in enumerate(paths)}
    vectors = image_vectors(network, paths, album, config, axes, device)
    index = torch.tensor(
        [[place[path] if path is not None else -1 for path in c.paths] for c in composites], device=device
    )
    logits, importance = np.full((len(composites), NUM_SETS), np.nan), np.full((len(composites), 4), np.nan)
    for first in range(0, len(composites), AT_ONCE):
        own = index[first : first + AT_ONCE]
        slots = torch.where((own >= 0)[..., None], vectors[own.clamp(min=0)], 0.0)
        for number in sets:
            chosen = torch.tensor([bool(number >> m & 1) for m in range(4)], device=device)
            present = (own >= 0) & chosen
            rows = present.any(1).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            with autocast(device, config.train.precision):
                result: tuple[Tensor, ...] = network.fused(slots[rows], present[rows])
            at = first + rows.cpu().numpy()
            logits[at, number] = result[0].double().cpu().numpy()
            if number == ALL and isinstance(network, MMNet):
                importance[at] = result[1].double().cpu().numpy()
    return logits[:, ALL], logits, importance


def image_vectors(
    network: Network,
    paths: list[tuple[Path, int]],
    album: Album,
    config: Config,
    axes: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """A vector (n, C) float32 for each photograph and its magnification's place."""
    found: list[Tensor] = []
    for first in range(0, len(paths), AT_ONCE):
        own = paths[first : first + AT_ONCE]
        pixels = torch.from_numpy(np.stack([album.read(path) for path, _ in own])).permute(0, 3, 1, 2).to(device)
        images = standardised(pixels.float() / 255).flip(axes)
        with autocast(device, config.train.precision):
            found.append(network.vectors(images, torch.tensor([slot for _, slot in own], device=device)).float())
    return torch.cat(found)


def probability(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)); NaN stays."""
    x = np.clip(logits, -500, 500)
    return np.asarray(1 / (1 + np.exp(-x)), np.float64)
