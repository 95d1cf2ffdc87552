"""From predictions to figures: thresholds on the validation volumes, each test volume judged once, baselines alike.

Volumes are judged one at a time and whole: about 30 bytes per voxel of the largest one, and while thresholds are tried
one set of ids for each. That is fine up to a few hundred million voxels; judge a cut-out of anything larger.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.files import file_digest, read_text
from common.logbook import progress
from common.metrics.segmentation import dice, jaccard
from common.volumes.volume import Volume
from em_segmentation.class_maps import classes_identity, write_classes
from em_segmentation.config import Config
from em_segmentation.config_inference import Evaluation
from em_segmentation.decoding.settings import Settings, settings_of
from em_segmentation.evaluation import (
    ByteHistogram,
    Bytes,
    Curve,
    Found,
    Ids,
    Mask,
    Truth,
    best_mask_threshold,
    boundary_figure,
    dark_as_boundary,
    instance_figures,
    interval_of_counts,
    interval_of_rand,
    jaccard_curve,
    mask_counts,
    otsu_threshold,
    overlap_pieces,
    rand_error,
    truth_of,
)
from em_segmentation.inference import written_channels
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.prediction import (
    Source,
    decoded_channels,
    forget_others,
    instances_identity,
    note_of,
    segment_sections,
    whole,
    write_instances,
    write_prediction,
)
from em_segmentation.volumes import Annotated, Role

MIDDLE = 128  # of bytes: the threshold where no validation volume says better
Figures = dict[str, float | int | str]
Roles = dict[Role, list[Annotated]]
Predictions = dict[Role, list[Volume]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The figures of a run, how thresholds were chosen, and what the pictures show of the first test volume."""

    figures: Figures
    curves: list[Curve]
    classes: npt.NDArray[np.uint8] | None  # found, [z, y, x]; None without a semantic target
    instances: Found | None  # found, [z, y, x]; None without decoding


def predict_role(
    model: SegmentationModel, volumes: list[Annotated], config: Config, weights: Path, folder: Path, role: str
) -> list[Volume]:
    """The predictions of a role's volumes in a folder; what an earlier call of the same weights finished is kept."""
    digest = file_digest(weights)
    found = []
    for number, volume in enumerate(volumes):
        source = Source(volume.image, volume.scale, volume.sections, volume.voxel_size_nm, digest)
        path = folder / f"{role}_{number}_prediction.npy"
        forget_others(path, source.identity(config))
        found.append(write_prediction(model, source, config, path))
    return found


def check_judged(volume: Annotated, config: Config) -> None:
    """A config error for a volume that the network cannot read or that has not the labels to judge it by."""
    if volume.image.num_channels != config.model.in_channels:
        raise config_error(
            f"{volume.image.path}: has {volume.image.num_channels} channels, the network takes {config.model.in_channels}"
        )
    needed = [truth_channel(config)] if config.decoding.target != "none" else []
    if "semantic" in config.targets.names:
        needed.append(config.targets.label_channels[config.targets.names.index("semantic")])
    if volume.label is None:
        raise config_error(f"{volume.image.path}: has no labels; expected labelled volumes to judge the weights on")
    if max(needed, default=0) >= volume.label.num_channels:
        raise config_error(
            f"{volume.label.path}: has {volume.label.num_channels} channels, expected at least {max(needed) + 1} "
            "(targets.label_channels, decoding.label_channel)"
        )


def judge(roles: Roles, predictions: Predictions, config: Config, folder: Path) -> Verdict:
    """All figures of the test volumes; everything that is chosen is chosen on the validation volumes."""
    if not any(annotated_of(volume).any() for volume in roles["test"]):
        raise data_error("test: no voxel is annotated (data.test_mask); expected some to judge")
    verdict = Verdict(
        {"test_volumes": len(roles["test"]), "validation_volumes": len(roles["val"])}, [], None, None
    )  # fmt: skip
    if "semantic" in config.targets.names:
        verdict = judge_semantic(verdict, roles, predictions, config, folder)
    if config.decoding.target != "none":
        verdict = judge_instances(verdict, roles, predictions, config, folder)
    return verdict


def labels_of(volume: Annotated, channel: int) -> Ids:
    """One channel of a volume's labels, whole."""
    labels: Ids = volume.read_labels((0, 0, 0), volume.shape)[channel]
    return labels


def annotated_of(volume: Annotated) -> Mask:
    known: Mask = volume.read_annotated((0, 0, 0), volume.shape)[0]
    return known


def image_of(volume: Annotated) -> npt.NDArray[np.float32]:
    """The first channel, whole, in standard deviations."""
    image: npt.NDArray[np.float32] = volume.read_image((0, 0, 0), volume.shape)[0]
    return image


