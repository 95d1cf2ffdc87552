"""From predictions to figures: thresholds on the validation volumes, each test volume judged once, baselines alike."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.files import file_digest, read_text
from common.logbook import progress
from common.volumes.volume import Volume
from em_segmentation.config import Config, Evaluation
from em_segmentation.decoding.pipeline import segment_at
from em_segmentation.evaluation import (
    ByteHistogram,
    Bytes,
    Ids,
    Mask,
    best_mask_threshold,
    boundary_figure,
    dark_as_boundary,
    dice_of,
    instance_figures,
    interval_of_counts,
    interval_of_rand,
    jaccard_of,
    mask_counts,
    otsu_threshold,
    overlap_pieces,
    rand_error,
    shifted,
    truth_of,
)
from em_segmentation.inference import written_channels
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.prediction import (
    Source,
    decoded_channels,
    decoding_settings,
    note_of,
    whole,
    write_instances,
    write_prediction,
)
from em_segmentation.volumes import Annotated

MIDDLE = 128  # of bytes: the threshold where no validation volume says better
Figures = dict[str, float | int | str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The figures of a run, and what the pictures show of the test volumes."""

    figures: Figures
    masks: list[npt.NDArray[np.uint8]]  # classes found [z, y, x] per test volume; empty without a semantic target
    instances: list[npt.NDArray[np.integer[Any]]]  # [z, y, x] per test volume; empty without decoding


def predict_role(
    model: SegmentationModel, volumes: list[Annotated], config: Config, weights: Path, folder: Path, role: str
) -> list[Volume]:
    """The predictions of a role's volumes in a folder; what an earlier call of the same weights finished is kept."""
    found = []
    for number, volume in enumerate(volumes):
        source = Source(volume.image, volume.scale, volume.sections, volume.voxel_size_nm, file_digest(weights))
        found.append(write_prediction(model, source, config, folder / f"{role}_{number}_prediction.npy"))
    return found


def judge(
    roles: dict[str, list[Annotated]],
    predictions: dict[str, list[Volume]],
    config: Config,
    settings: Evaluation,
    folder: Path,
) -> Verdict:
    """All figures of the test volumes; everything that is chosen is chosen on the validation volumes."""
    figures: Figures = {"test_volumes": len(roles["test"]), "validation_volumes": len(roles["val"])}
    masks: list[npt.NDArray[np.uint8]] = []
    instances: list[npt.NDArray[np.integer[Any]]] = []
    if "semantic" in config.targets.names:
        more, masks = judge_semantic(roles, predictions, config, settings)
        figures |= more
    if config.decoding.target != "none":
        more, instances = judge_instances(roles, predictions, config, settings, folder)
        figures |= more
    return Verdict(figures, masks, instances)


def labels_of(volume: Annotated, channel: int) -> Ids:
    """One channel of a volume's labels, whole."""
    labels: Ids = volume.read_labels((0, 0, 0), volume.shape)[channel]
    return labels


def annotated_of(volume: Annotated) -> Mask:
    known: Mask = volume.read_annotated((0, 0, 0), volume.shape)[0]
    return known


def semantic_truth(volume: Annotated, config: Config) -> npt.NDArray[np.uint8]:
    """Classes [z, y, x]: 0 or 1 for a single class, else as labelled."""
    targets = config.targets
    labels = labels_of(volume, targets.label_channels[targets.names.index("semantic")])
    if targets.semantic_classes > 1:
        return labels.astype(np.uint8)
    return (np.isin(labels, targets.semantic_only) if targets.semantic_only else labels != 0).astype(np.uint8)


def judge_semantic(
    roles: dict[str, list[Annotated]], predictions: dict[str, list[Volume]], config: Config, settings: Evaluation
) -> tuple[Figures, list[npt.NDArray[np.uint8]]]:
    """Jaccard and Dice of each class with the interval of the first, and the classes found."""
    channels, targets = written_channels(config.targets)["semantic"], config.targets
    figures: Figures = {}
    threshold = MIDDLE
    if targets.semantic_classes == 1 and roles["val"]:
        threshold = mask_threshold(roles["val"], predictions["val"], config)
        figures["semantic_threshold"] = threshold / 255
    found = []
    for prediction in predictions["test"]:
        values = whole(prediction)[channels]
        found.append(
            (values[0] >= threshold).astype(np.uint8) if len(values) == 1 else values.argmax(0).astype(np.uint8)
        )
    truths = [semantic_truth(volume, config) for volume in roles["test"]]
    known = [annotated_of(volume) for volume in roles["test"]]
    for number, name in enumerate(targets.semantic_names, 1):
        counts = np.concatenate(
            [mask_counts(t == number, f == number, a) for t, f, a in zip(truths, found, known, strict=True)]
        )
        interval = interval_of_counts(counts, settings)
        figures |= {
            f"{name}_jaccard": jaccard_of(counts),
            f"{name}_jaccard_low": interval.low,
            f"{name}_jaccard_high": interval.high,
            f"{name}_dice": dice_of(counts),
            f"{name}_pieces": len(counts),
            f"chance_{name}_jaccard": float(counts[:, 1].sum() / max(1, sum(int(a.sum()) for a in known))),
        }
    if targets.semantic_classes == 1:
        figures |= otsu_figures(roles, config)
    return figures, found


def mask_threshold(volumes: list[Annotated], predictions: list[Volume], config: Config) -> int:
    """The byte from which on a voxel is foreground, best on these volumes."""
    channel = written_channels(config.targets)["semantic"].start
    histogram = ByteHistogram(np.zeros(256, np.int64), np.zeros(256, np.int64))
    for volume, prediction in zip(volumes, predictions, strict=True):
        values: Bytes = whole(prediction)[channel].astype(np.uint8)
        histogram = histogram + ByteHistogram.of(values, semantic_truth(volume, config) == 1, annotated_of(volume))
    return best_mask_threshold(histogram)[0]


