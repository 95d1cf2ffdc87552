"""Two runs on the same patients: the paired difference of their figures."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.errors import data_error
from common.files import parsing, read_text
from common.metrics.classification import confusion, roc_auc
from common.metrics.intervals import Interval, bootstrap_interval
from histo_mmnet.config import Evaluation
from histo_mmnet.evaluation import Ints

Decided = dict[str, tuple[int, float, float]]  # accession -> label, mean probability and threshold


def patients_of(folder: Path) -> Decided:
    """What a run's results/predictions.csv holds."""
    path = folder / "results" / "predictions.csv"
    if not path.exists():
        raise data_error(f"{path}: no such file; eval.py of that run writes it")
    with parsing(path, "eval.py of that run writes it anew"):
        rows = csv.DictReader(read_text(path).splitlines())
        return decided(
            (row["accession"], int(row["label"]), float(row["probability"]), float(row["threshold"])) for row in rows
        )


def decided(rows: Iterable[tuple[str, int, float, float]]) -> Decided:
    """Patients of composites, each with its accession, label, probability and threshold."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for accession, label, said, threshold in rows:
        found.setdefault(accession, []).append((label, said, threshold))
    return {
        accession: (own[0][0], float(np.mean([p for _, p, _ in own])), float(np.mean([t for _, _, t in own])))
        for accession, own in found.items()
    }


def paired(ours: Decided, theirs: Decided, settings: Evaluation) -> dict[str, Interval]:
    """Differences of balanced accuracy and AUC on patients of both, with intervals over patients drawn together."""
    both = sorted(ours.keys() & theirs.keys())
    label = np.array([ours[accession][0] for accession in both])
    score = [np.array([run[accession][1] for accession in both]) for run in (ours, theirs)]
    positive = [np.array([run[accession][1] >= run[accession][2] for accession in both]) for run in (ours, theirs)]

    def balanced(chosen: Ints) -> float:
        one, two = (confusion(label[chosen], p[chosen]).balanced_accuracy for p in positive)
        return one - two

    def area(chosen: Ints) -> float:
        one, two = (roc_auc(label[chosen], s[chosen]) for s in score)
        return one - two

    resamples, confidence, seed = settings.bootstrap_resamples, settings.confidence, settings.seed
    return {
        name: bootstrap_interval(statistic, len(both), resamples, confidence, seed)
        for name, statistic in (("balanced_accuracy", balanced), ("auc", area))
    }


def compare(folder: Path, other: Path, settings: Evaluation) -> str:
    """Lines: how two runs differ on the patients that both judged."""
    ours, theirs = patients_of(folder), patients_of(other)
    both = sorted(ours.keys() & theirs.keys())
    if len({ours[accession][0] for accession in both}) < 2:
        raise data_error(f"--compare: {other} judged {len(both)} patients of this run; expected some of both classes")
    wrong = [accession for accession in both if ours[accession][0] != theirs[accession][0]]
    if wrong:
        raise data_error(f"--compare: {other}: accession {wrong[0]} has another label there")
    lines = [f"beside {other}, {len(both)} patients of both runs, paired {100 * settings.confidence:g}% intervals:"]
    for name, interval in paired(ours, theirs, settings).items():
        words = name.replace("auc", "AUC").replace("_", " ")
        lines.append(f"  {words} {interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
    return "\n".join(lines)
