"""Every fold tested once with its own threshold; the baselines beside; what results/ holds of it."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from common.errors import config_error
from common.logbook import progress
from common.metrics.classification import Criterion, roc_auc
from histo_mmnet.colours import colour_table, nearest
from histo_mmnet.comparison import Decided, decided, paired
from histo_mmnet.composites import Composite, all_composites
from histo_mmnet.config import Config
from histo_mmnet.evaluation import (
    Cases,
    Figures,
    balanced_accuracy_of,
    calibration_error,
    cases_of,
    figures_of,
    over_patients,
    recognition_rate,
    threshold_of,
)
from histo_mmnet.members import Member, baselines_of, mmnet_of
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.places import Collection, slides_of_role
from histo_mmnet.predictions import ALL, NUM_SETS, Predictions, load_member, predict, probability
from histo_mmnet.slides import Album
from histo_mmnet.splits import Trial
from histo_mmnet.trainer import Files

SUMMARY = ("accuracy", "balanced_accuracy", "f1", "auc", "precision", "recall")
CURVES = {"train_losses": "train_loss", "val_losses": "val_loss", "val_balanced_accuracies": "val_balanced_accuracy",
          "val_aucs": "val_auc", "learning_rates": "learning_rate"}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class FoldVerdict:
    """One member on one fold's test images; the threshold was chosen on validation images."""

    member: Member
    validation: Predictions
    predictions: Predictions
    threshold: float
    seconds_per_patient: float


def judge_member(
    collection: Collection,
    trial: Trial,
    member: Member,
    config: Config,
    album: Album,
    folder: Path,
    device: torch.device,
) -> FoldVerdict:
    """Predict the validation and the test composites; the threshold is that of this fold alone."""
    path = Files.of(folder, member).best
    if not path.exists():
        script = "train.py" if not member.prefix else "train_single_mag.py"
        raise config_error(
            f"--run: no weights at {path}; {script} with the same words and --fold {member.fold} trains them"
        )
    network, trained = load_member(path, member, device)
    used = dataclasses.replace(trained, evaluation=config.evaluation)
    validation = predict(network, composites_of(collection, trial, member, "val"), album, used, (ALL,))
    composites = composites_of(collection, trial, member, "test")
    began = time.perf_counter()
    predictions = predict(network, composites, album, used, (ALL,) if member.prefix else range(1, NUM_SETS))
    patients = len({composite.slide.accession for composite in composites})
    seconds = (time.perf_counter() - began) / max(1, patients)
    return FoldVerdict(
        member, validation, predictions, threshold_of([validation], set(), config.evaluation.threshold_for), seconds
    )


def with_pooled_thresholds(folds: list[FoldVerdict], criterion: Criterion) -> list[FoldVerdict]:
    """Each fold's threshold from the validation composites of all folds, without the patients that it tests."""
    pool = [fold.validation for fold in folds]
    tested = [{c.slide.accession for c in fold.predictions.composites} for fold in folds]
    return [
        dataclasses.replace(fold, threshold=threshold_of(pool, own, criterion))
        for fold, own in zip(folds, tested, strict=True)
    ]


def composites_of(collection: Collection, trial: Trial, member: Member, role: str) -> list[Composite]:
    return all_composites(slides_of_role(collection, trial, role), member.magnifications)


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """All folds of MMNet, the same of each magnification's baseline, and the figures."""

    folds: list[FoldVerdict]
    baselines: dict[str, list[FoldVerdict]]
    cases: Cases  # MMNet's composites
    figures: Figures


def judge(collection: Collection, trials: list[Trial], config: Config, folder: Path, device: torch.device) -> Verdict:
    """Everything that is reported; test images are looked at once."""
    album = Album.of(config)

    def judged(members: list[Member]) -> list[FoldVerdict]:
        of = {trial.number: trial for trial in trials}
        bar = progress(members, f"judging {members[0].name}", len(members), True)
        found = [judge_member(collection, of[m.fold], m, config, album, folder, device) for m in bar]
        pooled = config.evaluation.threshold == "pooled"
        return with_pooled_thresholds(found, config.evaluation.threshold_for) if pooled else found

    folds = judged([mmnet_of(trial.number) for trial in trials])
    baselines = {}
    if all(Files.of(folder, member).best.exists() for trial in trials for member in baselines_of(trial.number)):
        columns = zip(*(baselines_of(trial.number) for trial in trials), strict=True)
        baselines = {members[0].name: judged(list(members)) for members in columns}
    cases = cases_of([f.predictions for f in folds], [f.threshold for f in folds], ALL)
    return Verdict(folds, baselines, cases, all_figures(folds, baselines, cases, collection, trials, config))


