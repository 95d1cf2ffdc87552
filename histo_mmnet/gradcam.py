"""Grad-CAM in all photographs of a composite at once, and whether what it marks matters.

A map is relu(sum_c w_c A_c), w_c the mean gradient of the decision with respect to channel c of a layer's output A (Selvaraju
et al. 2017); the four photographs share one backward pass, so their maps are of one scale. Faithfulness after Petsiuk et al.
2018 (RISE): the probability of the decision while the marked pixels are taken away, most marked first, and while they are put
back on a blurred picture; areas under both curves, beside those of a random order.
"""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.errors import config_error
from common.figures import save_figure
from common.files import write_text
from common.precision import autocast
from common.streams import random_for
from histo_mmnet.augmentation import prepared
from histo_mmnet.composites import Composite
from histo_mmnet.config import Config
from histo_mmnet.dataset import stacked
from histo_mmnet.judging import FoldVerdict, Verdict
from histo_mmnet.members import Network
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.predictions import load_member, probability
from histo_mmnet.results import as_csv
from histo_mmnet.slides import Album
from histo_mmnet.trainer import Files

STEPS = 10  # of taking away and putting back
BLURRED = 9  # pixels of the mean that stands for nothing
PER_FOLD = 1  # patients of each class that are drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
    """A composite's maps and how faithful they are."""

    composite: Composite
    logit: float
    maps: npt.NDArray[np.float64]  # (4, y, x) of the photographs' size, 0..1 over all four; 0 where there is none
    deletion: float  # area under the probability of the decision, lower is better
    insertion: float  # higher is better
    random_deletion: float
    random_insertion: float


def hooked_modules(network: Network, layer: str) -> list[nn.Module]:
    """The modules whose output is looked at: the named one of every backbone, or all backbones' last map for ""."""
    if not layer:
        return [network.extractors]
    found = []
    for backbone in network.extractors.backbones:
        names = [name for name, _ in backbone.named_modules() if name]
        if layer not in names:
            there = ", ".join(name for name in names if name.count(".") < 2)
            raise config_error(f"evaluation.gradcam_layer: no {layer!r} in the backbone; expected one of {there}")
        found.append(backbone.get_submodule(layer))
    return found


def activation_maps(
    network: Network, images: Tensor, magnification: Tensor, present: Tensor, layer: str, precision: str
) -> tuple[Tensor, float]:
    """Grad-CAM (4, h, w) of one composite (1, 4, 3, y, x) for its decision, and the logit; empty slots are 0."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert output.dim() == 4, f"Expected a layer of maps (N, C, h, w), got {tuple(output.shape)}"
        outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in hooked_modules(network, layer)]
    try:
        with torch.enable_grad(), autocast(images.device, precision):
            logit = network(images.requires_grad_(), magnification, present)[0]
        gradients = torch.autograd.grad(logit if logit > 0 else -logit, outputs)
    finally:
        for handle in handles:
            handle.remove()
    maps = torch.cat([
        (gradient.float().mean((2, 3), keepdim=True) * output.detach().float()).sum(1).clamp(min=0)
        for gradient, output in zip(gradients, outputs, strict=True)
    ])  # (present slots, h, w), in order of magnification  # fmt: skip
    slots = maps.new_zeros(present.shape[1], *maps.shape[1:])
    slots[present[0]] = maps
    return slots, float(logit.detach())


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (4, h, w) at the photographs' size, the largest value of all 1."""
    large = nn.functional.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return large / large.max().clamp(min=1e-12)


