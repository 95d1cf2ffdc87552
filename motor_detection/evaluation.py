"""Figures that can be believed: threshold from validation, one look at the test tomograms, baseline and chance beside."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.logbook import progress
from common.metrics.detection import (
    DetectionCurve,
    ScoredTomogram,
    best_threshold,
    byu_counts,
    byu_curve,
    byu_predictions,
    detection_counts,
    f_beta_of_counts,
    localisation_error,
    precision_recall_curve,
)
from common.metrics.intervals import Interval, f_beta_interval, paired_bootstrap_difference
from motor_detection.baseline import Variant, best_variant, blob_picks, middle_picks, random_picks, variant_in_words
from motor_detection.config import Config, Evaluation
from motor_detection.inference import pick_motors
from motor_detection.labels import LabelledTomogram
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.pick_files import TomogramPicks
from motor_detection.tomograms import Tomogram, open_tomogram, spacing_warnings

CHANCE_DRAWS = 100
BlobPicks = dict[Variant, ScoredTomogram]
BLOB_THREADS = 2  # each holds a tomogram
FEWEST_FOR_INTERVAL = 5  # tomograms; resampling fewer says nothing about others
Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Picked:
    """One labelled tomogram with what the network found in it."""

    tomogram: Tomogram
    picks: TomogramPicks
    scored: ScoredTomogram


@dataclasses.dataclass(frozen=True)
class Blobs:
    """The blob picker as validation chose it, and its picks in the test tomograms."""

    words: str
    threshold: float
    test: list[ScoredTomogram]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """F-beta with its interval, and what stands behind it."""

    f_beta: Interval
    counts: Counts  # (n, 3) TP, FP, FN per tomogram
    threshold: float


def pick_fold(
    labelled: list[LabelledTomogram],
    paths: dict[str, Path],
    models: list[MotorIdentifier],
    config: Config,
    device: torch.device,
    description: str,
) -> list[Picked]:
    """Picks of the network in every tomogram of a fold."""
    print(f"{description}: {len(labelled)} tomograms", flush=True)
    picked = []
    for label in progress(labelled, description, len(labelled), True):
        tomogram = open_tomogram(paths[label.tomo_id], label, config.data.voxel_spacing_angstrom)
        for warning in spacing_warnings(tomogram):
            print(f"warning: {warning}")
        peaks = pick_motors(models, tomogram, config, device)
        picks = TomogramPicks(
            label.tomo_id, tomogram.volume.shape, tomogram.spacing_angstrom, peaks.points, peaks.scores
        )
        scored = ScoredTomogram(peaks.points, peaks.scores, label.motors, np.array(tomogram.spacing_angstrom))
        picked.append(Picked(tomogram, picks, scored))
    return picked


def blobs_of(picked: list[Picked], config: Config) -> list[BlobPicks]:
    """What the blob picker finds in the same tomograms, for every sigma and polarity."""
    settings, inference = config.evaluation, config.inference

    def pick(one: Picked) -> BlobPicks:
        sigmas, distance = settings.blob_sigmas_angstrom, inference.min_distance_angstrom
        return blob_picks(one.tomogram, one.scored.truths, sigmas, distance, inference.max_picks)

    with ThreadPoolExecutor(BLOB_THREADS) as pool:  # scipy's filters let other threads run
        return list(progress(pool.map(pick, picked), "picking blobs", len(picked), True))


def choose_blobs(validation: list[BlobPicks], test: list[BlobPicks], settings: Evaluation) -> Blobs:
    """The blob picker with sigma, polarity and threshold chosen on validation, as ours is."""
    variant, threshold = best_variant(validation, lambda chosen: curve_of(chosen, settings))
    words = f"Laplacian of Gaussian, {variant_in_words(variant)}"
    return Blobs(words, threshold, [blobs[variant] for blobs in test])


def curve_of(tomograms: list[ScoredTomogram], settings: Evaluation) -> DetectionCurve:
    curve = byu_curve if settings.task == "one_per_tomogram" else precision_recall_curve
    return curve(tomograms, settings.tolerance_angstrom, settings.beta)


def counts_of(tomograms: list[ScoredTomogram], threshold: float, settings: Evaluation) -> Counts:
    """TP, FP, FN of each tomogram (n, 3) under the config's task."""
    if settings.task == "every_motor":
        return detection_counts(tomograms, threshold, settings.tolerance_angstrom)
    spacing = np.stack([tomogram.spacing_angstrom for tomogram in tomograms])
    truths = [tomogram.truths for tomogram in tomograms]
    return byu_counts(byu_predictions(tomograms, threshold), truths, spacing, settings.tolerance_angstrom)


def judge(tomograms: list[ScoredTomogram], threshold: float, settings: Evaluation) -> Verdict:
    """F-beta at a threshold that was chosen elsewhere, with its bootstrap interval over tomograms."""
    counts = counts_of(tomograms, threshold, settings)
    return Verdict(interval_of(counts, settings), counts, threshold)


