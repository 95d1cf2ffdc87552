"""A tomogram's heat map and picks, in memory bounded by the tile.

MotorIdentifier runs in two exact passes: its fine part over tiles of voxels into a map at the split level, its coarse
part over tiles of that map. The fine part holds nearly all the work and reaches 20 voxels, the coarse part reaches far
but has few cells; tiled apart, next to nothing is computed twice.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.blocks import PreActResBlock
from common.checkpoint import load_checkpoint, load_weights
from common.config import restore
from common.errors import config_error, data_error
from common.precision import tell_precision, working_precision
from common.tiling import Box, Triple, balanced_tile, cube, exact_tiles, output_shape, run_blended, run_exactly
from motor_detection.config import KAGGLE, Config
from motor_detection.intensity import Intensity, measure_intensity, to_bytes
from motor_detection.labels import LabelledTomogram
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.peaks import Peaks, find_peaks
from motor_detection.tomograms import Tomogram
from motor_detection.trainer import KIND, build_model

IN_MEMORY_BYTES = 512 * 2**20  # a split-level map larger than this lies in a temporary file
FLIPS: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
COST_CROP = (96, 192, 192)  # voxels on which the working precision is compared with float32


@dataclasses.dataclass
class SlabCache:
    """Reads boxes of a tomogram, normalised; every slice is decoded once while tiles proceed along z."""

    tomogram: Tomogram
    intensity: Intensity
    slices: dict[int, np.ndarray]  # z -> uint8 (y, x)

    def read(self, box: Box) -> Tensor:
        """(1, 1, z, y, x) float32, in standard deviations from the tomogram's mean."""
        (z0, y0, x0), (z1, y1, x1) = box
        height, width = self.tomogram.volume.shape[1:]
        for z in [z for z in self.slices if not z0 <= z < z1]:
            del self.slices[z]
        missing = [z for z in range(z0, z1) if z not in self.slices]
        for z in missing:
            raw = self.tomogram.volume.read((z, 0, 0), (1, height, width))
            self.slices[z] = to_bytes(raw, self.intensity, self.tomogram.volume.path)[0]
        voxels = np.stack([self.slices[z][y0:y1, x0:x1] for z in range(z0, z1)])
        normalised = torch.from_numpy(voxels).float().sub_(self.intensity.mean).div_(self.intensity.deviation)
        return normalised[None, None]


def load_model(path: Path, device: torch.device) -> tuple[MotorIdentifier, Config]:
    """The averaged weights of a checkpoint as a model in eval mode, and the config it was trained with."""
    saved = load_checkpoint(path, KIND, {"config": str, "weights": dict})
    config = restore(KAGGLE, saved["config"], path)
    model = build_model(config.model)
    load_weights(model, saved["weights"], path)
    return model.eval().to(device, memory_format=torch.channels_last_3d), config  # type: ignore[call-overload]


def check_unseen(path: Path, roles: tuple[str, ...], tomograms: list[LabelledTomogram]) -> None:
    """Refuse to judge a checkpoint on tomograms that it was trained or validated on (roles), as after edited folds."""
    saved = load_checkpoint(path, KIND, {"tomograms": list})["tomograms"]
    seen = [t.tomo_id for t in tomograms if any(f"{role} {t.tomo_id}" in saved for role in roles)]
    if seen:
        raise data_error(
            f"{path}: {len(seen)} of {len(tomograms)} tomograms to judge it on were among those for {' or '.join(roles)} "
            f"({', '.join(seen[:3])}): the table's folds have changed since; train again, or restore the table"
        )


def working_copy(model: MotorIdentifier, precision: str) -> MotorIdentifier:
    """The model in the precision it runs fastest in: float32 where the model's device has no bfloat16.

    In bfloat16 norms are part of the convolutions before them and all weights are rounded to 8 bits of mantissa.
    """
    fast, working = copy.deepcopy(model), working_precision(precision, model.stem.weight.device)
    if working != "float32":
        for module in fast.modules():
            if isinstance(module, PreActResBlock):
                module.absorb_norms()
    return fast.to(getattr(torch, working))


