"""Grad-CAM in all photographs of a composite at once, and whether what it marks matters.

A map is relu(sum_c w_c A_c), w_c the mean gradient of the decision with respect to channel c of a layer's output A (Selvaraju
et al. 2017); the four photographs share one backward pass, so their maps are of one scale. Faithfulness after Petsiuk et al.
2018 (RISE): the probability of the decision while the marked pixels are taken away, most marked first, and while they are put
back on a blurred picture; areas under both curves, beside those of a random order.
"""

import dataclasses
import math
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
from common.logbook import progress
from common.precision import autocast
from common.streams import random_for
from histo_mmnet.augmentation import prepared
from histo_mmnet.composites import Composite, all_composites
from histo_mmnet.config import Config
from histo_mmnet.dataset import stacked
from histo_mmnet.evaluation import FoldVerdict
from histo_mmnet.judging import Verdict
from histo_mmnet.members import Network
from histo_mmnet.names import CLASSES, MAGNIFICATIONS
from histo_mmnet.predictions import load_member, probability
from histo_mmnet.results import as_csv
from histo_mmnet.slides import Album, Slide
from histo_mmnet.trainer import Files

STEPS = 10  # of taking away and putting back
BLURRED = 9  # pixels of the mean that stands for nothing
PER_FOLD = 1  # patients of each class that are drawn
TINY = 1e-12  # least probability whose logit is taken
SCORES = ("deletion", "random_deletion", "insertion", "random_insertion")


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
    """A composite's maps and how faithful they are."""

    composite: Composite
    probability: float  # of malignancy
    threshold: float  # of the probability
    is_malignant: bool  # the decision that is explained
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
    network: Network,
    images: Tensor,
    magnification: Tensor,
    present: Tensor,
    layer: str,
    threshold: float,
    precision: str,
) -> tuple[Tensor, float]:
    """Grad-CAM (S, h, w) of one composite (1, S, 3, y, x) for its decision, and the logit; empty slots are 0.

    threshold: the logit from which on the decision is malignant. Raises a config error where the layer gives no maps.
    """
    outputs: list[Tensor] = []
    passed: list[int] = []  # modules, each once if maps are to be had

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)
        passed.append(id(module))

    handles = [module.register_forward_hook(keep) for module in hooked_modules(network, layer)]
    try:
        with torch.enable_grad(), autocast(images.device, precision):
            logit = network(images.requires_grad_(), magnification, present)[0]
        axes = [found for output in outputs if (found := axes_of_maps(output, tuple(images.shape[3:]))) is not None]
        if not axes or len(axes) < len(outputs) or len(set(passed)) < len(passed):
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs[:3] if isinstance(output, Tensor))
            raise config_error(
                f"evaluation.gradcam_layer: {layer!r} gives no maps (its outputs: {shapes or 'none'}); expected a layer that "
                "is passed once and gives rows x columns x channels, like the end of a stage"
            )
        gradients = torch.autograd.grad(logit if logit >= threshold else -logit, outputs)
    finally:
        for handle in handles:
            handle.remove()
    maps = torch.cat([
        (gradient.float().mean(places, keepdim=True) * output.detach().float()).sum(channels).clamp(min=0)
        for gradient, output, (places, channels) in zip(gradients, outputs, axes, strict=True)
    ])  # (present slots, h, w), in order of magnification  # fmt: skip
    slots = maps.new_zeros(present.shape[1], *maps.shape[1:])
    slots[present[0]] = maps
    return slots, float(logit.detach())


def axes_of_maps(output: Any, size: tuple[int, ...]) -> tuple[tuple[int, int], int] | None:
    """The axes of places and of channels of a layer's output: (N, C, h, w), or (N, h, w, C) as Swin has them; None for others.

    Maps of photographs (y, x) have their proportions.
    """
    if not isinstance(output, Tensor) or output.dim() != 4:
        return None
    for places, channels in (((2, 3), 1), ((1, 2), 3)):
        cells = [(edge, output.shape[axis]) for edge, axis in zip(size, places, strict=True)]
        # pixels per cell, the same along both: between those of one cell more and one cell fewer
        least = max(edge / (number + 1) for edge, number in cells)
        most = min(edge / (number - 1) if number > 1 else math.inf for edge, number in cells)
        if least < most:
            return places, channels
    return None


