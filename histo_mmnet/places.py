"""Where a config's images and runs lie, and which images each trial trains, validates and tests on."""

import dataclasses
import hashlib
from pathlib import Path

from common.config import as_yaml, fingerprint
from common.errors import config_error, data_error
from data.phantoms.histo import write_phantom
from histo_mmnet.config import Config, Split
from histo_mmnet.nesting import nesting_of, read_nesting, write_nesting
from histo_mmnet.scan import INSIDE, Image, counts_of, differences, find_breast, published_counts, scan, without_doubled
from histo_mmnet.slides import Album, Nesting, Slide, slides_of
from histo_mmnet.splits import ROLES, Role, Trial, fold_trials, read_official, read_split, write_split

SHAPING = ("data", "phantom", "split", "model", "augment", "loss", "train")
PRODUCERS = 2  # processes that simulate patients
VALIDATION_FOLDS = 5  # of the training accessions of an official trial, one validates


@dataclasses.dataclass(frozen=True)
class Collection:
    """The images that are used, and the trials they are divided into."""

    images: list[Image]
    trials: list[Trial]
    told: list[str]  # what a user should know of them
    nesting: Nesting  # which photograph lies inside which


def find_images(config: Config) -> tuple[list[Image], list[str]]:
    """All images of a config, sorted, and lines about them; the phantom is simulated on first use."""
    data = config.data
    if data.source == "phantom":
        assert data.root is not None, "The phantom's config says where it is simulated"
        if holds_images(data.root):
            raise config_error(
                f"data.root: {data.root} holds photographs, but data.source=phantom simulates patients; give --preset "
                "breakhis, or data.source=files"
            )
        folder = data.root.with_name(f"{data.root.name}-{fingerprint(config.phantom)}")
        images = scan(write_phantom(config.phantom, folder, PRODUCERS))
        return images, [f"SIMULATED patients, {len(images):,} images: {folder}"]
    breast = find_breast(data.root)
    images = scan(breast)
    told = [f"images: {breast}", *differences(counts_of(images), published_counts())]
    images, dropped = without_doubled(images, data.doubled)
    return images, told + dropped


def holds_images(folder: Path) -> bool:
    """Whether BreakHis, or anything laid out like it, lies in a folder."""
    return folder.is_dir() and any((folder / inside / "benign").is_dir() for inside in INSIDE)


def collect(config: Config) -> Collection:
    """The images and the trials of a config. Raises a config error where they cannot be divided as it says."""
    images, told = find_images(config)
    trials = trials_of(images, config.split)
    for trial in trials:
        check_classes(trial)
    return Collection(images, trials, told, {})


def trials_of(images: list[Image], split: Split) -> list[Trial]:
    """The trials of images under a protocol."""
    names = [image.name for image in images]
    if split.protocol != "official":
        return fold_trials(names, split.protocol, split.num_folds, split.seed)
    assert split.official is not None, "Checked by Split.problems"
    there = set(names)
    return [with_validation(trial.restricted(there), split.seed) for trial in read_official(split.official)]


def with_validation(trial: Trial, seed: int) -> Trial:
    """An official trial, which has none, with a fifth of its training accessions to validate on."""
    training = trial.of("train")
    if not training:
        raise config_error(f"split.official: trial {trial.number} has no training image in data.root")
    for label, words in enumerate(("benign", "malignant")):
        there = len({name.accession for name in training if name.label == label})
        if there < VALIDATION_FOLDS:
            raise config_error(
                f"split.official: trial {trial.number} trains on {there} {words} accessions of data.root; expected at least "
                f"{VALIDATION_FOLDS}, of which one in {VALIDATION_FOLDS} validates"
            )
    held = set(fold_trials(training, "accession", VALIDATION_FOLDS, seed)[0].of("test"))
    roles = tuple("val" if name in held else role for name, role in zip(trial.names, trial.roles, strict=True))
    return dataclasses.replace(trial, roles=roles)


def check_classes(trial: Trial) -> None:
    """Every role needs both classes."""
    for role in ROLES:
        labels = {name.label for name in trial.of(role)}
        if len(labels) < 2:
            missing = "an image" if not labels else ("malignant" if 0 in labels else "benign")
            raise config_error(
                f"split: trial {trial.number} has no {missing} to {role} on; expected both classes: fewer folds, or more data"
            )


def images_of(collection: Collection, trial: Trial, role: Role) -> list[Image]:
    """The images of a role of a trial, sorted."""
    wanted = {name for name, own in zip(trial.names, trial.roles, strict=True) if own == role}
    return [image for image in collection.images if image.name in wanted]


def slides_of_role(collection: Collection, trial: Trial, role: Role) -> list[Slide]:
    """The slides of a role of a trial."""
    return slides_of(images_of(collection, trial, role), collection.nesting)


def with_recorded_split(collection: Collection, folder: Path) -> Collection:
    """The collection with the trials that a run began with, from its split.csv; written where there is none yet.

    So networks are tested on those whom they never saw, whatever became of data.root or of the way folds are made. Raises a
    data error where other images are there now.
    """
    path = folder / "split.csv"
    if not path.exists():
        write_split(path, collection.trials)
        return collection
    recorded = read_split(path)
    then = {(trial.number, name.file) for trial in recorded for name in trial.names}
    now = {(trial.number, name.file) for trial in collection.trials for name in trial.names}
    if then != now:
        trial, first = min(then ^ now)
        what = f"{first} of fold {trial} is {'new' if (trial, first) in now else 'missing'}"
        raise data_error(
            f"{path}: the run began with {len(then):,} rows of images and folds, data.root gives {len(now):,} now ({what}); "
            "restore them, give another run.name, or --fresh without --fold"
        )
    return dataclasses.replace(collection, trials=recorded)


def with_nesting(collection: Collection, config: Config, folder: Path) -> Collection:
    """The collection with which photograph lies inside which, as a run's nesting.csv says; made where it is missing."""
    if not config.data.nesting:
        return collection
    path = folder / "nesting.csv"
    if not path.exists():
        slides = slides_of(collection.images, {})
        write_nesting(path, nesting_of(slides, Album.of(config)))
    return dataclasses.replace(collection, nesting=read_nesting(path, collection.images))


def training_identity(config: Config) -> str:
    """YAML of the sections that shape the weights: what a run's folder and its checkpoints must agree on.

    Where the images lie does not: a checkpoint knows their names and sizes.
    """
    train = dataclasses.replace(config.train, workers=0, single_magnifications=True)
    same = dataclasses.replace(config, train=train,
                               data=dataclasses.replace(config.data, use_cache=False, root=None))  # fmt: skip
    return "".join(f"{name}:\n{as_yaml(getattr(same, name))}" for name in SHAPING)


def run_folder(config: Config) -> Path:
    """runs/histo_mmnet/PRESET-<hash of what shapes the weights>, or run.name."""
    digest = hashlib.sha256(training_identity(config).encode()).hexdigest()[:8]
    return config.run.root / (config.run.name if config.run.name is not None else f"{config.run.preset}-{digest}")
