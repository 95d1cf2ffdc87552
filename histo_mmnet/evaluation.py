"""Figures of predictions: of patients, of composites and of photographs, with intervals over accessions.

A patient is an accession. Where a protocol tests slides of one accession apart (slide), or more than once (official), each
slide of each trial is a patient of its own, as in the publications, and intervals still draw whole accessions. A patient's
probability is the mean over all composites. The official patient score is the share of a patient's photographs that are right.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.metrics.classification import Criterion, best_threshold, calibration, confusion, roc_auc
from common.metrics.intervals import Interval, bootstrap_intervals
from histo_mmnet.config import Evaluation, Protocol
from histo_mmnet.members import Member
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.predictions import NUM_SETS, Floats, Predictions, probability
from histo_mmnet.shapley import shapley_values

Ints = npt.NDArray[np.int64]
Level = Literal["patient", "composite", "image"]
LEVELS: tuple[Level, ...] = ("patient", "composite", "image")
FIGURES = ("accuracy", "balanced_accuracy", "f1", "auc", "precision", "recall", "specificity")
CALIBRATION_BINS = 10
Figures = dict[str, float | int | str]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """One for each level: photographs and composites spread further than their means over a patient."""

    patient: float
    composite: float
    image: float


@dataclasses.dataclass(frozen=True, eq=False)
class FoldVerdict:
    """One member on one fold's test images; the thresholds were chosen on validation images."""

    member: Member
    validation: Predictions
    predictions: Predictions
    thresholds: Thresholds
    seconds_per_patient: float  # of all that eval.py asks for: the 15 sets of magnifications, flips where configured


@dataclasses.dataclass(frozen=True, eq=False)
class Cases:
    """Probabilities of patients, composites or photographs, and whose they are."""

    probability: Floats  # (n,)
    label: Ints  # (n,)
    threshold: Floats  # (n,) of the fold that tested it
    patient: tuple[str, ...]  # n names
    accession: tuple[str, ...]  # n names; a patient has one

    @property
    def positive(self) -> npt.NDArray[np.bool_]:
        """Which are called malignant (n,)."""
        return self.probability >= self.threshold

    def of_patients(self) -> "Cases":
        """Each patient's mean probability, label and threshold; patients in order of their names."""
        names, first, row = np.unique(np.array(self.patient, object), return_index=True, return_inverse=True)
        count = np.bincount(row)
        mean, label, threshold = (
            np.bincount(row, values) / count for values in (self.probability, self.label, self.threshold)
        )
        accessions = tuple(self.accession[k] for k in first)
        return Cases(mean, label.round().astype(np.int64), threshold, tuple(map(str, names)), accessions)

    def scores(self) -> Floats:
        """The official patient score (patients,): the share of a patient's rows that are right, in order of their names."""
        row = np.unique(np.array(self.patient, object), return_inverse=True)[1]
        return np.bincount(row, self.positive == self.label) / np.bincount(row)


def patient_of(slide: str, accession: str, trial: int, protocol: Protocol) -> str:
    """The patient that a slide belongs to in a trial: its accession where that is tested once and whole."""
    return accession if protocol == "accession" else f"trial {trial} {slide}"


def cases_of(folds: Sequence[FoldVerdict], level: Level, protocol: Protocol) -> Cases:
    """What the folds say of all that they test, at their thresholds of a level."""
    parts = [(fold.member.fold, fold.predictions, getattr(fold.thresholds, level)) for fold in folds]
    return gathered(parts, level, protocol)


def gathered(parts: Iterable[tuple[int, Predictions, float]], level: Level, protocol: Protocol) -> Cases:
    """Predictions of trials, each with its number and threshold, as cases of a level."""
    rows = [
        (logit, predictions.composites[k].slide, trial, threshold)
        for trial, predictions, threshold in parts
        for k, logit in (
            zip(predictions.shown_in, predictions.alone, strict=True)
            if level == "image"
            else enumerate(predictions.logits)
        )
    ]
    cases = Cases(
        probability(np.array([logit for logit, *_ in rows], float)),
        np.array([slide.label for _, slide, _, _ in rows], np.int64),
        np.array([threshold for *_, threshold in rows], float),
        tuple(patient_of(slide.name, slide.accession, trial, protocol) for _, slide, trial, _ in rows),
        tuple(slide.accession for _, slide, _, _ in rows),
    )
    return cases.of_patients() if level == "patient" else cases


