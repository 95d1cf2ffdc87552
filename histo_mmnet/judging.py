"""Every fold tested once with its own threshold; the baselines beside; what results/ holds of it."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_checkpoint
from common.errors import config_error, data_error
from common.logbook import progress, read_metrics
from common.metrics.classification import confusion
from histo_mmnet.colours import colour_table, nearest
from histo_mmnet.comparison import paired
from histo_mmnet.config import Config
from histo_mmnet.evaluation import (
    LEVELS,
    Cases,
    Figures,
    FoldVerdict,
    Level,
    calibration_error,
    cases_of,
    figures_of,
    patient_of,
    recognition_rate,
    thresholds_of,
    with_interval,
)
from histo_mmnet.folds import composites_of, images_digest
from histo_mmnet.members import KIND, Member, baselines_of, mmnet_of
from histo_mmnet.places import Collection
from histo_mmnet.predictions import ALL, NUM_SETS, load_member, predict, probability
from histo_mmnet.slides import Album
from histo_mmnet.splits import Trial, shared_units
from histo_mmnet.trainer import MONITOR, Files, ends_early

SILENT = 0.01  # range of probabilities below which a network says nothing


def judge_member(
    collection: Collection,
    trial: Trial,
    member: Member,
    config: Config,
    album: Album,
    folder: Path,
    device: torch.device,
) -> FoldVerdict:
    """Predict the validation and the test composites; the thresholds are those of this fold alone."""
    path = Files.of(folder, member).best
    network, trained = load_member(path, member, device)
    check_images(path, images_digest(collection, trial))
    used = dataclasses.replace(trained, evaluation=config.evaluation)
    validation = predict(network, composites_of(collection, trial, member, "val", trained), album, used, (ALL,))
    composites = composites_of(collection, trial, member, "test", trained)
    began = time.perf_counter()
    predictions = predict(network, composites, album, used, (ALL,) if member.prefix else range(1, NUM_SETS))
    patients = len({composite.slide.accession for composite in composites})
    seconds = (time.perf_counter() - began) / max(1, patients)
    own = thresholds_of([(trial.number, validation)], set(), config.evaluation.threshold_for, config.split.protocol)
    return FoldVerdict(member, validation, predictions, own, seconds)


def check_images(path: Path, digest: str) -> None:
    """A data error where a network was trained or validated on other files than those of its trial here."""
    if load_checkpoint(path, KIND, {"images": str})["images"] != digest:
        raise data_error(
            f"{path}: was trained on other images than data.root holds now (a file's name or size changed); restore them, or "
            "train anew with --fresh"
        )


def with_pooled_thresholds(folds: list[FoldVerdict], config: Config) -> list[FoldVerdict]:
    """Each fold's thresholds from the validation composites of all folds, without the patients that it tests."""
    pool = [(fold.member.fold, fold.validation) for fold in folds]
    tested = [{c.slide.accession for c in fold.predictions.composites} for fold in folds]
    criterion, protocol = config.evaluation.threshold_for, config.split.protocol
    return [
        dataclasses.replace(fold, thresholds=thresholds_of(pool, own, criterion, protocol))
        for fold, own in zip(folds, tested, strict=True)
    ]


def check_trained(trials: list[Trial], folder: Path) -> list[str]:
    """Lines about networks whose training did not end; a config error where a fold has none."""
    told = []
    for trial in trials:
        files = Files.of(folder, mmnet_of(trial.number))
        if not files.best.exists():
            raise config_error(
                f"--run: no weights at {files.best}: training was interrupted, or of other folds only; the same train.py "
                "command continues it"
            )
        for member in (mmnet_of(trial.number), *baselines_of(trial.number)):
            files = Files.of(folder, member)
            if files.best.exists():
                config = load_member(files.best, member, torch.device("cpu"))[1]
                records = read_metrics(files.metrics, (MONITOR,))
                if len(records) < config.train.epochs and not ends_early(records, config):
                    told.append(
                        f"{member.name} of fold {member.fold} stopped at epoch {len(records)} of {config.train.epochs}; "
                        "train.py continues it"
                    )
    return told


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """All folds of MMNet, the same of each magnification's baseline, and the figures."""

    folds: list[FoldVerdict]
    baselines: dict[str, list[FoldVerdict]]
    cases: dict[Level, Cases]  # of MMNet
    figures: Figures


def judge(collection: Collection, trials: list[Trial], config: Config, folder: Path, device: torch.device) -> Verdict:
    """Everything that is reported; test images are looked at once."""
    album = Album.of(config)

    def judged(members: list[Member]) -> list[FoldVerdict]:
        of = {trial.number: trial for trial in trials}
        bar = progress(members, f"judging {members[0].name}", len(members), True)
        found = [judge_member(collection, of[m.fold], m, config, album, folder, device) for m in bar]
        return with_pooled_thresholds(found, config) if config.evaluation.threshold == "pooled" else found

    folds = judged([mmnet_of(trial.number) for trial in trials])
    baselines = {}
    if all(Files.of(folder, member).best.exists() for trial in trials for member in baselines_of(trial.number)):
        columns = zip(*(baselines_of(trial.number) for trial in trials), strict=True)
        baselines = {members[0].name: judged(list(members)) for members in columns}
    cases = {level: cases_of(folds, level, config.split.protocol) for level in LEVELS}
    figures = main_figures(folds, cases, config) | single_figures(cases["patient"], baselines, config)
    figures |= colour_figures(collection, trials, config) | protocol_figures(trials, cases["patient"], config)
    return Verdict(folds, baselines, cases, figures)


