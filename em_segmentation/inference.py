"""A trained network over a whole volume: probabilities as bytes, plane range by plane range.

Memory: exact tiles hold one row of them as bytes; blended windows hold the sums of a window's depth of planes as float32.
"""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.checkpoint import load_checkpoint, load_weights
from common.config import restore
from common.convolution import channels_last
from common.errors import config_error, data_error
from common.precision import working_precision
from common.tiling import Box, balanced_tile, blended_planes, exact_tiles, window_starts
from common.volumes.volume import Volume
from em_segmentation.config import BASE, Config, Targets
from em_segmentation.model_defs.registry import KIND, SegmentationModel, build_model
from em_segmentation.model_defs.rsunet import MergeModule, ResidualModule
from em_segmentation.model_defs.unetr import UNETR
from em_segmentation.objective import channel_ranges
from em_segmentation.regions import Region, Triple, everywhere
from em_segmentation.turns import PartNetwork, averaged, turns_of
from em_segmentation.volumes import Scale, normalised

Bytes = npt.NDArray[np.uint8]
AUXILIARY = ("centre", "lsd")  # targets that help training and are not written


def load_model(path: Path, device: torch.device) -> tuple[SegmentationModel, Config]:
    """The averaged weights of a checkpoint as a model in eval mode, and the config it was trained with."""
    saved = load_checkpoint(path, KIND, {"config": str, "weights": dict})
    config = restore(BASE, saved["config"], path)
    model = build_model(config)
    load_weights(model, saved["weights"], path)
    return model.eval().to(device, memory_format=torch.channels_last_3d), config  # type: ignore[call-overload]


def working_copy(model: SegmentationModel, precision: str) -> SegmentationModel:
    """The model as it runs fastest: norms in the convolutions, and in bfloat16 weights of 8 bits of mantissa.

    float32 where the model's device has no bfloat16.
    """
    fast = copy.deepcopy(model)
    for module in fast.modules():
        if isinstance(module, ResidualModule | MergeModule):
            module.absorb_norms()
    return fast.to(getattr(torch, inference_precision(precision, next(model.parameters()).device)))


def inference_precision(name: str, device: torch.device) -> str:
    """torch's name of the type that inference.precision means on a device."""
    return working_precision({"32": "float32", "bf16": "bfloat16"}[name], device)


def written_channels(settings: Targets) -> dict[str, slice]:
    """The channels of a prediction: those of the targets that are probabilities or distances.

    Raises a config error where there are none.
    """
    ranges, first = {}, 0
    for name, channels in channel_ranges(settings).items():
        if name not in AUXILIARY:
            ranges[name] = slice(first, first + channels.stop - channels.start)
            first = ranges[name].stop
    if not ranges:
        raise config_error(
            f"targets.names: {', '.join(settings.names)} only help training and are not written; "
            "expected semantic, boundary, affinity or distance among them"
        )
    return ranges


