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
from torch import Tensor, nn

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
    attention: Floats  # (n, 4, 4) of each magnification on the coarser ones; NaN where there is none
    shown_in: npt.NDArray[np.int64]  # (p,) of each photograph, the first composite that shows it
    alone: Floats  # (p,) logits of each photograph by itself


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
    first = photographs_of(composites)
    shown_in = np.array(list(first.values()), np.int64)
    if not composites:  # of one magnification a fold may have none
        none = np.zeros(0)
        return Predictions([], none, np.zeros((0, NUM_SETS)), np.zeros((0, 4)), np.zeros((0, 4, 4)), shown_in, none)
    flips = FLIPS if config.evaluation.flips else FLIPS[:1]
    found = [_predict_flipped(network, composites, list(first), album, config, axes, sets) for axes in flips]
    of_sets, importance, attention, alone = (np.mean([part[k] for part in found], 0) for k in range(4))
    check_finite(of_sets[:, ALL], composites)
    return Predictions(composites, of_sets[:, ALL], of_sets, importance, attention, shown_in, alone)


def photographs_of(composites: list[Composite]) -> dict[tuple[Path, int], int]:
    """Every photograph with its magnification's place -> the first composite that shows it; ordered by name."""
    found: dict[tuple[Path, int], int] = {}
    for k, composite in enumerate(composites):
        for path, m in zip(composite.paths, composite.magnification, strict=True):
            if path is not None:
                found.setdefault((path, m), k)
    return dict(sorted(found.items()))


def _predict_flipped(
    network: Network,
    composites: list[Composite],
    photographs: list[tuple[Path, int]],
    album: Album,
    config: Config,
    axes: tuple[int, ...],
    sets: Sequence[int],
) -> tuple[Floats, Floats, Floats, Floats]:
    """Predictions' of_sets, importance, attention and alone for images that are flipped along axes."""
    device, precision = next(network.parameters()).device, config.train.precision
    place = {photograph: at for at, photograph in enumerate(photographs)}
    vectors = image_vectors(network, photographs, album, config, axes, device)  # (p, C)
    of_sets, importance = np.full((len(composites), NUM_SETS), np.nan), np.full((len(composites), 4), np.nan)
    attention = np.full((len(composites), 4, 4), np.nan)
    for first in range(0, len(composites), AT_ONCE):
        own = composites[first : first + AT_ONCE]
        index = torch.full((len(own), max(len(c.paths) for c in own)), -1, device=device)
        magnification = torch.zeros_like(index)
        for row, c in enumerate(own):
            index[row, : len(c.paths)] = torch.tensor(
                [-1 if p is None else place[p, m] for p, m in zip(c.paths, c.magnification, strict=True)]
            )
            magnification[row, : len(c.paths)] = torch.tensor(c.magnification)
        slots = torch.where((index >= 0)[..., None], vectors[index.clamp(min=0)], 0.0)
        for number in sets:
            present = (index >= 0) & ((number >> magnification) & 1).bool()
            rows = present.any(1).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            with autocast(device, precision):
                result: tuple[Tensor, ...] = network.fused(slots[rows], present[rows])
            at = first + rows.cpu().numpy()
            of_sets[at, number] = result[0].cpu().double().numpy()
            if number == ALL and isinstance(network, MMNet):
                importance[at] = result[1].cpu().double().numpy()
                attention[at] = result[2].cpu().double().numpy()
    return of_sets, importance, attention, _alone(network, vectors, [m for _, m in photographs], precision)


def _alone(network: Network, vectors: Tensor, magnification: list[int], precision: str) -> Floats:
    """Logits (p,) of photographs by themselves, of vectors (p, C) and their magnifications' places."""
    present = nn.functional.one_hot(torch.tensor(magnification), len(MAGNIFICATIONS)).bool().to(vectors.device)
    found = []
    for first in range(0, len(vectors), AT_ONCE):
        own = present[first : first + AT_ONCE]
        slots = torch.where(own[..., None], vectors[first : first + AT_ONCE, None], 0.0)  # (n, 4, C)
        with autocast(vectors.device, precision):
            found.append(network.fused(slots, own)[0].cpu().double().numpy())
    return np.concatenate(found)


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


def check_finite(logits: Floats, composites: list[Composite]) -> None:
    """A data error where a network says nothing of a composite: a figure without it would be of other patients."""
    lost = [composite for composite, logit in zip(composites, logits, strict=True) if not np.isfinite(logit)]
    if lost:
        shown = ", ".join(path.name for path in lost[0].paths if path is not None)
        raise data_error(
            f"the network gives no number for {len(lost)} of {len(composites)} composites, the first of {shown}; it diverged: "
            "lower train.learning_rate, or train with train.precision=float32"
        )


def probability(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)); NaN stays."""
    x = np.clip(logits, -500, 500)
    return np.asarray(1 / (1 + np.exp(-x)), np.float64)
