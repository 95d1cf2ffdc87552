"""Figures of predictions: of composites, photographs and patients, with intervals over patients, and what is chosen for them.

A patient is an accession. A patient's probability is the mean over all composites, and is decided by the threshold of the fold
that tested the patient; the official patient score is the share of a patient's composites that are right.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from common.metrics.classification import Criterion, best_threshold, calibration, confusion, roc_auc
from common.metrics.intervals import Interval, bootstrap_interval
from histo_mmnet.config import Evaluation
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.predictions import ALL, NUM_SETS, Floats, Predictions, probability
from histo_mmnet.shapley import shapley_values

Ints = npt.NDArray[np.int64]
CALIBRATION_BINS = 10
Figures = dict[str, float | int | str]


@dataclasses.dataclass(frozen=True, eq=False)
class Cases:
    """Probabilities of units (composites or photographs), and the patient of each; patients are numbered from 0."""

    probability: Floats  # (n,)
    label: Ints  # (n,)
    patient: Ints  # (n,)
    threshold: Floats  # (n,) of the fold that tested it

    @property
    def positive(self) -> npt.NDArray[np.bool_]:
        return self.probability >= self.threshold

    def of_patients(self) -> "Cases":
        """Each patient's mean probability, label and threshold."""
        count = np.bincount(self.patient)
        mean, label, threshold = (
            np.bincount(self.patient, values) / count for values in (self.probability, self.label, self.threshold)
        )
        return Cases(mean, label.round().astype(np.int64), np.arange(len(count)), threshold)

    def scores(self) -> Floats:
        """The official patient score (patients,): the share of a patient's units that are right."""
        return np.bincount(self.patient, self.positive == self.label) / np.bincount(self.patient)


def cases_of(folds: Sequence[Predictions], thresholds: Sequence[float], chosen: int) -> Cases:
    """All folds' composites with a set of magnifications by number, where they have it."""
    rows = [(p, threshold, k) for p, threshold in zip(folds, thresholds, strict=True) for k in range(len(p.composites))]
    values = [p.logits[k] if chosen == ALL else p.of_sets[k, chosen] for p, _, k in rows]
    kept = [row for row, value in zip(rows, values, strict=True) if np.isfinite(value)]
    accessions = sorted({p.composites[k].slide.accession for p, _, k in kept})
    number = {accession: at for at, accession in enumerate(accessions)}
    return Cases(
        probability(np.array([value for value in values if np.isfinite(value)])),
        np.array([p.composites[k].slide.label for p, _, k in kept]),
        np.array([number[p.composites[k].slide.accession] for p, _, k in kept]),
        np.array([threshold for _, threshold, _ in kept]),
    )


def threshold_of(validation: Sequence[Predictions], left_out: set[str], criterion: Criterion) -> float:
    """The best threshold on the precision-recall curve of validation patients, some left out; 0.5 where none is left.

    Patients, by the mean of their composites, as patients are decided: single composites spread further.
    """
    labels, means = [], []
    for predictions in validation:
        own: dict[str, list[int]] = {}
        for k, composite in enumerate(predictions.composites):
            if composite.slide.accession not in left_out:
                own.setdefault(composite.slide.accession, []).append(k)
        labels += [predictions.composites[rows[0]].slide.label for rows in own.values()]
        means += [float(probability(predictions.logits[rows]).mean()) for rows in own.values()]
    return best_threshold(np.array(labels, np.int64), np.array(means), criterion)


def figures_of(cases: Cases, name: str, settings: Evaluation) -> Figures:
    """All figures of units, called name_..., with intervals over resampled patients for the main ones."""
    counts = confusion(cases.label, cases.positive)
    figures: Figures = {
        f"{name}_accuracy": counts.accuracy,
        f"{name}_balanced_accuracy": counts.balanced_accuracy,
        f"{name}_f1": counts.f1,
        f"{name}_auc": roc_auc(cases.label, cases.probability),
        f"{name}_precision": counts.precision,
        f"{name}_recall": counts.recall,
        f"{name}_specificity": counts.specificity,
        f"n_{name}s": len(cases.label),
    }
    for figure, statistic in (("balanced_accuracy", balanced_accuracy_of), ("auc", auc_of)):
        interval = over_patients(cases, statistic, settings)
        figures |= {f"{name}_{figure}_low": interval.low, f"{name}_{figure}_high": interval.high}
    return figures


def balanced_accuracy_of(cases: Cases) -> float:
    return confusion(cases.label, cases.positive).balanced_accuracy


def auc_of(cases: Cases) -> float:
    return roc_auc(cases.label, cases.probability)


def over_patients(cases: Cases, statistic: Callable[[Cases], float], settings: Evaluation) -> Interval:
    """The interval of a statistic when whole patients are drawn with replacement."""
    order = np.argsort(cases.patient, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(cases.patient))[:-1])  # of each patient

    def resampled(patients: Ints) -> float:
        chosen = np.concatenate([rows[patient] for patient in patients])
        return statistic(Cases(*(getattr(cases, f.name)[chosen] for f in dataclasses.fields(Cases))))

    return bootstrap_interval(resampled, len(rows), settings.bootstrap_resamples, settings.confidence, settings.seed)


def recognition_rate(cases: Cases, settings: Evaluation) -> Interval:
    """The mean over patients of the official patient score."""
    scores = cases.scores()

    def mean(chosen: Ints) -> float:
        return float(scores[chosen].mean())

    return bootstrap_interval(mean, len(scores), settings.bootstrap_resamples, settings.confidence, settings.seed)


def calibration_error(cases: Cases) -> float:
    return calibration(cases.label, cases.probability, CALIBRATION_BINS)[3]


def scores_of_sets(folds: Sequence[Predictions]) -> tuple[Ints, Floats]:
    """Each patient's label (patients,) and mean probability with each set (patients, 16), 0.5 where nothing of it was taken."""
    said: dict[str, list[Floats]] = {}
    labels: dict[str, int] = {}
    for predictions in folds:
        for composite, logits in zip(predictions.composites, predictions.of_sets, strict=True):
            said.setdefault(composite.slide.accession, []).append(probability(logits))
            labels[composite.slide.accession] = composite.slide.label
    scores = np.full((len(said), NUM_SETS), 0.5)
    for row, accession in enumerate(sorted(said)):
        own = np.array(said[accession])  # (composites, 16), NaN where a composite shows nothing of a set
        there = np.isfinite(own)
        known = there.any(0)
        scores[row, known] = np.where(there, own, 0).sum(0)[known] / there.sum(0)[known]
    return np.array([labels[accession] for accession in sorted(said)]), scores


def magnification_importance(folds: Sequence[Predictions], settings: Evaluation) -> list[Interval]:
    """What each magnification adds to the patients' AUC: exact Shapley values of the 16 sets, no image being worth 0.5."""
    label, scores = scores_of_sets(folds)

    def values(chosen: Ints) -> Floats:
        return shapley_values(np.array([roc_auc(label[chosen], scores[chosen, k]) for k in range(NUM_SETS)]))

    def of_magnification(m: int) -> Callable[[Ints], float]:
        return lambda chosen: float(values(chosen)[m])

    count = min(settings.bootstrap_resamples, 500)
    return [
        bootstrap_interval(of_magnification(m), len(label), count, settings.confidence, settings.seed)
        for m in range(len(MAGNIFICATIONS))
    ]
