"""Where a config's tomograms, labels, patches and runs lie; the phantom is generated on first use."""

import dataclasses
import hashlib
from pathlib import Path

import yaml

from common.config import UNREADABLE_YAML, as_yaml, fingerprint
from common.errors import config_error, data_error
from data.phantoms.motor import write_phantom
from motor_detection.config import Config, Convert, Data, Heatmap
from motor_detection.labels import LabelledTomogram, match_tomograms, read_labels


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """All that a folder of patches depends on."""

    convert: Convert
    heatmap: Heatmap
    stride: int
    voxel_spacing_angstrom: float


def resolve_data(config: Config) -> Data:
    """The data section with real paths: files must exist as given; the phantom is generated beside data.root."""
    if config.data.source == "files":
        return config.data
    folder = config.data.root.with_name(f"{config.data.root.name}-{fingerprint(config.phantom)}")
    labels = write_phantom(config.phantom, folder, config.convert.producers)
    patches = folder / f"patches-{fingerprint(convert_settings(config))}"
    return dataclasses.replace(config.data, root=folder / "train", labels=labels, patches=patches)


def convert_settings(config: Config) -> ConvertSettings:
    # the number of producers changes nothing that is written
    same = dataclasses.replace(config.convert, producers=1)
    return ConvertSettings(same, config.heatmap, config.model.stride, config.data.voxel_spacing_angstrom)


def same_cut(recorded: str, settings: str) -> bool:
    """Whether two texts of ConvertSettings cut the same patches; their heat maps may differ."""
    try:
        one, other = yaml.safe_load(recorded), yaml.safe_load(settings)
    except UNREADABLE_YAML:
        return False
    names = ("convert", "voxel_spacing_angstrom")
    return isinstance(one, dict) and all(name in one and one[name] == other[name] for name in names)


def read_tomograms(data: Data, told: bool) -> tuple[list[LabelledTomogram], dict[str, Path]]:
    """Labelled tomograms that are not excluded, and each one's path; told: print the table's contradictions."""
    labelled, warnings = read_labels(data.labels)
    paths, more = match_tomograms(labelled, data.root)
    used = [tomogram for tomogram in labelled if tomogram.fold >= 0]
    if not used:
        raise data_error(f"{data.labels}: every tomogram has fold -1 (excluded); expected folds from 0 on")
    for warning in [*warnings, *more] if told else []:
        print(f"warning: {warning}")
    return used, paths


def tomograms_of_fold(tomograms: list[LabelledTomogram], fold: int, name: str) -> list[LabelledTomogram]:
    """The tomograms of one fold; an empty one is an error that lists the folds there are."""
    chosen = [tomogram for tomogram in tomograms if tomogram.fold == fold]
    if not chosen:
        folds = sorted({tomogram.fold for tomogram in tomograms})
        raise config_error(f"{name}: no tomogram of the label table is in fold {fold}; its folds are {folds}")
    return chosen


def check_has_motors(tomograms: list[LabelledTomogram], fold: int, name: str) -> None:
    """Without a motor in a fold neither recall nor F-beta is defined on it."""
    if not any(len(tomogram.motors) for tomogram in tomograms):
        raise config_error(
            f"{name}: no motor in the {len(tomograms)} tomograms of fold {fold}; choose a fold with some"
        )


def training_identity(config: Config) -> str:
    """YAML of the sections that shape the weights: what a run's folder and its checkpoints must agree on."""
    same = dataclasses.replace(config.train, workers=0, checkpoint_every=1)  # these change no bit
    cut = dataclasses.replace(config.convert, producers=1)  # nor does this
    config = dataclasses.replace(config, train=same, convert=cut)
    sections = {
        name: getattr(config, name)
        for name in ("data", "phantom", "convert", "heatmap", "model", "loss", "augment", "train")
    }
    return "".join(f"{name}:\n{as_yaml(section)}" for name, section in sections.items())


def run_folder(config: Config) -> Path:
    """runs/motor_detection/PRESET-<hash of what shapes the weights>, or run.name."""
    digest = hashlib.sha256(training_identity(config).encode()).hexdigest()[:8]
    return config.run.root / (config.run.name if config.run.name is not None else f"{config.run.preset}-{digest}")
