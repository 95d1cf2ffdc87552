"""The constants of em_segmentation: full-size defaults, each with unit and reason, and the presets made from them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.config import LARGEST_INT, configure, no_folder_names, outside
from common.errors import UserError
from data.phantoms.em_settings import EMPhantom
from em_segmentation.config_inference import Decoding, Evaluation, Inference
from em_segmentation.decoding.settings import settings_of
from em_segmentation.losses import fitting_problems
from em_segmentation.regions import Triple
from em_segmentation.turns import affinity_moves, turns_of

TargetName = Literal["semantic", "boundary", "affinity", "distance", "centre", "lsd"]
LossName = Literal["DiceLoss", "FocalLoss", "TverskyLoss", "DiceCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss",
                   "WeightedBCELoss", "MSELoss"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class System:
    num_gpus: int = 1  # 0 = CPU; else the most processes under torchrun, a GPU each (CPU where there is none)
    num_cpus: int = 0  # threads of torch per process; 0 = as many as torch takes by itself
    seed: int = 42  # of weights, patches, augmentation and dropout
    deterministic: bool = True  # same command, same bits; a few GPU operations are slower

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"num_gpus": (0, 65536), "num_cpus": (0, 4096), "seed": (0, LARGEST_INT)})


@dataclasses.dataclass(frozen=True)
class Data:
    source: Literal["phantom", "files"] = "files"  # phantom: simulated volumes, generated where root says
    root: Path = Path("data/generated/em")  # of the phantom
    train_image: tuple[
        str, ...
    ] = ()  # .npy, .h5:key, .zarr:key, .tif, slice folders; * = all that match, in natural order
    train_label: tuple[str, ...] = ()  # one per image, of its shape; several channels may hold several kinds of labels
    train_mask: tuple[str, ...] = ()  # one per image or none: 0 = not annotated, neither trained on nor judged
    train_sections: tuple[int, int] | None = None  # first and one past the last z that is used; null = all
    train_weights: tuple[float, ...] = ()  # how often each volume is drawn; empty = by its voxels
    val_image: tuple[
        str, ...
    ] = ()  # weights, thresholds and early stop are decided here; empty = the last weights are best
    val_label: tuple[str, ...] = ()
    val_mask: tuple[str, ...] = ()
    val_sections: tuple[int, int] | None = None
    test_image: tuple[str, ...] = ()  # judged once by eval.py; never seen in training
    test_label: tuple[str, ...] = ()
    test_mask: tuple[str, ...] = ()
    test_sections: tuple[int, int] | None = None
    image_axes: str = "auto"  # order of the axes in the image files: auto = zyx or czyx; xyz, zyxc ...
    label_axes: str = "auto"  # the same of labels and masks
    voxel_size_nm: tuple[float, float, float] | None = None  # nm, z y x; null = as the image files say
    patch_size: Triple = (112, 112, 112)  # voxels z, y, x
    batch_size: int = 4  # patches per forward pass
    num_workers: int = 4  # processes that read patches (0 = none)
    persistent_workers: bool = True  # validation's readers are kept between epochs too; training's always are
    use_cache: bool = False  # whole volumes in memory; for what fits
    min_foreground: float = 0.0  # share of labelled foreground that a training patch should have
    foreground_tries: int = 10  # draws before a patch with too little is taken all the same
    val_patches: int = 32  # at most, spread over the validation volumes
    augmentation: bool = True  # false switches all of the section augmentation off

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"patch_size": (1, 4096), "batch_size": (1, 65536), "num_workers": (0, 1024)})
        yield from outside(self, {"min_foreground": (0, 1), "foreground_tries": (1, 1000), "val_patches": (1, 10**6)})
        for role in ("train", "val", "test"):
            images, labels, masks = (getattr(self, f"{role}_{kind}") for kind in ("image", "label", "mask"))
            patterns = any("*" in name for name in (*images, *labels, *masks))
            if self.source == "phantom" and (images or labels or masks):
                yield f"{role}_image: given, but data.source is phantom; real volumes need --preset base (run.preset: base)"
            if not patterns and len(labels) != len(images) and (labels or role == "train"):
                yield f"{role}_label: expected one per image, got {len(labels)} for {len(images)}"
            if not patterns and masks and len(masks) != len(images):
                yield f"{role}_mask: expected one per image or none, got {len(masks)} for {len(images)}"
            sections = getattr(self, f"{role}_sections")
            if sections is not None and not 0 <= sections[0] < sections[1]:
                yield f"{role}_sections: expected [first, one past the last], got {list(sections)}"
        if self.train_weights and not all(weight > 0 for weight in self.train_weights):
            yield f"train_weights: expected numbers above 0, got {list(self.train_weights)}"
        if self.voxel_size_nm is not None:
            yield from outside(self, {"voxel_size_nm": (0.01, 1e6)})


@dataclasses.dataclass(frozen=True)
class Targets:
    names: tuple[TargetName, ...] = ("semantic",)  # what is learnt, in the order of the output's channels
    weights: tuple[float, ...] = (1.0,)  # of each target's loss
    label_channels: tuple[int, ...] = (0,)  # channel of the label volume that each target reads
    loss_functions: tuple[tuple[LossName, ...], ...] = ()  # per target; empty = model.loss_functions for each
    semantic_classes: int = 1  # 1: any id is foreground (sigmoid); K: classes 0 .. K-1 (softmax)
    semantic_names: tuple[str, ...] = ("foreground",)  # of the class, or of classes 1 .. K-1, in reports
    semantic_only: tuple[int, ...] = ()  # with one class: only these ids are foreground; empty = all but 0
    boundary_thickness: int = 1  # voxels on either side of a face between two objects
    boundary_in_plane: bool = False  # boundary, affinity_erosion: only faces along y and x, for thick sections
    affinity_offsets: tuple[Triple, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))  # voxels z, y, x; the first three direct
    affinity_stored_at: Literal["source", "destination"] = "source"  # at v: the edge v, v + o; or v - o, v
    affinity_erosion: int = 0  # voxels on either side of a face that are in no object, where labels touch each other
    distance_scale_nm: float = 100.0  # signed distance d to the object's border as tanh(d / scale)
    lsd_sigma_nm: float = 80.0  # of the Gaussian in which local shape is described

    def problems(self) -> Iterator[str]:
        if not self.names or len(set(self.names)) < len(self.names):
            yield f"names: expected different targets, got {list(self.names)}"
        for name in ("weights", "label_channels"):
            if len(getattr(self, name)) != len(self.names):
                yield f"{name}: expected one per target of targets.names ({len(self.names)}), got {len(getattr(self, name))}"
        if self.loss_functions and len(self.loss_functions) != len(self.names):
            yield f"loss_functions: expected one list per target ({len(self.names)}), got {len(self.loss_functions)}"
        yield from outside(self, {"weights": (1e-6, 1e6), "label_channels": (0, 1000), "semantic_classes": (1, 255)})
        yield from outside(self, {"boundary_thickness": (1, 100), "affinity_erosion": (0, 100)})
        yield from outside(self, {"distance_scale_nm": (0.1, 1e6), "lsd_sigma_nm": (0.1, 1e6)})
        if len(self.semantic_names) != max(1, self.semantic_classes - 1):
            yield f"semantic_names: expected {max(1, self.semantic_classes - 1)}, got {list(self.semantic_names)}"
        offsets = self.affinity_offsets
        if any(offset == (0, 0, 0) for offset in offsets) or len(set(offsets)) < len(offsets) or not offsets:
            yield f"affinity_offsets: expected different offsets other than [0, 0, 0], got {[list(o) for o in offsets]}"
        if self.semantic_only and self.semantic_classes > 1:
            yield "semantic_only: chooses ids for a single class; expected [] with targets.semantic_classes above 1"


@dataclasses.dataclass(frozen=True)
class Model:
    architecture: str = "basic_unet3d"  # see list_architectures(); monai_basic_unet3d ... are accepted too
    in_channels: int = 1
    out_channels: int = 0  # 0 = as many as the targets need; another number must be that one
    filters: tuple[int, ...] = (32, 32, 64, 128, 256, 32)  # per level (basic_unet3d: five and the last), unets only
    dropout: float = 0.0
    loss_functions: tuple[LossName, ...] = ("DiceLoss", "BCEWithLogitsLoss")
    loss_weights: tuple[float, ...] = (1.0, 1.0)
    positive_weight: float = 1.0  # of WeightedBCELoss
    tversky_alpha: float = 0.5  # of TverskyLoss: weight of false positives
    tversky_beta: float = 0.5  # weight of false negatives
    focal_gamma: float = 2.0
    fold: Triple = (1, 1, 1)  # rsunet: voxels z, y, x that become channels of one cell; (1, 2, 2) is four times as fast
    kernel_z: tuple[int, ...] = ()  # rsunet: edge of the kernel along z per level, 1 or 3; empty = from the voxel size
    norm: Literal["batch", "group"] = "batch"  # rsunet; batch: exact tiles at inference
    feature_size: int = 16  # unetr (16) and swin_unetr (24, 48): channels at full resolution
    mednext_size: Literal["S", "B", "M", "L"] = "S"
    mednext_kernel_size: Literal[3, 5, 7] = 3
    mednext_base_channels: int = 32  # from here on of mednext_custom
    mednext_exp_r: tuple[int, ...] = (2, 3, 4, 4, 4, 4, 4, 3, 2)
    mednext_block_counts: tuple[int, ...] = (2, 2, 2, 2, 2, 2, 2, 2, 2)
    mednext_grn: bool = False
    deep_supervision: bool = False  # mednext: losses at five scales
    activation_checkpointing: bool = False  # mednext: recompute instead of keep, for small GPUs; M and L always do
    start_from: Path | None = None  # best.pt to begin with: of this network, or of MedNeXt with smaller kernels

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"in_channels": (1, 1024), "out_channels": (0, 65536), "filters": (1, 8192)})
        yield from outside(
            self, {"fold": (1, 8), "dropout": (0, 0.99), "feature_size": (1, 8192), "mednext_base_channels": (1, 8192)}
        )
        yield from outside(self, {"mednext_exp_r": (1, 64), "mednext_block_counts": (1, 100), "loss_weights": (0, 1e6)})
        yield from outside(self, {"positive_weight": (1e-6, 1e6), "focal_gamma": (0, 100)})
        yield from outside(self, {"tversky_alpha": (0, 1), "tversky_beta": (0, 1)})
        if len(self.loss_weights) != len(self.loss_functions) or not self.loss_functions:
            yield f"loss_weights: expected one per loss function ({len(self.loss_functions)}), got {len(self.loss_weights)}"
        for name in ("mednext_exp_r", "mednext_block_counts"):
            if len(getattr(self, name)) != 9:
                yield f"{name}: expected 9 numbers (four levels down, the bottom, four up), got {len(getattr(self, name))}"
        if any(edge not in (1, 3) for edge in self.kernel_z) or len(self.kernel_z) not in (0, len(self.filters)):
            yield f"kernel_z: expected 1 or 3 for each of the {len(self.filters)} levels, got {list(self.kernel_z)}"


@dataclasses.dataclass(frozen=True)
class Augmentation:
    flip: float = 0.5  # probability per axis
    turn: float = 0.5  # probability of quarter turns in the y-x plane (needs square patches)
    permute: bool = False  # turns over all three axes, for isotropic voxels and cubic patches
    affine: float = 0.3  # probability of a small rotation and scaling in the y-x plane
    rotation_degrees: float = 30.0  # uniform in +-
    scale: float = 0.1  # uniform in 1 +-
    elastic: float = 0.2  # probability of a smooth random warp
    elastic_spacing_nm: float = 400.0  # between the knots of the warp
    elastic_amplitude_nm: float = 40.0  # standard deviation of their displacement
    intensity: float = 0.7  # probability of contrast, brightness and gamma changes
    contrast: float = 0.3  # factor uniform in 1 +-
    brightness: float = 0.3  # standard deviations, uniform in +-
    gamma: float = 0.3  # exponent exp(uniform in +-)
    section_intensity: float = 0.2  # probability that every section has its own contrast and brightness
    noise: float = 0.3  # probability of Gaussian noise
    noise_level: float = 0.3  # standard deviations, uniform from 0
    blur: float = 0.2  # probability of a Gaussian blur in the y-x plane
    blur_voxels: float = 1.5  # sigma, uniform from 0
    missing_section: float = 0.1  # probability of blank sections
    missing_sections: int = 2  # at most per patch
    misaligned: float = 0.1  # probability that all sections from one on are shifted (labels too)
    misalignment_voxels: int = 8  # at most
    motion_blur: float = 0.1  # probability of a section smeared along one direction
    motion_voxels: int = 9  # length of the smear, at most
    cut_out: float = 0.1  # probability of boxes of constant grey
    cut_noise: float = 0.1  # probability of boxes of strong noise
    cut_share: float = 0.3  # of the patch's edges, uniform from a quarter of it
    one_defect: bool = True  # at most one of missing, misaligned, motion blur, cut-out, cut-noise per patch

    def problems(self) -> Iterator[str]:
        chances = ("flip", "turn", "affine", "elastic", "intensity", "section_intensity", "noise", "blur")
        defects = ("missing_section", "misaligned", "motion_blur", "cut_out", "cut_noise")
        yield from outside(self, dict.fromkeys((*chances, *defects), (0, 1)))
        yield from outside(self, {"rotation_degrees": (0, 180), "scale": (0, 0.9), "contrast": (0, 0.9)})
        yield from outside(self, {"brightness": (0, 100), "gamma": (0, 3), "noise_level": (0, 100)})
        yield from outside(
            self, {"blur_voxels": (0, 50), "missing_sections": (1, 1000), "misalignment_voxels": (1, 1000)}
        )
        yield from outside(self, {"motion_voxels": (2, 1000), "cut_share": (0.01, 1)})
        yield from outside(self, {"elastic_spacing_nm": (1, 1e6), "elastic_amplitude_nm": (0, 1e5)})


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["AdamW", "SGD"] = "AdamW"
    lr: float = 1e-3  # peak
    weight_decay: float = 1e-2  # of weights only (no biases, no norms)
    momentum: float = 0.9  # of SGD (Nesterov)

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"lr": (1e-12, 10), "weight_decay": (0, 100), "momentum": (0, 0.9999)})


@dataclasses.dataclass(frozen=True)
class Scheduler:
    name: Literal["cosine", "step", "plateau", "constant"] = "cosine"
    warmup_epochs: float = 1.0  # linear; a fraction is allowed
    min_lr: float = 1e-6  # where cosine and plateau end
    step_epochs: int = 50  # step: after so many epochs the rate falls
    factor: float = 0.1  # step and plateau: to this share
    patience: int = 10  # plateau: epochs without improvement of early_stopping.monitor that are borne, as torch counts

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"warmup_epochs": (0, 10**6), "min_lr": (0, 10), "step_epochs": (1, 10**6)})
        yield from outside(self, {"factor": (1e-6, 1), "patience": (1, 10**6)})


@dataclasses.dataclass(frozen=True)
class Training:
    max_epochs: int = 100
    steps_per_epoch: int = 1000  # optimizer steps between two validations; patches are drawn without end
    precision: Literal["32", "16-mixed", "bf16-mixed"] = "32"  # of the forward pass; losses are float32
    gradient_clip_val: float = 1.0  # of the gradient's norm, after unscaling and averaging
    accumulate_grad_batches: int = 1  # forward passes per optimizer step, all processes together
    ema_decay: float = 0.999  # of the averaged weights that are validated and saved as best; 0 = no average

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"max_epochs": (1, 10**6), "steps_per_epoch": (1, 10**7)})
        yield from outside(self, {"gradient_clip_val": (1e-9, 1e9), "accumulate_grad_batches": (1, 10**5)})
        yield from outside(self, {"ema_decay": (0, 0.9999999)})


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    monitor: str = "val_loss"  # a column of metrics.csv; decides which weights are best
    mode: Literal["min", "max"] = "min"
    save_top_k: int = 1  # best weights kept: best.pt, and from 2 on epoch-0012.pt ...
    save_last: bool = True  # last.pt, from which a killed run continues
    every_n_steps: int = 100  # of last.pt; a killed run repeats at most these

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"save_top_k": (1, 100), "every_n_steps": (1, 10**8)})


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 0  # epochs without improvement before training ends; 0 = never

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"patience": (0, 10**6)})


@dataclasses.dataclass(frozen=True)
class Logging:
    log_every_n_steps: int = 20  # rows of metrics.csv
    pictures: bool = True  # figures/validation.png after every validation

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"log_every_n_steps": (1, 10**8)})


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path = Path("runs/em_segmentation")  # of all runs' folders
    preset: str = "base"  # begins the folder's name where run.name does not say another
    name: str | None = None  # folder under root; null = PRESET-<hash of the constants that shape the weights>

    def problems(self) -> Iterator[str]:
        yield from no_folder_names(self, ("preset", "name"))


@dataclasses.dataclass(frozen=True)
class Config:
    system: System
    model: Model
    data: Data
    phantom: EMPhantom
    targets: Targets
    augmentation: Augmentation
    optimizer: Optimizer
    scheduler: Scheduler
    training: Training
    checkpoint: Checkpoint
    early_stopping: EarlyStopping
    logging: Logging
    inference: Inference
    decoding: Decoding
    evaluation: Evaluation
    run: Run

    def problems(self) -> Iterator[str]:
        yield from fitting_problems(self.targets, self.model)
        decoding, targets = self.decoding, self.targets
        needed = "semantic" if decoding.target == "membrane" else decoding.target
        if needed != "none" and needed not in targets.names:
            yield f"decoding.target: {decoding.target} needs {needed} among targets.names, got {list(targets.names)}"
        if needed == "semantic" and targets.semantic_classes > 1:
            yield f"decoding.target: {decoding.target} needs a single class (targets.semantic_classes=1)"
        if decoding.target == "semantic" and decoding.method != "components":
            yield "decoding.method: the pieces of a semantic class are components; expected decoding.method=components"
        if needed in ("boundary", "semantic") and decoding.method == "mutex":
            yield "decoding.method: mutex needs affinities; expected decoding.target=affinity"
        yield from self._impossible_classes()
        yield from self._impossible_decoding()

    def _impossible_classes(self) -> Iterator[str]:
        exclusive, targets = self.decoding.exclusive_classes, self.targets
        if exclusive and ("semantic" not in targets.names or targets.semantic_classes == 1):
            yield "decoding.exclusive_classes: needs several semantic classes; expected decoding.exclusive_classes=[]"
        elif exclusive:
            classes = list(range(1, targets.semantic_classes))
            if len(set(exclusive)) < max(2, len(exclusive)) or not set(exclusive) <= set(classes):
                yield f"decoding.exclusive_classes: expected [], or two or more of {classes}, got {list(exclusive)}"

    def _impossible_decoding(self) -> Iterator[str]:
        """What only prediction would meet, after the training."""
        targets, patch = self.targets, self.data.patch_size
        if "affinity" in targets.names:
            for offset in targets.affinity_offsets:
                if any(abs(step) >= edge for step, edge in zip(offset, patch, strict=True)):
                    yield (
                        f"targets.affinity_offsets: {list(offset)} leaves every patch of data.patch_size={list(patch)}; "
                        "expected shorter ones, or larger patches"
                    )
        if list(self.decoding.problems()):
            return  # they are told already
        try:
            if self.decoding.target != "none":
                settings_of(self.decoding, targets, self.decoding.threshold)
            if "affinity" in targets.names:
                for turn in turns_of(self.inference.tta):
                    affinity_moves(turn, targets.affinity_offsets, targets.affinity_stored_at)
        except UserError as error:
            yield from error.problems


BASE = Config(
    System(), Model(), Data(), EMPhantom(), Targets(), Augmentation(), Optimizer(), Scheduler(), Training(), Checkpoint(),
    EarlyStopping(), Logging(), Inference(), Decoding(), Evaluation(), Run(),
)  # fmt: skip
PHANTOM = configure(BASE, [Path(__file__).parent / "tutorials" / "phantom.yaml"], [])

PRESETS: dict[str, Config] = {"phantom": PHANTOM, "base": BASE}