def otsu_figures(roles: dict[str, list[Annotated]], config: Config) -> Figures:
    """Otsu's threshold of each raw image; dark or bright is chosen on validation (dark where there is none)."""
    name = config.targets.semantic_names[0]

    def jaccard(volumes: list[Annotated], dark: bool) -> float:
        counts = []
        for volume in volumes:
            image = volume.read_image((0, 0, 0), volume.shape)[0]
            below = image < otsu_threshold(image)
            counts.append(mask_counts(semantic_truth(volume, config) == 1, below == dark, annotated_of(volume)))
        return jaccard_of(np.concatenate(counts))

    dark = jaccard(roles["val"], True) >= jaccard(roles["val"], False) if roles["val"] else True
    words = f"Otsu threshold of the raw image, {'dark' if dark else 'bright'} side"
    return {f"baseline_{name}_jaccard": jaccard(roles["test"], bool(dark)), "baseline_semantic": words}


def instance_truth(volume: Annotated, config: Config, settings: Evaluation) -> Ids:
    """True instances [z, y, x] that are judged."""
    return truth_of(labels_of(volume, truth_channel(config)), annotated_of(volume), settings)


def judge_instances(
    roles: dict[str, list[Annotated]],
    predictions: dict[str, list[Volume]],
    config: Config,
    settings: Evaluation,
    folder: Path,
) -> tuple[Figures, list[npt.NDArray[np.integer[Any]]]]:
    """Figures of instances at the threshold that validation chose, the raw image's watershed beside, and the instances."""
    threshold = config.decoding.threshold
    if roles["val"]:
        threshold = instance_threshold(
            [whole(decoded_channels(p, config)).astype(np.uint8) for p in predictions["val"]],
            roles["val"],
            config,
            settings,
        )
    found, tables, boundaries = [], [], []
    for number, (volume, prediction) in enumerate(zip(roles["test"], predictions["test"], strict=True)):
        path = folder / f"test_{number}_instances.npy"
        identity = read_text(note_of(folder / f"test_{number}_prediction.npy"))
        written = write_instances(prediction, config, threshold, volume.voxel_size_nm, identity, path)
        labels = whole(written)[0].astype(np.int64)
        truth = instance_truth(volume, config, settings)
        found.append(labels)
        tables.append(overlap_pieces(truth, labels))
        boundaries.append(boundary_figure(truth, labels, volume.voxel_size_nm, settings))
    together = shifted(tables)
    interval = interval_of_rand(together, settings)
    figures: Figures = {"instance_threshold": threshold / 255}
    figures |= instance_figures(together, settings)
    figures |= {
        "adapted_rand_error_low": interval.low,
        "adapted_rand_error_high": interval.high,
        "instance_pieces": len(together),
        "boundary_f1": float(np.mean(boundaries)),
    }
    return figures | raw_watershed_figures(roles, config, settings), [*found]


def instance_threshold(volumes: list[Bytes], annotated: list[Annotated], config: Config, settings: Evaluation) -> int:
    """Of decoding.thresholds the one of least adapted Rand error over some volumes; of equals the highest."""
    thresholds = config.decoding.thresholds
    plain = decoding_settings(config.decoding, config.targets, thresholds[0])
    found = [
        segment_at(volume, plain, thresholds) for volume in progress(volumes, "decoding validation", len(volumes), True)
    ]
    truths = [instance_truth(volume, config, settings) for volume in annotated]
    errors = [
        rand_error(shifted([overlap_pieces(truth, labels[k]) for truth, labels in zip(truths, found, strict=True)]))
        for k in range(len(thresholds))
    ]
    return thresholds[int(np.argmin(errors))]


def raw_watershed_figures(roles: dict[str, list[Annotated]], config: Config, settings: Evaluation) -> Figures:
    """The same decoding of the raw image, dark taken for boundary, its threshold chosen as ours is."""
    decoding = dataclasses.replace(
        config.decoding, target="boundary", method="watershed", height="boundary", foreground=0
    )
    plain = dataclasses.replace(config, decoding=decoding)

    def boundary(volume: Annotated) -> Bytes:
        return dark_as_boundary(volume.read_image((0, 0, 0), volume.shape)[0])

    channel = truth_channel(config)
    plain = dataclasses.replace(plain, decoding=dataclasses.replace(decoding, label_channel=channel))
    threshold = MIDDLE
    if roles["val"]:
        threshold = instance_threshold([boundary(volume) for volume in roles["val"]], roles["val"], plain, settings)
    tables = []
    for volume in roles["test"]:
        labels = segment_at(
            boundary(volume), decoding_settings(plain.decoding, plain.targets, threshold), (threshold,)
        )[0]
        tables.append(overlap_pieces(instance_truth(volume, plain, settings), labels))
    figures = instance_figures(shifted(tables), settings)
    return {
        "baseline_adapted_rand_error": figures["adapted_rand_error"],
        "baseline_voi_split": figures["voi_split"],
        "baseline_voi_merge": figures["voi_merge"],
        "baseline_instances": f"watershed of the raw image, threshold {threshold}",
    }


def truth_channel(config: Config) -> int:
    """The channel of the label volumes that holds the true instances."""
    targets, decoding = config.targets, config.decoding
    if decoding.label_channel is not None:
        return decoding.label_channel
    return targets.label_channels[[str(name) for name in targets.names].index(decoding.target)]
