"""Instances judged: the threshold that validation chose, each test volume once, the raw image's watershed beside.

Volumes are worked on by threads, evaluation.volumes_at_once of them: most of the work is numpy's and scipy's, which let others
run meanwhile. The figures do not depend on how many.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.files import read_text
from common.logbook import progress
from common.volumes.volume import Volume
from em_segmentation.config import Config
from em_segmentation.decoding.settings import Settings, settings_of
from em_segmentation.evaluation import (
    Bytes,
    Curve,
    Found,
    boundary_figure,
    dark_as_boundary,
    instance_figures,
    interval_of_rand,
    overlap_pieces,
    rand_error,
)
from em_segmentation.prediction import (
    decoded_channels,
    forget_others,
    instances_identity,
    note_of,
    segment_sections,
    whole,
    write_instances,
)
from em_segmentation.truths import image_of, instance_truth
from em_segmentation.volumes import Annotated, Role

MIDDLE = 128  # of bytes: the threshold where no validation volume says better
Figures = dict[str, float | int | str]
Roles = dict[Role, list[Annotated]]
Predictions = dict[Role, list[Volume]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, eq=False)
class InstanceVerdict:
    """The figures of instances, how their threshold was chosen, and the first test volume's [z, y, x]."""

    figures: Figures
    curves: list[Curve]
    instances: Found


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """One test volume: overlaps of its pieces with the truth, those of everything as one object, and boundary F1."""

    overlaps: list[Any]
    joined: list[Any]
    boundary_f1: float


def for_each(work: Callable[[Item], Result], items: Sequence[Item], description: str, config: Config) -> list[Result]:
    """work(item) of each, in order, some of them at once."""
    with ThreadPoolExecutor(config.evaluation.volumes_at_once) as pool:
        return list(progress(pool.map(work, items), description, len(items), True))


def judge_instances(roles: Roles, predictions: Predictions, config: Config, folder: Path) -> InstanceVerdict:
    """The figures at the threshold that validation chose, and those of the raw image's watershed."""
    settings, threshold = config.evaluation, config.decoding.threshold
    curves: list[Curve] = []
    if roles["val"] and config.decoding.method != "mutex":  # which merges without a threshold
        readers = [functools.partial(values_of, prediction, config) for prediction in predictions["val"]]
        decoder = settings_of(config.decoding, config.targets, threshold)
        curves.append(rand_curve(readers, roles["val"], decoder, config))
        threshold = curves[-1].chosen

    def judged(number: int) -> Judged:
        truth_of, found_in = roles["test"][number], predictions["test"][number]
        return judge_volume(truth_of, found_in, config, threshold, instances_path(folder, number))

    volumes = for_each(judged, range(len(roles["test"])), "judging instances", config)
    tables = [volume.overlaps for volume in volumes]
    interval = interval_of_rand(tables, settings)
    figures: Figures = {
        "instance_threshold": threshold,
        **instance_figures(tables, settings),
        "adapted_rand_error_low": interval.low,
        "adapted_rand_error_high": interval.high,
        "instance_pieces": sum(map(len, tables)),
        "boundary_f1": float(np.mean([volume.boundary_f1 for volume in volumes])),
        "chance_adapted_rand_error": rand_error([volume.joined for volume in volumes]),
        **raw_watershed_figures(roles, config),
    }
    first = read_instances(predictions["test"][0], roles["test"][0], config, threshold, instances_path(folder, 0))
    return InstanceVerdict(figures, curves, first)


def instances_path(folder: Path, number: int) -> Path:
    return folder / f"test_{number}_instances.npy"


def values_of(prediction: Volume, config: Config) -> Bytes:
    """What instances are made of, whole."""
    values: Bytes = whole(decoded_channels(prediction, config))
    return values


def read_instances(prediction: Volume, volume: Annotated, config: Config, threshold: int, path: Path) -> Found:
    """The instances [z, y, x] at a path, decoded where they are not there yet."""
    made_from = read_text(note_of(prediction.path))
    forget_others(path, instances_identity(config, threshold, made_from))
    found: Found = whole(write_instances(prediction, config, threshold, volume.voxel_size_nm, made_from, path))[0]
    return found


def judge_volume(volume: Annotated, prediction: Volume, config: Config, threshold: int, path: Path) -> Judged:
    """Decode one test volume into a file and compare."""
    found = read_instances(prediction, volume, config, threshold, path)
    truth = instance_truth(volume, config)
    boundary = boundary_figure(truth, found, volume.voxel_size_nm, config.decoding.by_section, config.evaluation)
    return Judged(overlap_pieces(truth, found), overlap_pieces(truth, np.ones_like(found)), boundary)


def rand_curve(
    readers: Sequence[Callable[[], Bytes]], annotated: list[Annotated], decoder: Settings, config: Config
) -> Curve:
    """Adapted Rand error of all volumes together at each of decoding.thresholds; the least is chosen, of equals the first.

    readers: read what each of the annotated volumes is decoded from.
    """
    thresholds = config.decoding.thresholds

    def overlaps(number: int) -> list[list[Any]]:  # per threshold, the pieces' overlaps
        truth = instance_truth(annotated[number], config)
        labels = segment_sections(readers[number](), decoder, thresholds, config.decoding)
        return [overlap_pieces(truth, own) for own in labels]

    of_volumes = for_each(overlaps, range(len(annotated)), "trying thresholds", config)
    errors = [rand_error(list(own)) for own in zip(*of_volumes, strict=True)]
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

    def boundaries_of(volume: Annotated) -> Bytes:
        return dark_as_boundary(image_of(volume))

    if roles["val"]:
        readers = [functools.partial(boundaries_of, volume) for volume in roles["val"]]
        threshold = rand_curve(readers, roles["val"], decoder, config).chosen

    def overlaps(volume: Annotated) -> list[Any]:
        labels = segment_sections(boundaries_of(volume), decoder, (threshold,), config.decoding)[0]
        return overlap_pieces(instance_truth(volume, config), labels)

    figures = instance_figures(for_each(overlaps, roles["test"], "judging the raw image", config), config.evaluation)
    return {
        "baseline_adapted_rand_error": figures["adapted_rand_error"],
        "baseline_voi_split": figures["voi_split"],
        "baseline_voi_merge": figures["voi_merge"],
        "baseline_instances": f"watershed of the raw image, threshold {threshold}",
    }