@torch.inference_mode()
def heatmap_logits(
    model: MotorIdentifier, cache: SlabCache, flipped: tuple[int, ...], config: Config, device: torch.device
) -> Tensor:
    """Logits (ceil(z/stride), ...) float32 on the CPU of one tomogram under a config's tiling and the model's precision.

    cache: of the tomogram; one for all flips and models decodes a small tomogram only once. flipped: axes (0 z, 1 y,
    2 x) along which the network sees the tomogram reversed; the map is turned back.
    """
    if config.inference.tiling == "exact" and not model.is_local:
        raise config_error("inference.tiling: a model with group norm or squeeze-and-excitation needs blended windows")
    dtype = model.stem.weight.dtype
    shape = cache.tomogram.volume.shape
    seen = padded_shape(shape, flipped, model.deepest_stride)

    def read(box: Box) -> Tensor:
        return read_flipped(cache, box, shape, seen, flipped).to(device, dtype)

    if config.inference.tiling == "blended":
        window = config.convert.patch_size
        logits = run_blended(model, read, seen, window, model.stride, config.inference.overlap)[0].cpu()
    else:
        logits = two_pass_logits(model, read, seen, config.inference.tile_size, device)
    cells = output_shape(shape, model.stride)
    return logits.flip(flipped)[: cells[0], : cells[1], : cells[2]]