def semantic_truth(volume: Annotated, config: Config) -> npt.NDArray[np.uint8]:
    """Classes [z, y, x]: 0 or 1 for a single class, else as labelled; a data error for classes that there are not."""
    targets = config.targets
    labels = labels_of(volume, targets.label_channels[targets.names.index("semantic")])
    if targets.semantic_classes == 1:
        return (np.isin(labels, targets.semantic_only) if targets.semantic_only else labels != 0).astype(np.uint8)
    labels = np.where(annotated_of(volume), labels, 0)
    if labels.min() < 0 or labels.max() >= targets.semantic_classes:
        assert volume.label is not None
        raise data_error(
            f"{volume.label.path}: holds the classes {labels.min()} to {labels.max()}; expected 0 to "
            f"{targets.semantic_classes - 1} (targets.semantic_classes), or a mask over the others"
        )
    return labels.astype(np.uint8)


def judge_semantic(verdict: Verdict, roles: Roles, predictions: Predictions, config: Config, folder: Path) -> Verdict:
    """Adds Jaccard index and Dice of each class, the Jaccard index with its interval and beside Otsu's threshold."""
    targets, threshold = config.targets, config.decoding.class_threshold
    figures, curves = dict(verdict.figures), list(verdict.curves)
    if targets.semantic_classes == 1 and roles["val"]:
        values = mask_curve(roles["val"], predictions["val"], config)
        threshold = best_mask_threshold(values)
        curves.append(
            Curve(f"{targets.semantic_names[0]} Jaccard index", list(range(1, 256)), values.tolist(), threshold)
        )
        figures["semantic_threshold"] = threshold
    counts: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in targets.semantic_names}
    classes, judged = None, 0
    for index, (volume, prediction) in enumerate(zip(roles["test"], predictions["test"], strict=True)):
        path, made_from = folder / f"test_{index}_classes.npy", read_text(note_of(prediction.path))
        forget_others(path, classes_identity(config, threshold, made_from))
        found = whole(write_classes(prediction, config, threshold, volume.voxel_size_nm, made_from, path))[0]
        truth, known = semantic_truth(volume, config), annotated_of(volume)
        for number, name in enumerate(targets.semantic_names, 1):
            counts[name].append(mask_counts(truth == number, found == number, known))
        judged += int(known.sum())
        classes = found if classes is None else classes
    for name in targets.semantic_names:
        figures |= class_figures(name, np.concatenate(counts[name]), judged, config.evaluation)
    figures |= otsu_figures(roles, config)
    return dataclasses.replace(verdict, figures=figures, curves=curves, classes=classes)


def class_figures(name: str, counts: npt.NDArray[np.int64], judged: int, settings: Evaluation) -> Figures:
    """The figures of one class from its counts (pieces, 3); judged: annotated voxels."""
    interval = interval_of_counts(counts, settings)
    return {
        f"{name}_jaccard": jaccard(counts),
        f"{name}_jaccard_low": interval.low,
        f"{name}_jaccard_high": interval.high,
        f"{name}_dice": dice(counts),
        f"{name}_pieces": len(counts),
        f"chance_{name}_jaccard": float(counts[:, 1].sum() / max(1, judged)),
    }


def mask_curve(volumes: list[Annotated], predictions: list[Volume], config: Config) -> npt.NDArray[np.float64]:
    """The Jaccard index of all volumes together at each threshold 1 .. 255."""
    channel = written_channels(config.targets)["semantic"].start
    histogram = ByteHistogram(np.zeros(256, np.int64), np.zeros(256, np.int64))
    for volume, prediction in zip(volumes, predictions, strict=True):
        values = whole(prediction)[channel]
        histogram = histogram + ByteHistogram.of(values, semantic_truth(volume, config) == 1, annotated_of(volume))
    return jaccard_curve(histogram)


def otsu_figures(roles: Roles, config: Config) -> Figures:
    """Otsu's threshold of each raw image as a mask of each class; dark or bright is chosen for it on validation.

    Dark where there is no validation volume.
    """
    figures: Figures = {}
    for number, name in enumerate(config.targets.semantic_names, 1):
        judged = (
            {dark: otsu_jaccard(roles["val"], config, number, dark) for dark in (True, False)} if roles["val"] else {}
        )
        dark = not judged or judged[True] >= judged[False]
        figures[f"baseline_{name}_jaccard"] = otsu_jaccard(roles["test"], config, number, dark)
        figures[f"baseline_{name}"] = f"Otsu threshold of the raw image, {'dark' if dark else 'bright'} side"
    return figures


def otsu_jaccard(volumes: list[Annotated], config: Config, number: int, dark: bool) -> float:
    """Jaccard index of class `number` and the dark or bright side of each image's Otsu threshold."""
    counts = []
    for volume in volumes:
        image = image_of(volume)
        below = image < otsu_threshold(image)
        counts.append(mask_counts(semantic_truth(volume, config) == number, below == dark, annotated_of(volume)))
    return jaccard(np.concatenate(counts))


