"""The constants of motor_detection: full-size defaults, each with unit and reason, and the presets made from them."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.blocks import NormName
from common.config import LARGEST_INT, no_folder_names, outside
from data.phantoms.motor_settings import MotorPhantom
from motor_detection.losses import LossName


@dataclasses.dataclass(frozen=True)
class Data:
    source: Literal["phantom", "files"] = "files"  # phantom: simulated tomograms, generated where root would be
    root: Path = Path("data/original_data/train")  # tomograms: folders of slices, .npy, .mrc, .rec or .map
    labels: Path = Path("data/original_data/RELABELED_DATA.csv")  # or the original train_labels.csv
    patches: Path = Path("data/patches")  # what convert.py writes and train.py reads
    voxel_spacing_angstrom: float = 0.0  # Å; 0 = from the label table or the file's header
    validation_fold: int = 0  # the best checkpoint and the score threshold are decided here
    test_fold: int = 1  # reported once by eval.py; never seen in training. -1 = train on it, no test

    def problems(self) -> Iterator[str]:
        if self.voxel_spacing_angstrom != 0:
            yield from outside(self, {"voxel_spacing_angstrom": (0.1, 1000)})
        yield from outside(self, {"validation_fold": (0, 10**6), "test_fold": (-1, 10**6)})
        if self.validation_fold == self.test_fold:
            yield f"test_fold: is the validation fold {self.test_fold}; a threshold must not be chosen on what is reported"


@dataclasses.dataclass(frozen=True)
class Convert:
    patch_size: tuple[int, int, int] = (160, 288, 288)  # voxels z, y, x; multiples of 32; the original's
    single: float = 15.0  # N: patches per motor with that motor inside; a fraction is a probability
    multi: float = 15.0  # Y: patches per pair of motors that fit into one patch (the original: per two motors)
    hard_negative: float = 1.0  # M: patches per motor just beside it, the motor outside
    negative: float = 1.0  # X: patches per tomogram from anywhere without a motor
    producers: int = 3  # processes that load tomograms while the main process saves
    seed: int = 42  # of patch positions

    def problems(self) -> Iterator[str]:
        counts = dict.fromkeys(("single", "multi", "hard_negative", "negative"), (0.0, 1e5))
        yield from outside(self, counts | {"patch_size": (32, 2048), "producers": (1, 1024), "seed": (0, LARGEST_INT)})
        if any(size % 32 for size in self.patch_size):
            yield f"patch_size: expected multiples of 32 voxels (the encoder halves five times), got {list(self.patch_size)}"


@dataclasses.dataclass(frozen=True)
class Heatmap:
    sigma_angstrom: float = 200.0  # Å, Gaussian around each motor; about half a motor's width

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"sigma_angstrom": (1, 1e5)})


@dataclasses.dataclass(frozen=True)
class Model:
    channels: tuple[int, ...] = (16, 32, 64, 128, 224)  # of levels /2, /4, /8, /16, /32
    fusion_channels: int = 96  # of the top-down path and the head
    stride: int = 16  # voxels per heat-map cell and axis; a level of the encoder
    norm: NormName = "batch"  # batch: exact tiles at inference; group: statistics of the whole tile
    squeeze_excitation: bool = False  # global channel gates; they need blended windows at inference
    drop_path: float = 0.1  # at the deepest level, falling to 0 at the stem
    dropout: float = 0.1  # of whole channels before the logit

    def problems(self) -> Iterator[str]:
        strides = [2 ** (level + 1) for level in range(len(self.channels))]
        if self.stride not in strides[:4]:
            yield f"stride: expected one of {strides[:4]} (a level of model.channels), got {self.stride}"
        yield from outside(self, {"channels": (1, 8192), "fusion_channels": (1, 8192)})
        yield from outside(self, {"drop_path": (0, 0.99), "dropout": (0, 0.99)})


@dataclasses.dataclass(frozen=True)
class Loss:
    name: LossName = "weighted_bce"
    positive_weight: float = 420.0  # w of weighted_bce: (1 + w t) BCE; 420 is the original's early value, 10 its last
    gamma: float = 2.0  # focal: exponent of |t - p|
    alpha: float = 2.0  # combined_focal and corner_net: exponent of the error
    beta: float = 6.0  # combined_focal and corner_net: exponent of the target
    positive_threshold: float = 0.65  # corner_net: targets from here on count as positive
    topk: float = 0.2  # topk_bce: cells kept per sample; 1 or more = a count, below 1 = a share

    def problems(self) -> Iterator[str]:
        if self.topk <= 0 or (self.topk > 1 and self.topk != int(self.topk)):
            yield f"topk: expected a whole count from 1 or a share of cells in (0, 1), got {self.topk}"
        for name in ("gamma", "alpha"):
            if getattr(self, name) != 0 and not 1 <= getattr(self, name) <= 100:
                yield f"{name}: expected 0 or 1 to 100 (between 0 and 1 the gradient is infinite), got {getattr(self, name)}"
        yield from outside(self, {"positive_weight": (0, 1e6), "beta": (0, 100), "positive_threshold": (0, 1)})


@dataclasses.dataclass(frozen=True)
class Augment:
    flip: float = 0.5  # probability per axis
    turn: float = 0.5  # probability of a quarter turn in the y-x plane (needs square patches)
    affine: float = 0.3  # probability of a small rotation, scaling and shift
    rotation_degrees: float = 15.0  # in the y-x plane, uniform in +-
    scale: float = 0.1  # uniform in 1 +-
    shift: float = 0.05  # of the patch size, uniform in +-
    intensity: float = 0.5  # probability of contrast and brightness changes
    contrast: float = 0.2  # factor uniform in 1 +-
    brightness: float = 0.2  # standard deviations, uniform in +-
    noise: float = 0.2  # probability of added Gaussian noise
    noise_level: float = 0.5  # standard deviations, uniform from 0
    mixup: float = 0.0  # probability that a sample is blended with its neighbour in the micro-batch

    def problems(self) -> Iterator[str]:
        yield from outside(self, dict.fromkeys(("flip", "turn", "affine", "intensity", "noise", "mixup"), (0, 1)))
        yield from outside(
            self, {"scale": (0, 0.9), "contrast": (0, 0.9), "shift": (0, 1), "rotation_degrees": (0, 180)}
        )
        yield from outside(self, {"brightness": (0, 100), "noise_level": (0, 100)})


@dataclasses.dataclass(frozen=True)
class Train:
    seed: int = 42  # of weights, order, augmentation and dropout
    steps: int = 20000  # optimizer steps
    batch_size: int = 8  # patches per optimizer step on all devices together
    micro_batch_size: int = 2  # patches per device at once; the rest is accumulated
    learning_rate_backbone: float = 5e-4  # peak, of stem and stages; 0.1x the head's when fine-tuning
    learning_rate_head: float = 5e-4  # peak, of fusion and logit
    weight_decay: float = 1e-4  # AdamW, weights only (no biases, no norms)
    warmup_share: float = 0.1  # of the steps, linear
    floor_share: float = 0.01  # of the peak, where the cosine ends
    max_gradient_norm: float = 1.0  # clipped after unscaling and averaging
    ema_decay: float = 0.999  # of the averaged weights that are validated and saved as best
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the forward pass; losses are float32
    log_every: int = 20  # steps; rows of metrics.csv
    validate_every: int = 500  # steps
    checkpoint_every: int = 100  # steps; a killed run repeats at most these
    workers: int = 4  # processes that read patches (0 = none)
    deterministic: bool = True  # same command, same bits; a few GPU operations are slower
    start_from: Path | None = None  # best.pt of another run whose weights this one begins with

    def problems(self) -> Iterator[str]:
        if self.batch_size < 1 or self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size:
            yield f"batch_size: expected a multiple of train.micro_batch_size={self.micro_batch_size}, got {self.batch_size}"
        yield from outside(
            self, dict.fromkeys(("steps", "log_every", "validate_every", "checkpoint_every"), (1, 10**8))
        )
        yield from outside(self, {"batch_size": (1, 10**6), "workers": (0, 1024), "seed": (0, LARGEST_INT)})
        yield from outside(self, {"learning_rate_backbone": (1e-12, 10), "learning_rate_head": (1e-12, 10)})
        yield from outside(self, {"weight_decay": (0, 100), "max_gradient_norm": (1e-9, 1e9)})
        yield from outside(self, {"warmup_share": (0, 0.99), "floor_share": (0, 0.99), "ema_decay": (0, 0.9999999)})


@dataclasses.dataclass(frozen=True)
class Inference:
    tiling: Literal["exact", "blended"] = "exact"  # blended: half-overlapping windows, for group norm or SE
    tile_size: tuple[int, int, int] = (160, 512, 512)  # voxels of output computed at once; bounds the memory
    overlap: float = 0.5  # of blended windows of convert.patch_size
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # bfloat16 is about 3 times faster on recent CPUs and GPUs
    flips: bool = False  # test-time augmentation: average over the 8 flips (8 times slower)
    min_distance_angstrom: float = 300.0  # Å; of two closer picks only the better is kept (nearest real pair: 432 Å)
    min_score: float = 0.02  # weaker picks are not written
    max_picks: int = 50  # per tomogram

    def problems(self) -> Iterator[str]:
        if any(size % 32 for size in self.tile_size):
            yield f"tile_size: expected multiples of 32 voxels, got {list(self.tile_size)}"
        yield from outside(self, {"tile_size": (32, 8192), "overlap": (0, 0.9), "min_score": (1e-6, 0.999999)})
        yield from outside(self, {"min_distance_angstrom": (0, 1e6), "max_picks": (1, 10**5)})


@dataclasses.dataclass(frozen=True)
class Evaluation:
    task: Literal["one_per_tomogram", "every_motor"] = "one_per_tomogram"  # the BYU metric, or one-to-one matching
    tolerance_angstrom: float = 1000.0  # Å; a pick further off is wrong (the BYU rule)
    beta: float = 2.0  # of F-beta; 2 weighs a missed motor four times a false one
    bootstrap_resamples: int = 2000  # of the tomograms
    confidence: float = 0.95  # of the intervals
    seed: int = 0  # of the bootstrap and of the random baseline
    blob_sigmas_angstrom: tuple[float, ...] = (
        60.0,
        90.0,
        130.0,
        180.0,
        250.0,
        350.0,
        500.0,
    )  # Å, tried by the baseline

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"tolerance_angstrom": (1e-3, 1e6), "beta": (0.01, 100), "confidence": (0.5, 0.9999)})
        yield from outside(self, {"bootstrap_resamples": (100, 10**6), "seed": (0, LARGEST_INT)})
        yield from outside(self, {"blob_sigmas_angstrom": (1, 1e5)})
        if not self.blob_sigmas_angstrom:
            yield "blob_sigmas_angstrom: expected at least one length"


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path = Path("runs/motor_detection")  # of all runs' folders
    preset: str = "kaggle"  # begins the folder's name where run.name does not say another
    name: str | None = None  # folder under root; null = PRESET-<hash of the constants that shape the weights>

    def problems(self) -> Iterator[str]:
        yield from no_folder_names(self, ("preset", "name"))


@dataclasses.dataclass(frozen=True)
class Config:
    data: Data
    phantom: MotorPhantom
    convert: Convert
    heatmap: Heatmap
    model: Model
    loss: Loss
    augment: Augment
    train: Train
    inference: Inference
    evaluation: Evaluation
    run: Run

    def problems(self) -> Iterator[str]:
        local = self.model.norm == "batch" and not self.model.squeeze_excitation
        if self.inference.tiling == "exact" and not local:
            yield "inference.tiling: exact tiles need model.norm=batch and model.squeeze_excitation=false; expected blended"
        cells = math.prod(-(-size // 2 ** len(self.model.channels)) for size in self.convert.patch_size)
        if self.model.norm == "batch" and cells * self.train.micro_batch_size < 2:
            yield "train.micro_batch_size: batch norm needs 2 values per channel; give larger patches or micro-batches"
        if self.augment.turn > 0 and self.convert.patch_size[1] != self.convert.patch_size[2]:
            yield f"augment.turn: quarter turns need patches as high as wide, got {list(self.convert.patch_size)}; expected 0"


KAGGLE = Config(
    Data(), MotorPhantom(), Convert(), Heatmap(), Model(), Loss(), Augment(), Train(), Inference(), Evaluation(), Run()
)

PHANTOM = dataclasses.replace(
    KAGGLE,
    data=dataclasses.replace(KAGGLE.data, source="phantom", root=Path("data/generated/motor")),
    convert=dataclasses.replace(
        KAGGLE.convert, patch_size=(64, 96, 96), single=6.0, multi=2.0, hard_negative=1.0, negative=8.0
    ),
    model=dataclasses.replace(
        KAGGLE.model, channels=(8, 16, 32, 64, 96), fusion_channels=48, drop_path=0.0, dropout=0.0
    ),
    loss=dataclasses.replace(KAGGLE.loss, positive_weight=3.0),
    augment=dataclasses.replace(KAGGLE.augment, affine=0.7, rotation_degrees=45.0),
    train=dataclasses.replace(
        KAGGLE.train,
        steps=900,
        batch_size=8,
        micro_batch_size=8,
        learning_rate_backbone=2e-3,
        learning_rate_head=2e-3,
        ema_decay=0.99,
        log_every=10,
        validate_every=225,
        checkpoint_every=100,
        precision="float32",
        workers=0,
    ),
    inference=dataclasses.replace(KAGGLE.inference, flips=True),  # 8 times a few seconds
    run=Run(preset="phantom"),
)

PRESETS: dict[str, Config] = {"phantom": PHANTOM, "kaggle": KAGGLE}