def all_figures(
    folds: list[FoldVerdict],
    baselines: dict[str, list[FoldVerdict]],
    cases: Cases,
    collection: Collection,
    trials: list[Trial],
    config: Config,
) -> Figures:
    """The flat table of metrics.json."""
    settings = config.evaluation
    rate = recognition_rate(cases, settings)
    figures = figures_of(cases.of_patients(), "patient", settings) | {
        "patient_recognition_rate": rate.estimate,
        "patient_recognition_rate_low": rate.low,
        "patient_recognition_rate_high": rate.high,
    }
    figures |= figures_of(cases, "composite", settings) | {"composite_calibration_error": calibration_error(cases)}
    figures |= figures_of(photographs_of(folds), "image", settings)
    single = {}
    for name, own in baselines.items():
        patients = cases_of([f.predictions for f in own], [f.threshold for f in own], ALL).of_patients()
        interval = over_patients(patients, balanced_accuracy_of, settings)
        single[name] = interval.estimate
        figures |= {
            f"single_{name}_balanced_accuracy": interval.estimate,
            f"single_{name}_balanced_accuracy_low": interval.low,
            f"single_{name}_balanced_accuracy_high": interval.high,
            f"single_{name}_auc": roc_auc(patients.label, patients.probability),
        }
    if single:
        best = max(single, key=lambda name: single[name])
        figures |= {"best_single_magnification": best, "best_single_magnification_balanced_accuracy": single[best]}
        for name, interval in paired(decided_by(folds), decided_by(baselines[best]), settings).items():
            figures |= {
                f"over_best_single_{name}": interval.estimate,
                f"over_best_single_{name}_low": interval.low,
                f"over_best_single_{name}_high": interval.high,
            }
    return (
        figures
        | colour_figures(collection, trials, config)
        | {
            "chance_balanced_accuracy": 0.5,
            "n_patients": len(np.unique(cases.patient)),
            "folds": len(folds),
            "seconds_per_patient": float(np.mean([fold.seconds_per_patient for fold in folds])),
        }
    )


def decided_by(folds: list[FoldVerdict]) -> Decided:
    """What the folds say of their patients."""
    return decided(
        (composite.slide.accession, composite.slide.label, float(said), fold.threshold)
        for fold in folds
        for composite, said in zip(fold.predictions.composites, probability(fold.predictions.logits), strict=True)
    )


def photographs_of(folds: list[FoldVerdict]) -> Cases:
    """Every photograph by itself, as a composite of one."""
    parts = []
    for m in range(len(MAGNIFICATIONS)):
        for fold in folds:
            seen: dict[Path, int] = {}
            for k, composite in enumerate(fold.predictions.composites):
                path = composite.paths[m]
                if path is not None and path not in seen:
                    seen[path] = k
            parts += [(fold, k, m) for k in seen.values()]
    accessions = sorted({f.predictions.composites[k].slide.accession for f, k, _ in parts})
    number = {accession: at for at, accession in enumerate(accessions)}
    return Cases(
        probability(np.array([f.predictions.of_sets[k, 1 << m] for f, k, m in parts])),
        np.array([f.predictions.composites[k].slide.label for f, k, _ in parts]),
        np.array([number[f.predictions.composites[k].slide.accession] for f, k, _ in parts]),
        np.array([f.threshold for f, _, _ in parts]),
    )


def colour_figures(collection: Collection, trials: list[Trial], config: Config) -> Figures:
    """The nearest neighbour by 18 colour numbers among a fold's other images; of photographs, and of patients by vote."""
    images = collection.images
    table = colour_table([image.path for image in images], len(images))
    place = {image.name: at for at, image in enumerate(images)}
    label = np.array([image.name.label for image in images])
    found, tested = [], []
    for trial in trials:
        test = [place[name] for name in trial.of("test")]
        seen = [place[name] for name in (*trial.of("train"), *trial.of("val"))]
        allowed = np.ones((len(test), len(seen)), np.bool_)
        found += label[np.array(seen)[nearest(table[test], table[seen], allowed)]].tolist()
        tested += test
    patients = np.unique([images[at].name.accession for at in tested], return_inverse=True)[1]
    cases = Cases(np.array(found, float), label[tested], patients, np.full(len(tested), 0.5))
    interval = over_patients(cases.of_patients(), balanced_accuracy_of, config.evaluation)
    return {
        "colour_baseline_balanced_accuracy": interval.estimate,
        "colour_baseline_balanced_accuracy_low": interval.low,
        "colour_baseline_balanced_accuracy_high": interval.high,
        "colour_baseline_image_balanced_accuracy": balanced_accuracy_of(cases),
    }