def told_of_silence(folds: list[FoldVerdict]) -> list[str]:
    """Lines about networks that say the same of everything: their figures are of noise."""
    told = []
    for fold in folds:
        said = probability(fold.predictions.logits)
        if len(said) and said.max() - said.min() < SILENT:
            told.append(
                f"warning: the network of fold {fold.member.fold} tells nothing apart: all its probabilities lie between "
                f"{said.min():.4f} and {said.max():.4f}"
            )
    return told


def main_figures(folds: list[FoldVerdict], cases: dict[Level, Cases], config: Config) -> Figures:
    """Of MMNet at each level."""
    figures: Figures = {}
    for level, own in progress(cases.items(), "intervals", len(cases), True):
        figures |= figures_of(own, level, config.evaluation)
        figures[f"{level}_calibration_error"] = calibration_error(own)
    figures |= with_interval("patient_recognition_rate", recognition_rate(cases["image"], config.evaluation))
    figures |= with_interval("patient_composite_rate", recognition_rate(cases["composite"], config.evaluation))
    return figures | {
        "folds": len(folds),
        "seconds_per_patient": float(np.mean([fold.seconds_per_patient for fold in folds])),
    }


def single_figures(patients: Cases, baselines: dict[str, list[FoldVerdict]], config: Config) -> Figures:
    """Of each magnification's own networks, and how MMNet differs from the best of them."""
    figures: Figures = {}
    of = {name: cases_of(own, "patient", config.split.protocol) for name, own in baselines.items()}
    for name, cases in of.items():
        found = figures_of(cases, "patient", config.evaluation)
        figures |= {
            f"single_{name}_{figure}{end}": found[f"patient_{figure}{end}"]
            for figure in ("balanced_accuracy", "auc")
            for end in ("", "_low", "_high")
        }
    if not of:
        return figures
    best = max(of, key=lambda name: float(figures[f"single_{name}_balanced_accuracy"]))
    figures |= {
        "best_single_magnification": best,
        "best_single_magnification_balanced_accuracy": figures[f"single_{best}_balanced_accuracy"],
    }
    for name, interval in paired(patients, of[best], config.evaluation).items():
        figures |= with_interval(f"over_best_single_{name}", interval)
    return figures


def colour_figures(collection: Collection, trials: list[Trial], config: Config) -> Figures:
    """The nearest neighbour by 18 colour numbers among a fold's other images; of photographs, and of patients by vote."""
    images = collection.images
    table = colour_table([image.path for image in images], len(images))
    place = {image.name: at for at, image in enumerate(images)}
    label = np.array([image.name.label for image in images])
    found, tested, patients = [], [], []
    for trial in trials:
        test = [place[name] for name in trial.of("test")]
        seen = [place[name] for name in (*trial.of("train"), *trial.of("val"))]
        allowed = np.ones((len(test), len(seen)), np.bool_)
        found += label[np.array(seen)[nearest(table[test], table[seen], allowed)]].tolist()
        tested += test
        slides = (images[at].name for at in test)
        patients += [patient_of(name.slide, name.accession, trial.number, config.split.protocol) for name in slides]
    cases = Cases(
        np.array(found, float),
        label[tested],
        np.full(len(tested), 0.5),
        tuple(patients),
        tuple(images[at].name.accession for at in tested),
    )
    voted = figures_of(cases.of_patients(), "colour", config.evaluation)
    return {
        **{f"colour_baseline_balanced_accuracy{end}": voted[f"colour_balanced_accuracy{end}"]
           for end in ("", "_low", "_high")},
        "colour_baseline_image_balanced_accuracy": confusion(cases.label, cases.positive).balanced_accuracy,
        "chance_balanced_accuracy": 0.5,
    }  # fmt: skip


def protocol_figures(trials: list[Trial], patients: Cases, config: Config) -> Figures:
    """How the data was divided, and how much of what is tested is of accessions that trained or validated."""
    leaking = [shared_units(trial, "accession") for trial in trials]
    return {
        "split_protocol": config.split.protocol,
        "threshold_rule": f"{config.evaluation.threshold_for.replace('_', ' ')} on validation, {config.evaluation.threshold}",
        "n_accessions": len(set(patients.accession)),
        "shared_accessions": len(set().union(*leaking)),
        "leaking_test_images": sum(len(names) for shared in leaking for names in shared.values()),
    }