def truth_channel(config: Config) -> int:
    """The channel of the label volumes that holds the true instances."""
    targets, decoding = config.targets, config.decoding
    if decoding.label_channel is not None:
        return decoding.label_channel
    target = "semantic" if decoding.target == "membrane" else decoding.target
    return targets.label_channels[[str(name) for name in targets.names].index(target)]


def instance_truth(volume: Annotated, config: Config) -> Truth:
    """True instances [z, y, x], and where they are judged."""
    ids = labels_of(volume, truth_channel(config))
    if config.decoding.by_section:
        ids = np.unique(ids, return_inverse=True)[1].reshape(ids.shape) + (0 if (ids == 0).any() else 1)
        first = np.arange(len(ids))[:, None, None] * (ids.max() + 1)
        ids = np.where(ids > 0, ids + first, 0)
    return truth_of(ids, annotated_of(volume), config.evaluation)


def judge_instances(verdict: Verdict, roles: Roles, predictions: Predictions, config: Config, folder: Path) -> Verdict:
    """Adds figures of instances at the threshold that validation chose, and the raw image's watershed beside."""
    settings, threshold = config.evaluation, config.decoding.threshold
    curves: list[Curve] = list(verdict.curves)
    instances: Found | None = None
    if roles["val"] and config.decoding.method != "mutex":  # which merges without a threshold
        values = (whole(decoded_channels(prediction, config)) for prediction in predictions["val"])
        decoder = settings_of(config.decoding, config.targets, threshold)
        curves.append(rand_curve(values, roles["val"], decoder, config))
        threshold = curves[-1].chosen
    tables, joined, boundaries = [], [], []
    for number, (volume, prediction) in enumerate(zip(roles["test"], predictions["test"], strict=True)):
        path, made_from = folder / f"test_{number}_instances.npy", read_text(note_of(prediction.path))
        forget_others(path, instances_identity(config, threshold, made_from))
        found = whole(write_instances(prediction, config, threshold, volume.voxel_size_nm, made_from, path))[0]
        truth = instance_truth(volume, config)
        tables.append(overlap_pieces(truth, found))
        joined.append(overlap_pieces(truth, np.ones_like(found)))
        boundaries.append(boundary_figure(truth, found, volume.voxel_size_nm, config.decoding.by_section, settings))
        instances = found if instances is None else instances
    interval = interval_of_rand(tables, settings)
    figures = verdict.figures | {
        "instance_threshold": threshold,
        **instance_figures(tables, settings),
        "adapted_rand_error_low": interval.low,
        "adapted_rand_error_high": interval.high,
        "instance_pieces": sum(map(len, tables)),
        "boundary_f1": float(np.mean(boundaries)),
        "chance_adapted_rand_error": rand_error(joined),
        **raw_watershed_figures(roles, config),
    }
    return dataclasses.replace(verdict, figures=figures, curves=curves, instances=instances)


def rand_curve(volumes: Iterable[Bytes], annotated: list[Annotated], decoder: Settings, config: Config) -> Curve:
    """Adapted Rand error of all volumes together at each of decoding.thresholds; the least is chosen, of equals the first."""
    thresholds = config.decoding.thresholds
    tables: list[list[Any]] = [[] for _ in thresholds]  # per threshold and volume, the pieces' overlaps
    for values, volume in zip(progress(volumes, "trying thresholds", len(annotated), True), annotated, strict=True):
        truth = instance_truth(volume, config)
        for own, labels in zip(tables, segment_sections(values, decoder, thresholds, config.decoding), strict=True):
            own.append(overlap_pieces(truth, labels))
    errors = [rand_error(own) for own in tables]
    return Curve("adapted Rand error", list(thresholds), errors, thresholds[int(np.argmin(errors))])


def raw_watershed_figures(roles: Roles, config: Config) -> Figures:
    """A watershed of the raw image, dark taken for boundary, merged by the mean over its boundaries.

    Its threshold is chosen as ours is; plateaus of grey are joined, as each grain of the image would be a fragment.
    """
    plain = dataclasses.replace(
        config.decoding, target="boundary", method="watershed", height="boundary", foreground=0, linkage="mean",
        min_depth=max(1, config.decoding.min_depth),
    )  # fmt: skip
    decoder, threshold = settings_of(plain, config.targets, MIDDLE), MIDDLE
    if roles["val"]:
        values = (dark_as_boundary(image_of(volume)) for volume in roles["val"])
        threshold = rand_curve(values, roles["val"], decoder, config).chosen
    tables = []
    for volume in roles["test"]:
        labels = segment_sections(dark_as_boundary(image_of(volume)), decoder, (threshold,), config.decoding)[0]
        tables.append(overlap_pieces(instance_truth(volume, config), labels))
    figures = instance_figures(tables, config.evaluation)
    return {
        "baseline_adapted_rand_error": figures["adapted_rand_error"],
        "baseline_voi_split": figures["voi_split"],
        "baseline_voi_merge": figures["voi_merge"],
        "baseline_instances": f"watershed of the raw image, threshold {threshold}",
    }