def padded_shape(shape: Triple, flipped: tuple[int, ...], grid: int) -> Triple:
    """Flipped axes grow to multiples of the deepest level's stride, so that cells seen from either end are the same."""
    z, y, x = (-(-n // grid) * grid if axis in flipped else n for axis, n in enumerate(shape))
    return z, y, x


def read_flipped(cache: SlabCache, box: Box, shape: Triple, seen: Triple, flipped: tuple[int, ...]) -> Tensor:
    """A box of the flipped tomogram (1, 1, z, y, x); beyond the tomogram's end it is 0, the tomogram's mean."""
    if not flipped:
        return cache.read(box)
    start, stop, missing = [], [], []
    for axis, (first, last) in enumerate(zip(*box, strict=True)):
        a, b = (seen[axis] - last, seen[axis] - first) if axis in flipped else (first, last)
        start.append(min(a, shape[axis]))
        stop.append(min(b, shape[axis]))
        missing.append(b - a - (stop[-1] - start[-1]))
    voxels = cache.read(((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    padded = torch.nn.functional.pad(voxels, (0, missing[2], 0, missing[1], 0, missing[0]))
    return padded.flip([axis + 2 for axis in flipped])


def two_pass_logits(
    model: MotorIdentifier, read: Callable[[Box], Tensor], shape: Triple, tile: Triple, device: torch.device
) -> Tensor:
    """Exact tiles of the fine part, then of the coarse part; (z, y, x cells) float32 on the CPU."""
    fine, coarse = model.fine_reach(), model.coarse_reach()
    dtype = model.stem.weight.dtype
    levels = output_shape(shape, fine.stride)
    with tempfile.TemporaryDirectory() as folder:
        features = _allocate((model.split_channels, *levels), dtype, device, Path(folder))
        edges = balanced_tile(shape, tile, cube(fine.alignment))
        tiles = exact_tiles(shape, edges, fine.stride, cube(fine.alignment), cube(fine.halo))
        run_exactly(model.fine, read, list(tiles), features)

        def read_features(box: Box) -> Tensor:
            (z0, y0, x0), (z1, y1, x1) = box
            return features[None, :, z0:z1, y0:y1, x0:x1].contiguous(memory_format=torch.channels_last_3d)

        # a cell of this map is cheap and the halo wide, so its tiles are twice as long on each axis
        edge = [max(coarse.alignment, 2 * n // fine.stride // coarse.alignment * coarse.alignment) for n in tile]
        edges = balanced_tile(levels, (edge[0], edge[1], edge[2]), cube(coarse.alignment))
        logits = torch.empty(1, *output_shape(shape, model.stride))
        tiles = exact_tiles(levels, edges, coarse.stride, cube(coarse.alignment), cube(coarse.halo))
        run_exactly(model.coarse, read_features, list(tiles), logits)
    return logits[0]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
    """An empty map: in memory, or in a mapped file where it is large and the work is on the CPU."""
    size = int(np.prod(shape))
    if device.type != "cpu" or size * dtype.itemsize <= IN_MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    mapped = torch.from_file(str(folder / "features"), shared=True, size=size, dtype=dtype)
    return mapped.view(shape)


def averaged_heatmap(
    models: list[MotorIdentifier], tomogram: Tomogram, config: Config, device: torch.device
) -> np.ndarray:
    """Probabilities (z, y, x cells): the mean over models of sigmoid(logits), over all 8 flips where config asks."""
    cache = SlabCache(tomogram, measure_intensity(tomogram.volume), {})
    flips = FLIPS if config.inference.flips else [()]
    maps = (heatmap_logits(model, cache, flipped, config, device).sigmoid() for model in models for flipped in flips)
    total = next(maps)
    for more in maps:
        total += more
    probabilities: np.ndarray = (total / (len(models) * len(flips))).numpy()
    return probabilities


def pick_motors(models: list[MotorIdentifier], tomogram: Tomogram, config: Config, device: torch.device) -> Peaks:
    """The picks of one tomogram, best first."""
    inference = config.inference
    peaks = find_peaks(
        averaged_heatmap(models, tomogram, config, device),
        config.model.stride,
        np.array(tomogram.spacing_angstrom),
        config.heatmap.sigma_angstrom,
        inference.min_distance_angstrom,
        inference.min_score,
        inference.max_picks,
    )
    inside = np.clip(peaks.points, -0.5, np.array(tomogram.volume.shape) - 0.5)  # the last cell may be a partial one
    return Peaks(inside, peaks.scores)


@torch.inference_mode()
def rounding_cost(model: MotorIdentifier, tomogram: Tomogram, config: Config, device: torch.device) -> float:
    """The largest change of a probability that the working precision causes, on a central crop of the tomogram."""
    shape, size = tomogram.volume.shape, COST_CROP
    begin = tuple(max(0, (n - edge) // 2) for n, edge in zip(shape, size, strict=True))
    end = tuple(min(n, b + edge) for n, b, edge in zip(shape, begin, size, strict=True))
    cache = SlabCache(tomogram, measure_intensity(tomogram.volume), {})
    crop = cache.read(((begin[0], begin[1], begin[2]), (end[0], end[1], end[2]))).to(device)
    fast = working_copy(model, config.inference.precision)
    rounded = fast(crop.to(fast.stem.weight.dtype)).float().sigmoid()
    return float((rounded - model(crop).sigmoid()).abs().max())


def tell_rounding(model: MotorIdentifier, tomogram: Tomogram, config: Config, device: torch.device) -> None:
    """Print what the working precision costs in accuracy, where it is not float32."""
    tell_precision(config.inference.precision, device)
    if working_precision(config.inference.precision, device) != "float32":
        cost = rounding_cost(model, tomogram, config, device)
        print(f"{config.inference.precision} changes scores by at most {cost:.4f} (crop of {tomogram.tomo_id})")


def check_same_grid(configs: list[Config], paths: list[Path]) -> None:
    """Models of an ensemble must draw the same kind of map."""
    for config, path in zip(configs, paths, strict=True):
        if (config.model.stride, config.heatmap) != (configs[0].model.stride, configs[0].heatmap):
            raise data_error(
                f"{path}: its heat map differs in stride or sigma from {paths[0]}; they cannot be averaged"
            )
