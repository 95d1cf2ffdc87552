"""Two runs on the same patients: the paired difference of their figures."""

import csv
from pathlib import Path

import numpy as np

from common.errors import data_error
from common.files import parsing, read_text
from common.metrics.classification import confusion, roc_auc
from common.metrics.intervals import bootstrap_interval
from histo_mmnet.config import Evaluation
from histo_mmnet.evaluation import Ints

COLUMNS = ("accession", "label", "probability", "threshold")


def patients_of(folder: Path) -> dict[str, tuple[int, float, float]]:
    """Accession -> label, mean probability and threshold, from results/predictions.csv."""
    path = folder / "results" / "predictions.csv"
    if not path.exists():
        raise data_error(f"{path}: no such file; eval.py of that run writes it")
    with parsing(path, "eval.py of that run writes it anew"):
        rows = list(csv.DictReader(read_text(path).splitlines()))
        found: dict[str, list[tuple[int, float, float]]] = {}
        for row in rows:
            own = int(row["label"]), float(row["probability"]), float(row["threshold"])
            found.setdefault(row["accession"], []).append(own)
    return {
        accession: (own[0][0], float(np.mean([p for _, p, _ in own])), float(np.mean([t for _, _, t in own])))
        for accession, own in found.items()
    }


def compare(folder: Path, other: Path, settings: Evaluation) -> str:
    """Lines: differences of balanced accuracy and AUC on the patients that both judged, with paired intervals."""
    ours, theirs = patients_of(folder), patients_of(other)
    common = sorted(ours.keys() & theirs.keys())
    if len({ours[accession][0] for accession in common}) < 2:
        raise data_error(f"--compare: {other} judged {len(common)} patients of this run; expected some of both classes")
    wrong = [accession for accession in common if ours[accession][0] != theirs[accession][0]]
    if wrong:
        raise data_error(f"--compare: {other}: accession {wrong[0]} has another label there")
    label = np.array([ours[accession][0] for accession in common])
    score = [np.array([run[accession][1] for accession in common]) for run in (ours, theirs)]
    positive = [np.array([run[accession][1] >= run[accession][2] for accession in common]) for run in (ours, theirs)]

    def balanced(chosen: Ints) -> float:
        one, two = (confusion(label[chosen], p[chosen]).balanced_accuracy for p in positive)
        return one - two

    def area(chosen: Ints) -> float:
        one, two = (roc_auc(label[chosen], s[chosen]) for s in score)
        return one - two

    lines = [f"beside {other}, {len(common)} patients of both runs, paired {100 * settings.confidence:g}% intervals:"]
    for name, statistic in (("balanced accuracy", balanced), ("AUC", area)):
        interval = bootstrap_interval(
            statistic, len(common), settings.bootstrap_resamples, settings.confidence, settings.seed
        )
        lines.append(f"  {name} {interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
    return "\n".join(lines)
