"""The constants of histo_mmnet: full-size defaults, each with unit and reason, and the presets made from them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.config import LARGEST_INT, no_folder_names, outside
from common.metrics.classification import Criterion
from data.phantoms.histo_settings import HistoPhantom
from histo_mmnet.scan import DoubledPolicy

Protocol = Literal["accession", "slide", "official"]


@dataclasses.dataclass(frozen=True)
class Data:
    source: Literal["phantom", "files"] = "files"  # phantom: simulated, generated below root
    root: Path | None = None  # the folder of BreaKHis_v1; null = the environment variable BREAKHIS_ROOT
    doubled: DoubledPolicy = (
        "drop"  # of accession 14-13412, which stands under DC and LC; ductal, lobular: that one stays
    )
    image_size: tuple[int, int] = (224, 224)  # pixels y, x; 700 x 460 is squeezed, as the original does
    normalisation: Literal["none", "macenko", "reinhard"] = "none"  # of the stain of every image
    nesting: bool = True  # composites show fields that lie inside each other, where photographs tell
    use_cache: bool = True  # resized images stay in memory: 150 kB each, 1.2 GB for BreakHis

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"image_size": (32, 2048)})
        if self.source == "phantom" and self.root is None:
            yield "root: expected a folder to simulate into for data.source=phantom, got null"


@dataclasses.dataclass(frozen=True)
class Split:
    protocol: Protocol = "accession"  # slide folds, and the official ones, share patients
    num_folds: int = 5
    seed: int = 42
    official: Path | None = None  # folder of dsfold1.txt ... dsfold5.txt

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"num_folds": (2, 100), "seed": (0, LARGEST_INT)})
        if self.protocol == "official" and self.official is None:
            yield "official: expected the folder of dsfold1.txt ... dsfold5.txt for split.protocol=official"
        if self.protocol != "official" and self.num_folds < 3:
            yield "num_folds: expected at least 3: one fold is tested, one validates, the others train"


@dataclasses.dataclass(frozen=True)
class Model:
    architecture: Literal["mmnet", "compact"] = "mmnet"
    backbone: str = "efficientnet_b1"  # of common/backbones
    stages: int = 0  # of a ResNet, the first so many; 0 = all; images of 76 x 116 are 3 x 4 cells in its last
    shared: bool = False  # one backbone for all magnifications; the original has one each
    width: int = 512  # of the fusion; a multiple of 4
    dropout: float = 0.75  # before the last layer
    pretrained: Path | None = None  # torchvision's weights of the backbone
    frozen: bool = False  # compact: the backbone is not trained
    bag: int = 16  # compact: photographs of a patient in a training bag; judged are all of them

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"width": (4, 4096), "dropout": (0, 0.99), "stages": (0, 4), "bag": (1, 10**4)})
        if self.stages and self.pretrained is not None:
            yield "stages: pretrained weights are of all stages; expected 0"
        if self.width % 4:
            yield f"width: expected a multiple of 4 (heads of attention), got {self.width}"
        if self.frozen and self.architecture != "compact":
            yield "frozen: is for model.architecture=compact"
        if self.frozen and self.pretrained is None:
            yield "pretrained: expected weights for model.frozen=true: a frozen backbone stays as it was drawn"


@dataclasses.dataclass(frozen=True)
class Augment:
    flips: float = 0.5  # probability, along each axis
    rotation_degrees: float = 15.0  # at most, either way
    brightness: float = 0.2  # shares at most, either way
    contrast: float = 0.2
    saturation: float = 0.1
    blur: float = 0.1  # probability of a Gaussian of 0.5 to 1.5 pixels
    stain: float = 0.2  # amounts of haematoxylin and eosin, shares at most, either way; 0 = none
    stain_shift: float = 0.05  # added to them, in shares of their strength
    missing_view: float = 0.15  # probability that a magnification is hidden in training; one always stays

    def problems(self) -> Iterator[str]:
        shares = dict.fromkeys(
            ("flips", "brightness", "contrast", "saturation", "blur", "stain", "stain_shift"), (0.0, 0.9)
        )
        yield from outside(self, shares | {"rotation_degrees": (0, 180), "missing_view": (0, 0.9)})


@dataclasses.dataclass(frozen=True)
class Loss:
    focal_alpha: float = 0.5  # weight of malignant; benign has 1 - alpha; 0.5 weighs both alike
    focal_gamma: float = 3.0
    label_smoothing: float = 0.1
    view_weight: float = 0.5  # of the loss of each photograph by itself, beside that of the composite
    mixup_alpha: float = 0.2  # of Beta(alpha, alpha); one draw and one partner for all views; 0 = none

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"focal_alpha": (0.01, 0.99), "focal_gamma": (0, 10), "label_smoothing": (0, 0.5)})
        yield from outside(self, {"mixup_alpha": (0, 10), "view_weight": (0, 100)})
        if 0 < self.focal_gamma < 1:
            yield "focal_gamma: expected 0 or at least 1: between them the gradient is infinite where p = t"


@dataclasses.dataclass(frozen=True)
class Train:
    epochs: int = 25
    batch_size: int = 32  # composites per optimizer step, on all devices together; the original means 16 x 2
    micro_batch_cuda: int = 16  # composites at once per device
    micro_batch_mps: int = 8
    micro_batch_cpu: int = 4
    epoch_multiplier: float = 3.0  # composites per epoch, in images of the magnification with most of a slide
    learning_rate: float = 1e-4
    weight_decay: float = 3e-3
    scheduler_patience: int = 3  # epochs without gain that are borne before the rate falls, as torch counts
    scheduler_factor: float = 0.5
    patience: int = 7  # epochs without a better validation balanced accuracy after which training ends; 0 = never
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.0  # of averaged weights, which are judged and kept; 0 = the weights themselves
    single_magnifications: bool = True  # train.py also trains the baseline of each magnification
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    workers: int = 0  # reading processes
    deterministic: bool = True
    seed: int = 42

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"epochs": (1, 10**5), "batch_size": (1, 10**5), "epoch_multiplier": (0.01, 1000)})
        yield from outside(self, dict.fromkeys(("micro_batch_cuda", "micro_batch_mps", "micro_batch_cpu"), (1, 10**4)))
        yield from outside(self, {"learning_rate": (1e-8, 10), "weight_decay": (0, 10), "scheduler_factor": (0.01, 1)})
        yield from outside(self, {"scheduler_patience": (1, 10**5), "patience": (0, 10**5), "workers": (0, 1024)})
        yield from outside(
            self, {"max_gradient_norm": (1e-6, 1e6), "ema_decay": (0, 0.99999), "seed": (0, LARGEST_INT)}
        )
        for device in ("cuda", "mps", "cpu"):
            micro = getattr(self, f"micro_batch_{device}")
            if self.batch_size % micro:
                yield f"batch_size: {self.batch_size} is no multiple of micro_batch_{device}={micro}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    flips: bool = False  # average over flips of the images
    threshold: Literal["pooled", "fold"] = (
        "pooled"  # of validation patients of all folds (not tested ones), or of its own
    )
    threshold_for: Criterion = (
        "balanced_accuracy"  # what it maximises; f1, as the original has it, favours the larger class
    )
    gradcam_layer: str = ""  # of the backbone, as its weights are named (layer3); "" = its last map
    confidence: float = 0.95
    bootstrap_resamples: int = 2000  # of patients
    seed: int = 0

    def problems(self) -> Iterator[str]:
        yield from outside(
            self, {"confidence": (0.5, 0.9999), "bootstrap_resamples": (100, 10**6), "seed": (0, LARGEST_INT)}
        )


@dataclasses.dataclass(frozen=True)
class Run:
    root: Path = Path("runs/histo_mmnet")  # of all runs' folders
    preset: str = "breakhis"  # begins the folder's name where run.name does not say another
    name: str | None = None  # folder under root; null = PRESET-<hash of the constants that shape the weights>

    def problems(self) -> Iterator[str]:
        yield from no_folder_names(self, ("preset", "name"))


@dataclasses.dataclass(frozen=True)
class Config:
    run: Run = dataclasses.field(default_factory=Run)
    data: Data = dataclasses.field(default_factory=Data)
    phantom: HistoPhantom = dataclasses.field(default_factory=HistoPhantom)
    split: Split = dataclasses.field(default_factory=Split)
    model: Model = dataclasses.field(default_factory=Model)
    augment: Augment = dataclasses.field(default_factory=Augment)
    loss: Loss = dataclasses.field(default_factory=Loss)
    train: Train = dataclasses.field(default_factory=Train)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


BREAKHIS = Config()
PHANTOM = Config(
    run=Run(preset="phantom"),
    data=Data(source="phantom", root=Path("data/generated/histo"), image_size=(76, 116), normalisation="macenko"),
    model=Model(backbone="resnet18", stages=2, shared=True, width=64, dropout=0.3),  # of plain convolutions: fast in bfloat16
    augment=Augment(rotation_degrees=0.0, brightness=0.1, contrast=0.1, blur=0.0, stain=0.1),
    loss=Loss(focal_gamma=0.0, label_smoothing=0.0, mixup_alpha=0.0, view_weight=1.0),
    train=Train(
        epochs=6, epoch_multiplier=2.0, batch_size=8, micro_batch_cuda=8, micro_batch_mps=8, micro_batch_cpu=8,
        learning_rate=5e-4, ema_decay=0.98, precision="bfloat16",
    ),
    evaluation=Evaluation(flips=True),
)  # fmt: skip
PRESETS = {"phantom": PHANTOM, "breakhis": BREAKHIS}
