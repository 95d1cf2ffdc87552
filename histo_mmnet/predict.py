"""Probabilities of malignancy for slides in BreakHis' folders and names, by the fold networks of a run.

python histo_mmnet/predict.py --run runs/histo_mmnet/phantom-1a2b3c4d --input data/new_slides --output new.csv
python histo_mmnet/predict.py --run runs/histo_mmnet/lab --input data/new_slides --output new.csv evaluation.flips=true

A patient is judged by the mean of all fold networks that neither trained nor validated on it (by accession, as the run's
split.csv says), new patients by all of them. Writes a row per patient, and one per slide beside it (new_slides.csv).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from common.command import parse_config, script_parser
from common.errors import config_error, data_error, run_script
from common.files import write_text
from common.logbook import progress
from common.memory import keep_freed_memory
from common.parallel import inference_device
from histo_mmnet.composites import all_composites
from histo_mmnet.config import PRESETS, Config
from histo_mmnet.members import mmnet_of
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.nesting import nesting_of
from histo_mmnet.predictions import ALL, load_member, predict, probability
from histo_mmnet.results import as_csv, fold_thresholds
from histo_mmnet.scan import find_breast, scan
from histo_mmnet.slides import Album, Slide, slides_of
from histo_mmnet.splits import Trial, read_split
from histo_mmnet.trainer import Files


def unseen(trial: Trial, slides: list[Slide]) -> list[Slide]:
    """The slides of accessions that a trial neither trained nor validated on."""
    seen = {name.accession for name in (*trial.of("train"), *trial.of("val"))}
    return [slide for slide in slides if slide.accession not in seen]


def slide_probabilities(
    run: Path, trials: list[Trial], slides: list[Slide], config: Config, device: torch.device
) -> dict[str, list[tuple[int, float]]]:
    """Slide -> (fold, mean probability of its composites) of every network that may judge it."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    album = Album.of(config)
    for trial in progress(trials, "folds", len(trials), True):
        own = unseen(trial, slides)
        path = Files.of(run, mmnet_of(trial.number)).best
        if not own or not path.exists():
            continue
        network, trained = load_member(path, mmnet_of(trial.number), device)
        composites = all_composites(own, MAGNIFICATIONS)
        used = dataclasses.replace(trained, evaluation=config.evaluation)
        said = probability(predict(network, composites, album, used, (ALL,)).logits)
        for slide in own:
            rows = [k for k, composite in enumerate(composites) if composite.slide is slide]
            found[slide.name].append((trial.number, float(said[rows].mean())))
    return found


def row_of(
    key: str, name: str, slides: list[Slide], of: dict[str, list[tuple[int, float]]], limits: dict[int, float]
) -> dict[str, Any]:
    """One row of a table: the mean over networks, each the mean over composites, and how far networks lie apart."""
    weights = [slide.num_composites for slide in slides]
    folds = [fold for fold, _ in of[slides[0].name]]
    values = np.array([[p for _, p in of[slide.name]] for slide in slides])  # (slides, networks)
    per_network = np.average(values, axis=0, weights=weights)
    threshold = float(np.mean([limits[fold] for fold in folds]))
    mean = float(per_network.mean())
    return {
        key: name, "probability": round(mean, 6), "lowest_network": round(float(per_network.min()), 6),
        "highest_network": round(float(per_network.max()), 6), "networks": len(folds), "threshold": round(threshold, 6),
        "said": "malignant" if mean >= threshold else "benign", "slides": len(slides),
        "images": sum(len(paths) for slide in slides for paths in slide.images.values()),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--run", type=Path, metavar="FOLDER", required=True, help="a trained and judged run's folder")
    parser.add_argument("--input", type=Path, metavar="FOLDER", required=True, help="slides in BreakHis' layout")
    parser.add_argument("--output", type=Path, metavar="FILE.csv", required=True, help="the patients' table")
    config, flags = parse_config(parser, PRESETS, arguments)
    if flags.output.suffix != ".csv":
        raise config_error(f"--output: expected a .csv file, got {flags.output}")
    keep_freed_memory()
    trials, limits = read_split(flags.run / "split.csv"), fold_thresholds(flags.run)
    images = scan(find_breast(flags.input))
    slides = slides_of(images, {})
    if config.data.nesting:
        slides = slides_of(images, nesting_of(slides, Album.of(config)))
    of = slide_probabilities(flags.run, [t for t in trials if t.number in limits], slides, config, inference_device())
    missing = [slide.name for slide in slides if slide.name not in of]
    if missing:
        raise data_error(
            f"--input: every network was trained or validated on {missing[0]} ({len(missing)} slides in all); "
            "expected slides of other patients"
        )
    patients: dict[str, list[Slide]] = defaultdict(list)
    for slide in slides:
        patients[slide.accession].append(slide)
    rows = [row_of("accession", name, own, of, limits) for name, own in sorted(patients.items())]
    write_text(flags.output, as_csv(rows))
    beside = flags.output.with_name(f"{flags.output.stem}_slides.csv")
    write_text(beside, as_csv([row_of("slide", slide.name, [slide], of, limits) for slide in slides]))
    malignant = sum(row["said"] == "malignant" for row in rows)
    print(
        f"{len(rows)} patients: {malignant} malignant, {len(rows) - malignant} benign", flags.output, beside, sep="\n"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
