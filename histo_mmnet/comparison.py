"""Two judgements of the same patients: the paired difference of their figures."""

import csv
import json
from pathlib import Path

import numpy as np

from common.errors import data_error
from common.files import parsing, read_text
from common.metrics.classification import confusion, roc_auc
from common.metrics.intervals import Interval
from histo_mmnet.config import Evaluation
from histo_mmnet.evaluation import Cases, Ints, over_accessions

PAIRED = ("balanced_accuracy", "auc")


def patients_of(folder: Path) -> Cases:
    """The patients of a run, from its results/patients.csv."""
    path = folder / "results" / "patients.csv"
    if not path.exists():
        raise data_error(f"{path}: no such file; eval.py of that run writes it")
    with parsing(path, "eval.py of that run writes it anew"):
        rows = list(csv.DictReader(read_text(path).splitlines()))
        if not rows:
            raise ValueError("no patient in it")
        return Cases(
            np.array([float(row["probability"]) for row in rows]),
            np.array([int(row["label"]) for row in rows], np.int64),
            np.array([float(row["threshold"]) for row in rows]),
            tuple(row["patient"] for row in rows),
            tuple(row["accession"] for row in rows),
        )


def threshold_rule(run: Path) -> str:
    """How the thresholds of a judged run were chosen, in words."""
    path = run / "results" / "metrics.json"
    with parsing(path, "eval.py writes it anew"):
        return str(json.loads(read_text(path))["threshold_rule"])


def shared(ours: Cases, theirs: Cases) -> list[tuple[int, int]]:
    """Rows of the patients that stand in both, in order of their names."""
    there = {name: row for row, name in enumerate(theirs.patient)}
    return [(row, there[name]) for row, name in enumerate(ours.patient) if name in there]


def paired(ours: Cases, theirs: Cases, settings: Evaluation) -> dict[str, Interval]:
    """Differences of balanced accuracy and AUC on patients of both, with intervals over accessions drawn together."""
    rows = np.array(shared(ours, theirs), np.int64).reshape(-1, 2)
    label = ours.label[rows[:, 0]]
    positive = ours.positive[rows[:, 0]], theirs.positive[rows[:, 1]]
    score = ours.probability[rows[:, 0]], theirs.probability[rows[:, 1]]

    def differences(drawn: Ints) -> tuple[float, float]:
        one, two = (confusion(label[drawn], own[drawn]).balanced_accuracy for own in positive)
        first, second = (roc_auc(label[drawn], own[drawn]) for own in score)
        return one - two, first - second

    accessions = [ours.accession[k] for k in rows[:, 0]]
    return dict(zip(PAIRED, over_accessions(accessions, differences, settings), strict=True))


def compare(folder: Path, other: Path, settings: Evaluation) -> str:
    """Lines: how two runs differ on the patients that both judged."""
    ours, theirs = patients_of(folder), patients_of(other)
    rows = shared(ours, theirs)
    if len({int(ours.label[k]) for k, _ in rows}) < 2:
        raise data_error(f"--compare: {other} judged {len(rows)} patients of this run; expected some of both classes")
    wrong = [ours.patient[k] for k, there in rows if ours.label[k] != theirs.label[there]]
    if wrong:
        raise data_error(f"--compare: {other}: patient {wrong[0]} has another label there")
    lines = [f"beside {other}, {len(rows)} patients of both runs, paired {100 * settings.confidence:g}% intervals:"]
    rules = threshold_rule(folder), threshold_rule(other)
    if rules[0] != rules[1]:
        lines.append(f"  note: thresholds here by {rules[0]}, there by {rules[1]}")
    for name, interval in paired(ours, theirs, settings).items():
        words = name.replace("auc", "AUC").replace("_", " ")
        lines.append(f"  {words} {interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
    return "\n".join(lines)