def as_probabilities(logits: Tensor, settings: Targets) -> Tensor:
    """Logits of all targets (1, C, z, y, x), which are spent, as values in [0, 1], without auxiliary targets.

    sigmoid, softmax of several classes; signed distances as (tanh + 1) / 2.
    """
    parts = []
    for name, channels in channel_ranges(settings).items():
        own = logits[:, channels].float()
        if name == "semantic" and settings.semantic_classes > 1:
            parts.append(own.softmax(1))
        elif name == "distance":
            parts.append(own.tanh_().add_(1).div_(2))
        elif name not in AUXILIARY:
            parts.append(own.sigmoid_())
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def probability_network(model: SegmentationModel, config: Config) -> PartNetwork:
    """The model as a function from what a Reader reads (1, c, z, y, x) to a region's probabilities, averaged over turns."""

    def network(x: Tensor, region: Region) -> Tensor:
        return as_probabilities(model.part(channels_last(x), region), config.targets)

    settings = config.targets
    channels = written_channels(settings)
    affinities = channels["affinity"] if "affinity" in channels else slice(0, 0)
    return averaged(
        network, turns_of(config.inference.tta), affinities, settings.affinity_offsets, settings.affinity_stored_at
    )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads boxes of an image, normalised; beyond the far faces it repeats the last voxels up to `padded`."""

    image: Volume
    scale: Scale
    model: SegmentationModel  # whose device and type the voxels get
    padded: Triple  # z, y, x

    def __call__(self, box: Box) -> Tensor:
        """(1, c, z, y, x)."""
        corner, last = box
        inside = [min(stop, n) for stop, n in zip(last, self.image.shape, strict=True)]
        size = (inside[0] - corner[0], inside[1] - corner[1], inside[2] - corner[2])
        voxels = torch.from_numpy(normalised(self.image, corner, size, self.scale))[None].to(
            next(self.model.parameters())
        )
        more = [stop - n for stop, n in zip(last, inside, strict=True)]
        if any(more):
            voxels = torch.nn.functional.pad(voxels, (0, more[2], 0, more[1], 0, more[0]), "replicate")
        return voxels


def padded_shape(shape: Triple, grid: Triple) -> Triple:
    """Every edge at the next multiple of a grid, so that flipped tiles lie on the network's grid too."""
    z, y, x = (-(-n // edge) * edge for n, edge in zip(shape, grid, strict=True))
    return z, y, x


@torch.inference_mode()
def predicted_boxes(
    model: SegmentationModel, image: Volume, scale: Scale, config: Config, planes: tuple[int, int]
) -> Iterator[tuple[Triple, Bytes]]:
    """Yield (corner, bytes [C, dz, dy, dx]) that cover the planes [first, last) of an image, row of tiles after row.

    Bytes are round(255 p). Any range of planes has the bits that it has as part of the whole.
    """
    parts = exact_boxes if config.inference.tiling == "exact" else window_boxes
    for (z, y, x), found in parts(model, image, scale, config, planes):
        begin, end = max(z, planes[0]), min(z + found.shape[1], planes[1])
        if end > begin:
            yield (begin, y, x), found[:, begin - z : end - z, : image.shape[1] - y, : image.shape[2] - x].numpy()


def row_starts(model: SegmentationModel, shape: Triple, config: Config) -> list[int]:
    """The planes where a new row of tiles or windows begins: what several processes part a volume at."""
    if config.inference.tiling == "exact":
        padded, edges, _ = exact_layout(model, shape, config)
        return list(range(0, padded[0], edges[0]))
    window = window_of(model, config)
    return window_starts(max(shape[0], window[0]), window[0], config.inference.overlap)


def check_tiling(model: SegmentationModel, config: Config) -> None:
    """A config error for exact tiles of a network that looks at whole windows."""
    if config.inference.tiling == "exact" and (model.halo is None or model.alignment is None):
        why = f" with model.norm={config.model.norm}" if config.model.architecture == "rsunet" else ""
        raise config_error(
            f"inference.tiling: {config.model.architecture}{why} looks at whole windows; expected inference.tiling=blended"
        )


def exact_layout(model: SegmentationModel, shape: Triple, config: Config) -> tuple[Triple, Triple, Triple]:
    """The padded shape, the tiles' edges and their halo; a config error for networks that look at whole windows."""
    check_tiling(model, config)
    assert model.halo is not None and model.alignment is not None
    halo, grid, tta = model.halo, model.alignment, config.inference.tta
    if any(turn.swapped for turn in turns_of(tta)) and (halo[1] != halo[2] or grid[1] != grid[2]):
        raise config_error(
            f"inference.tta: {tta} turns y into x, which {config.model.architecture} treats differently: use flips"
        )
    if tta != "none" and "affinity" in config.targets.names:  # an edge's other end is looked at
        offsets = config.targets.affinity_offsets
        reach = [max(abs(offset[axis]) for offset in offsets) for axis in range(3)]
        halo = (halo[0] + reach[0], halo[1] + reach[1], halo[2] + reach[2])
    padded = padded_shape(shape, grid)
    return padded, balanced_tile(padded, fitting(config.inference.tile_size, grid), grid), halo


def exact_boxes(
    model: SegmentationModel, image: Volume, scale: Scale, config: Config, planes: tuple[int, int]
) -> Iterator[tuple[Triple, Tensor]]:
    """Exact tiles of the rows that touch the planes, as bytes; each output computed once."""
    shape, edges, halo = exact_layout(model, image.shape, config)
    assert model.alignment is not None
    network, read = probability_network(model, config), Reader(image, scale, model, shape)
    for tile in exact_tiles(shape, edges, 1, model.alignment, halo):
        z, y, x = tile.write
        if z.start < planes[1] and z.stop > planes[0]:
            yield (z.start, y.start, x.start), as_bytes(network(read(tile.read), tile.keep)[0], image.path)


def as_bytes(probabilities: Tensor, path: Path) -> Tensor:
    """round(255 p) as uint8 on the CPU, p is spent; a data error where a network's output is not finite."""
    if not bool(probabilities.sum().isfinite()):
        raise data_error(f"{path}: the network's output is not finite there; try inference.precision=32")
    return probabilities.mul_(255).round_().to(torch.uint8).cpu()


def fitting(size: Triple, grid: Triple) -> Triple:
    """The largest multiples of a grid that are no larger, and at least one of each."""
    z, y, x = (max(edge, n // edge * edge) for n, edge in zip(size, grid, strict=True))
    return z, y, x


def window_of(model: SegmentationModel, config: Config) -> Triple:
    """The edges of blended windows; a config error where the network, or a turn, does not fit into them."""
    inference = config.inference
    window = inference.window_size if inference.window_size is not None else config.data.patch_size
    with torch.device("meta"):  # no weights: only to learn whether the network takes these windows
        build_model(config)
    swapped = any(turn.swapped for turn in turns_of(inference.tta))
    if swapped and window[1] != window[2] and isinstance(model.network, UNETR):
        raise config_error(
            f"inference.tta: {inference.tta} turns windows of {list(window)}; unetr takes only square ones: use flips"
        )
    return window


def window_boxes(
    model: SegmentationModel, image: Volume, scale: Scale, config: Config, planes: tuple[int, int]
) -> Iterator[tuple[Triple, Tensor]]:
    """Whole planes out of overlapping windows, as bytes."""
    window = window_of(model, config)
    shape = (max(image.shape[0], window[0]), max(image.shape[1], window[1]), max(image.shape[2], window[2]))
    network, read = probability_network(model, config), Reader(image, scale, model, shape)
    for first, part in blended_planes(
        lambda x: network(x, everywhere(x)), read, shape, window, 1, config.inference.overlap, planes
    ):
        yield (first, 0, 0), as_bytes(part, image.path)


@torch.inference_mode()
def rounding_cost(model: SegmentationModel, image: Volume, scale: Scale, config: Config) -> float:
    """The largest change of a probability that the working precision causes, on one patch from the middle."""
    size = config.data.patch_size
    corner = tuple(max(0, n - edge) // 2 for n, edge in zip(image.shape, size, strict=True))
    first, last = (corner[0], corner[1], corner[2]), (corner[0] + size[0], corner[1] + size[1], corner[2] + size[2])
    plain = dataclasses.replace(config, inference=dataclasses.replace(config.inference, tta="none"))
    fast = working_copy(model, config.inference.precision)
    found = []
    for one in (fast, model):
        voxels = Reader(image, scale, one, last)((first, last))
        found.append(probability_network(one, plain)(voxels, everywhere(voxels)))
    return float((found[0] - found[1]).abs().max())