def interval_of(counts: Counts, settings: Evaluation) -> Interval:
    """F-beta of counts (n, 3) and its bootstrap interval over tomograms, NaN where there are too few."""
    interval = f_beta_interval(counts, settings.beta, settings.bootstrap_resamples, settings.confidence, settings.seed)
    return interval if len(counts) >= FEWEST_FOR_INTERVAL else Interval(interval.estimate, math.nan, math.nan)


def choose_threshold(tomograms: list[ScoredTomogram], settings: Evaluation) -> float:
    return best_threshold(curve_of(tomograms, settings), 0.0, 1.0).threshold


def cross_fitted(groups: list[list[ScoredTomogram]], settings: Evaluation) -> tuple[Counts, float]:
    """Counts (n, 3) of all tomograms, each at the threshold chosen on the other groups; and those thresholds' mean."""
    counts, thresholds = [], []
    for number, group in enumerate(groups):
        others = [tomogram for k, other in enumerate(groups) if k != number for tomogram in other]
        thresholds.append(choose_threshold(others, settings))
        counts.append(counts_of(group, thresholds[-1], settings))
    return np.concatenate(counts), float(np.mean(thresholds))


def chance(test: list[Picked], settings: Evaluation) -> float:
    """Mean F-beta of random points, as many per tomogram as the task asks for."""
    like = [picked.scored for picked in test]
    shapes = [picked.tomogram.volume.shape for picked in test]
    motors = np.mean([len(tomogram.truths) for tomogram in like])
    each = 1 if settings.task == "one_per_tomogram" else max(1, round(float(motors)))
    draws = [
        f_beta_at(random_picks(shapes, like, draw, settings.seed, each), 0.5, settings) for draw in range(CHANCE_DRAWS)
    ]
    return float(np.mean(draws))


def middle(test: list[Picked], settings: Evaluation) -> float:
    """F-beta of answering every tomogram's middle: what motors framed by a microscopist give without looking."""
    return f_beta_at(
        middle_picks([one.tomogram.volume.shape for one in test], [one.scored for one in test]), 0.5, settings
    )


def f_beta_at(tomograms: list[ScoredTomogram], threshold: float, settings: Evaluation) -> float:
    return float(f_beta_of_counts(counts_of(tomograms, threshold, settings).sum(0), settings.beta))


def cross_fitted_blobs(groups: list[list[BlobPicks]], settings: Evaluation) -> Counts:
    """Counts (n, 3) of the blob picker, chosen for each group on the others."""
    counts = []
    for number, group in enumerate(groups):
        others = [blobs for k, other in enumerate(groups) if k != number for blobs in other]
        chosen = choose_blobs(others, group, settings)
        counts.append(counts_of(chosen.test, chosen.threshold, settings))
    return np.concatenate(counts)


def evaluate(
    validation: list[Picked], test: list[Picked], blobs: Blobs, settings: Evaluation
) -> dict[str, float | int | str]:
    """The flat figures of results/metrics.json; the test tomograms are looked at once, here."""
    name = f"f{settings.beta:g}"
    threshold = choose_threshold([picked.scored for picked in validation], settings)
    ours = judge([picked.scored for picked in test], threshold, settings)
    theirs = judge(blobs.test, blobs.threshold, settings)
    gain = paired_bootstrap_difference(
        ours.counts, theirs.counts, settings.beta, settings.bootstrap_resamples, settings.confidence, settings.seed
    )
    if len(test) < FEWEST_FOR_INTERVAL:
        gain = Interval(gain.estimate, math.nan, math.nan)
    error = localisation_error(answered(test, settings), threshold, settings.tolerance_angstrom)
    tp, fp, fn = (int(total) for total in ours.counts.sum(0))
    return {
        "task": settings.task,
        "tolerance_angstrom": settings.tolerance_angstrom,
        name: ours.f_beta.estimate,
        f"{name}_low": ours.f_beta.low,
        f"{name}_high": ours.f_beta.high,
        "n": len(test),
        "n_with_motor": sum(len(picked.scored.truths) > 0 for picked in test),
        "true_positives": tp,
        "false_positives": fp,
        "false_negatives": fn,
        "precision": tp / max(1, tp + fp),
        "recall": tp / max(1, tp + fn),
        "threshold": threshold,
        "localisation_error_angstrom": error.median_angstrom,
        "localisation_error_90_angstrom": error.percentile_90_angstrom,
        f"baseline_{name}": theirs.f_beta.estimate,
        f"baseline_{name}_low": theirs.f_beta.low,
        f"baseline_{name}_high": theirs.f_beta.high,
        "baseline": blobs.words,
        f"gain_{name}_low": gain.low,
        f"gain_{name}_high": gain.high,
        f"chance_{name}": chance(test, settings),
        f"middle_{name}": middle(test, settings),
        "validation_n": len(validation),
        f"validation_{name}": f_beta_at([picked.scored for picked in validation], threshold, settings),
    }


def answered(test: list[Picked], settings: Evaluation) -> list[ScoredTomogram]:
    """The picks that count: all of them, or each tomogram's best."""
    scored = [picked.scored for picked in test]
    if settings.task == "every_motor":
        return scored
    return [ScoredTomogram(s.points[:1], s.scores[:1], s.truths, s.spacing_angstrom) for s in scored]
