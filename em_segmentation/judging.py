"""From predictions to figures: thresholds on the validation volumes, each test volume judged once, baselines alike.

Volumes are judged whole: about 30 bytes per voxel of each that is judged at once, and while thresholds are tried one set of
ids for each. That is fine up to a few hundred million voxels; judge a cut-out of anything larger.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.files import file_digest, read_text
from common.metrics.segmentation import dice, jaccard
from common.volumes.volume import Volume
from em_segmentation.class_maps import classes_identity, write_classes
from em_segmentation.config import Config
from em_segmentation.config_inference import Evaluation
from em_segmentation.evaluation import (
    ByteHistogram,
    Curve,
    Found,
    best_mask_threshold,
    interval_of_counts,
    jaccard_curve,
    mask_counts,
    otsu_threshold,
)
from em_segmentation.inference import written_channels
from em_segmentation.judging_instances import Figures, Predictions, Roles, judge_instances
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.prediction import (
    Source,
    forget_others,
    note_of,
    whole,
    write_prediction,
)
from em_segmentation.truths import annotated_of, image_of, semantic_truth, truth_channel
from em_segmentation.volumes import Annotated


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
        found = judge_instances(roles, predictions, config, folder)
        figures, curves = verdict.figures | found.figures, verdict.curves + found.curves
        verdict = Verdict(figures, curves, verdict.classes, found.instances)
    return verdict


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