@torch.no_grad()
def decision_curves(
    network: Network,
    images: Tensor,
    magnification: Tensor,
    present: Tensor,
    order: Tensor,
    logit: float,
    precision: str,
) -> tuple[float, float]:
    """Areas under the decision's probability while pixels are taken away and put back; order (4, y, x): high goes first."""
    pooled = nn.functional.avg_pool2d(images[0], BLURRED, 1, BLURRED // 2, count_include_pad=False)[None]
    rank = order.flatten(1).argsort(1, descending=True).argsort(1).view_as(order)  # 0 = first
    curves = []
    for takes_away in (True, False):
        values = []
        for step in range(STEPS + 1):
            gone = rank < step / STEPS * order[0].numel()  # (4, y, x)
            marked = gone[None, :, None]
            shown = torch.where(marked, pooled, images) if takes_away else torch.where(marked, images, pooled)
            with autocast(images.device, precision):
                value = float(network(shown, magnification, present)[0])
            p = float(probability(np.array([value if logit > 0 else -value]))[0])
            values.append(p)
        curves.append(float(np.trapezoid(values, dx=1 / STEPS)))
    return curves[0], curves[1]


def explain(network: Network, composite: Composite, album: Album, config: Config, seed: int) -> Explained:
    """Maps and faithfulness of one composite."""
    device, precision = next(network.parameters()).device, config.train.precision
    batch = stacked(composite.paths, album, composite.slide.label, 0).mapped(lambda part: part.to(device))
    images = prepared(batch)
    maps, logit = activation_maps(
        network, images, batch.magnification, batch.present, config.evaluation.gradcam_layer, precision
    )
    images = images.detach()
    large = enlarged(maps, album.size)
    chance = torch.from_numpy(random_for("random order", seed).random(large.shape)).to(large)
    curves = [
        decision_curves(network, images, batch.magnification, batch.present, order, logit, precision)
        for order in (large, chance)
    ]
    shown = np.asarray(large.double().cpu().numpy(), np.float64)
    return Explained(composite, logit, shown, curves[0][0], curves[0][1], curves[1][0], curves[1][1])


def chosen_composites(fold: FoldVerdict) -> list[Composite]:
    """The first composite of some patients of each class, each patient once."""
    chosen: list[Composite] = []
    for label in (0, 1):
        seen: dict[str, Composite] = {}
        for composite in fold.predictions.composites:
            if composite.slide.label == label:
                seen.setdefault(composite.slide.accession, composite)
        chosen += list(seen.values())[:PER_FOLD]
    return chosen


def draw_gradcams(verdict: Verdict, config: Config, folder: Path, device: torch.device) -> list[tuple[Path, str]]:
    """A picture per chosen patient in gradcam/, scores in results/gradcam_scores.csv; returns pictures and their words."""
    album, pictures, rows = Album.of(config), [], []
    for fold in verdict.folds:
        network, trained = load_member(Files.of(folder, fold.member).best, fold.member, device)
        used = dataclasses.replace(trained, evaluation=config.evaluation)
        for composite in chosen_composites(fold):
            found = explain(network, composite, album, used, config.evaluation.seed)
            path = folder / "gradcam" / f"fold_{fold.member.fold}_{composite.slide.accession}.png"
            draw_explained(found, album, fold.threshold, path)
            rows.append({"fold": fold.member.fold, "accession": composite.slide.accession, "label": composite.slide.label,
                         "probability": round(float(probability(np.array([found.logit]))[0]), 4),
                         **{name: round(getattr(found, name), 4)
                            for name in ("deletion", "random_deletion", "insertion", "random_insertion")}})  # fmt: skip
            pictures.append((path, caption(found)))
    write_text(folder / "results" / "gradcam_scores.csv", as_csv(rows))
    return pictures


def caption(found: Explained) -> str:
    slide = found.composite.slide
    return (
        f"{slide.name}, {'malignant' if slide.label else 'benign'}: probability of malignancy "
        f"{float(probability(np.array([found.logit]))[0]):.3f}. Taking away what is marked: {found.deletion:.3f} (random order "
        f"{found.random_deletion:.3f}; lower is better); putting it back: {found.insertion:.3f} ({found.random_insertion:.3f}; "
        "higher is better)."
    )


def draw_explained(found: Explained, album: Album, threshold: float, path: Path) -> None:
    """The photographs above, the maps over them below."""
    height = 2 * 2.75 * album.size[0] / album.size[1] + 0.6
    spacing = {"hspace": 0.03, "wspace": 0.03, "top": 1 - 0.6 / height, "bottom": 0.0, "left": 0.0, "right": 1.0}
    figure, axes = plt.subplots(2, len(MAGNIFICATIONS), figsize=(11, height), gridspec_kw=spacing)
    for column, (m, photograph) in enumerate(zip(MAGNIFICATIONS, found.composite.paths, strict=True)):
        for row in (0, 1):
            panel = axes[row, column]
            panel.set_axis_off()
            if photograph is None:
                continue
            panel.imshow(album.read(photograph))
            if row:
                panel.imshow(found.maps[column], cmap="inferno", alpha=0.5, vmin=0, vmax=1)
        axes[0, column].set_title(f"{m}X" if photograph is not None else f"{m}X: none", fontsize=9)
    p = float(probability(np.array([found.logit]))[0])
    said = "malignant" if p >= threshold else "benign"
    true = "malignant" if found.composite.slide.label else "benign"
    figure.suptitle(f"{found.composite.slide.name}: {said} ({p:.2f}), truly {true}", fontsize=10)
    save_figure(figure, path)