def thresholds_of(
    validation: Sequence[tuple[int, Predictions]], left_out: set[str], criterion: Criterion, protocol: Protocol
) -> Thresholds:
    """The best threshold of each level on the precision-recall curve of validation predictions; 0.5 where nothing is left.

    left_out: accessions that have no say. A threshold for patients parts their means, as that is what it decides.
    """
    found = {}
    for level in LEVELS:
        cases = gathered([(trial, predictions, 0.5) for trial, predictions in validation], level, protocol)
        kept = np.array([accession not in left_out for accession in cases.accession], bool)
        found[level] = best_threshold(cases.label[kept], cases.probability[kept], criterion)
    return Thresholds(**found)


def figures_of(cases: Cases, level: str, settings: Evaluation) -> Figures:
    """All figures of cases, called LEVEL_..., each with its interval over accessions."""

    def all_of(rows: Ints) -> list[float]:
        label = cases.label[rows]
        counts, area = confusion(label, cases.positive[rows]), roc_auc(label, cases.probability[rows])
        return [area if name == "auc" else getattr(counts, name) for name in FIGURES]

    figures: Figures = {f"n_{level}s": len(cases.label)}
    for name, interval in zip(FIGURES, over_accessions(cases.accession, all_of, settings), strict=True):
        figures |= with_interval(f"{level}_{name}", interval)
    return figures


def with_interval(name: str, interval: Interval) -> Figures:
    """A figure and the ends of its interval."""
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def over_accessions(
    accession: Sequence[str], statistics: Callable[[Ints], Sequence[float]], settings: Evaluation
) -> list[Interval]:
    """Intervals of statistics of rows when whole accessions are drawn with replacement.

    Networks and thresholds stay as they are: the intervals are about other patients, not about other trainings.
    """
    number = np.unique(np.array(accession, object), return_inverse=True)[1]
    rows = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])  # of each accession

    def resampled(drawn: Ints) -> Sequence[float]:
        return statistics(np.concatenate([rows[k] for k in drawn]))

    return bootstrap_intervals(resampled, len(rows), settings.bootstrap_resamples, settings.confidence, settings.seed)


def recognition_rate(cases: Cases, settings: Evaluation) -> Interval:
    """The mean over patients of the share of their rows that are right; of photographs, the official figure."""
    scores = cases.scores()
    return over_accessions(cases.of_patients().accession, lambda rows: (float(scores[rows].mean()),), settings)[0]


def calibration_error(cases: Cases) -> float:
    """The expected calibration error (Naeini et al. 2015), 0 for probabilities that come true."""
    return calibration(cases.label, cases.probability, CALIBRATION_BINS)[3]


def scores_of_sets(folds: Sequence[FoldVerdict], protocol: Protocol) -> tuple[Cases, Floats]:
    """The patients, and their mean probability with each set (patients, 16), 0.5 where nothing of it was taken."""
    patients = cases_of(folds, "patient", protocol)
    row = {name: k for k, name in enumerate(patients.patient)}
    said: list[list[Floats]] = [[] for _ in row]
    for fold in folds:
        for composite, logits in zip(fold.predictions.composites, fold.predictions.of_sets, strict=True):
            slide = composite.slide
            name = patient_of(slide.name, slide.accession, fold.member.fold, protocol)
            said[row[name]].append(probability(logits))
    scores = np.full((len(said), NUM_SETS), 0.5)
    for k, own in enumerate(map(np.array, said)):  # (composites, 16), NaN where a composite shows nothing of a set
        there = np.isfinite(own)
        known = there.any(0)
        scores[k, known] = np.where(there, own, 0).sum(0)[known] / there.sum(0)[known]
    return patients, scores


def magnification_importance(folds: Sequence[FoldVerdict], protocol: Protocol, settings: Evaluation) -> list[Interval]:
    """What each magnification adds to the patients' AUC: exact Shapley values of the 16 sets, no image being worth 0.5."""
    patients, scores = scores_of_sets(folds, protocol)

    def values(rows: Ints) -> list[float]:
        areas = np.array([roc_auc(patients.label[rows], scores[rows, k]) for k in range(NUM_SETS)])
        return [float(value) for value in shapley_values(areas)]

    found = over_accessions(patients.accession, values, settings)
    assert len(found) == len(MAGNIFICATIONS)
    return found