def check_layer(network: Network, trained: Config, layer: str) -> None:
    """A config error where the layer to look at is none, before hours are spent on figures."""
    device = next(network.parameters()).device
    present = torch.ones(1, len(MAGNIFICATIONS), dtype=torch.bool)
    images = torch.zeros(*present.shape, 3, *trained.data.image_size, device=device)
    places = torch.arange(len(MAGNIFICATIONS), device=device)[None]
    activation_maps(network, images, places, present.to(device), layer, 0.0, "float32")


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
    is_malignant: bool,
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
            values.append(probability_of(value if is_malignant else -value))
        curves.append(float(np.trapezoid(values, dx=1 / STEPS)))
    return curves[0], curves[1]


def probability_of(logit: float) -> float:
    """1 / (1 + exp(-x))."""
    return float(probability(np.array([logit]))[0])


def explain(network: Network, composite: Composite, album: Album, config: Config, threshold: float) -> Explained:
    """Maps and faithfulness of one composite, for the decision at a threshold of its probability."""
    device, precision = next(network.parameters()).device, config.train.precision
    batch = stacked(composite.paths, composite.magnification, album, composite.slide.label, 0)
    batch = batch.mapped(lambda part: part.to(device))
    images, where = prepared(batch), (batch.magnification, batch.present)
    limit = math.log(max(threshold, TINY) / max(1 - threshold, TINY))
    maps, logit = activation_maps(network, images, *where, config.evaluation.gradcam_layer, limit, precision)
    images = images.detach()
    large = enlarged(maps, album.size)
    chance = torch.from_numpy(random_for("random order", config.evaluation.seed).random(large.shape)).to(large)
    marked, random = (
        decision_curves(network, images, *where, order, logit >= limit, precision) for order in (large, chance)
    )
    shown = np.asarray(large.cpu().double().numpy(), np.float64)
    return Explained(composite, probability_of(logit), threshold, logit >= limit, shown, *marked, *random)


def chosen_composites(fold: FoldVerdict) -> list[Composite]:
    """The first composite of some patients of each class, each patient once."""
    chosen: list[Composite] = []
    for label in (0, 1):
        seen: dict[str, Slide] = {}
        for composite in fold.predictions.composites:
            if composite.slide.label == label:
                seen.setdefault(composite.slide.accession, composite.slide)
        chosen += [all_composites([slide], MAGNIFICATIONS)[0] for slide in list(seen.values())[:PER_FOLD]]
    return chosen


def draw_gradcams(
    verdict: Verdict, config: Config, folder: Path, output: Path, device: torch.device
) -> list[tuple[Path, str]]:
    """A picture per chosen patient in gradcam/, scores in results/gradcam_scores.csv; returns pictures and their words."""
    album, pictures, rows = Album.of(config), [], []
    for fold in progress(verdict.folds, "drawing Grad-CAM", len(verdict.folds), True):
        network, trained = load_member(Files.of(folder, fold.member).best, fold.member, device)
        used = dataclasses.replace(trained, evaluation=config.evaluation)
        for composite in chosen_composites(fold):
            slide = composite.slide
            found = explain(network, composite, album, used, fold.thresholds.composite)
            path = output / "gradcam" / f"fold_{fold.member.fold}_{slide.accession}.png"
            truth = CLASSES["BM"[slide.label]]
            draw_explained(found, album, f"truly {truth}", path)
            rows.append({"fold": fold.member.fold, "accession": slide.accession, "label": slide.label,
                         "probability": round(found.probability, 4),
                         **{name: round(getattr(found, name), 4) for name in SCORES}})  # fmt: skip
            pictures.append((path, caption(found, truth)))
    write_text(output / "results" / "gradcam_scores.csv", as_csv(rows))
    return pictures


def caption(found: Explained, truth: str) -> str:
    """A picture's words."""
    called = CLASSES["BM"[found.is_malignant]]
    if not found.maps.any():
        return f"{found.composite.slide.name}, truly {truth}, called {called}: nothing in this layer speaks for it."
    return (
        f"{found.composite.slide.name}, truly {truth}, called {called} (probability of malignancy {found.probability:.3f}, "
        f"threshold {found.threshold:.3f}). Mean probability of {called} while the marked pixels are taken away, most marked "
        f"first: {found.deletion:.3f} (in random order {found.random_deletion:.3f}; lower is better); while they are put back: "
        f"{found.insertion:.3f} ({found.random_insertion:.3f}; higher is better)."
    )


def draw_explained(found: Explained, album: Album, words: str, path: Path) -> None:
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
    said = CLASSES["BM"[found.is_malignant]]
    decision = f"p = {found.probability:.2f}, threshold {found.threshold:.2f}"
    title = f"{found.composite.slide.name}: what speaks for {said} ({decision}); {words}"
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
