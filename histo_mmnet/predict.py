"""Probabilities of malignancy for new slides, by the fold networks of a run.

python histo_mmnet/predict.py --run runs/histo_mmnet/lab --input data/new --output new.csv
python histo_mmnet/predict.py --run runs/histo_mmnet/lab --input data/new --output new.csv --gradcam new evaluation.flips=true

The input holds PATIENT/SLIDE/40X/*.png, 100X, 200X, 400X as far as there are any, with names of any kind, or slides in
BreakHis' folders and names. A patient is judged by the mean of all fold networks that neither trained nor validated on it (by
accession, as the run's split.csv says), new patients by all of them. Writes a row per patient, and one per slide beside it
(new_slides.csv); --gradcam draws a picture per patient.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import dataclasses
import re
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from common.command import parse_config, script_parser
from common.errors import UserError, config_error, data_error, run_script
from common.files import write_text
from common.logbook import progress
from common.memory import keep_freed_memory
from common.parallel import inference_device
from histo_mmnet.comparison import threshold_rule
from histo_mmnet.composites import Composite, all_composites, bag_of
from histo_mmnet.config import PRESETS, Config, Evaluation
from histo_mmnet.gradcam import check_layer, draw_explained, explain
from histo_mmnet.members import Network, mmnet_of, pools_patients
from histo_mmnet.names import CLASSES, MAGNIFICATIONS
from histo_mmnet.nesting import nesting_of
from histo_mmnet.predictions import ALL, load_member, predict, probability
from histo_mmnet.results import as_csv, fold_thresholds
from histo_mmnet.scan import find_breast, scan
from histo_mmnet.slides import Album, Slide, new_slides, own_places, slides_of
from histo_mmnet.splits import Trial, read_split
from histo_mmnet.trainer import Files


def unseen(trial: Trial, slides: list[Slide]) -> list[Slide]:
    """The slides of accessions that a trial neither trained nor validated on."""
    seen = {name.accession for name in (*trial.of("train"), *trial.of("val"))}
    return [slide for slide in slides if slide.accession not in seen]


SHOWN = 5  # files that are told by name


@dataclasses.dataclass(frozen=True)
class Judge:
    """A fold's network."""

    trial: Trial
    network: Network
    trained: Config  # with what it was trained
    threshold: float  # of patients, chosen by eval.py


def judges_of(run: Path, device: torch.device) -> list[Judge]:
    """The networks of a run that eval.py has judged. Raises a config error where there is none."""
    found, limits = [], fold_thresholds(run)
    for trial in read_split(run / "split.csv"):
        path = Files.of(run, mmnet_of(trial.number)).best
        if trial.number not in limits or not path.exists():
            print(f"note: fold {trial.number} has no weights or no threshold in {run}; the others judge")
            continue
        network, trained = load_member(path, mmnet_of(trial.number), device)
        found.append(Judge(trial, network, trained, limits[trial.number]))
    if not found:
        raise config_error(f"--run: no fold of {run} has weights and a threshold; expected a trained and judged run")
    return found


def find_slides(folder: Path) -> list[Slide]:
    """The slides of a folder: in BreakHis' layout and names, or as PATIENT/SLIDE/40X/*.png whatever the names."""
    try:
        breast = find_breast(folder)
    except UserError:
        slides, ignored = new_slides(folder)
        if ignored:
            more = f" and {len(ignored) - SHOWN} more" if len(ignored) > SHOWN else ""
            print(f"note: not PATIENT/SLIDE/40X/*.png, and left out: {', '.join(ignored[:SHOWN])}{more}")
        return slides
    return slides_of(scan(breast), {})


Group = tuple[str, str]  # "patient" or "slide", and its name
Said = dict[Group, list[tuple[Judge, float]]]  # each network that may judge it, and its mean probability


def said_of(judges: list[Judge], groups: dict[Group, list[Slide]], album: Album, settings: Evaluation) -> Said:
    """What each network says of groups of slides (patients, and single slides) that it neither trained nor validated on."""
    found: Said = defaultdict(list)
    for judge in progress(judges, "networks", len(judges), True):
        own = {group: judged_composites(s, judge.trained) for group, s in groups.items() if unseen(judge.trial, s)}
        composites = [composite for some in own.values() for composite in some]
        used = dataclasses.replace(judge.trained, evaluation=settings)
        said = probability(predict(judge.network, composites, album, used, (ALL,)).logits)
        ends = np.cumsum([len(some) for some in own.values()])
        for group, values in zip(own, np.split(said, ends[:-1]), strict=True):
            found[group].append((judge, float(values.mean())))
    return found


def judged_composites(slides: list[Slide], config: Config) -> list[Composite]:
    """What a network of all magnifications judges of slides of one patient."""
    if pools_patients(mmnet_of(0), config.model):
        return bag_of(slides, MAGNIFICATIONS)
    return all_composites(slides, MAGNIFICATIONS)


def row_of(group: Group, slides: list[Slide], said: Said) -> dict[str, Any]:
    """One row of a table: the mean over networks, each the mean over composites, and how far networks lie apart."""
    values = np.array([probability for _, probability in said[group]])
    threshold = float(np.mean([judge.threshold for judge, _ in said[group]]))
    key, name = group
    mean = float(values.mean())
    return {
        key: name, "probability": round(mean, 6), "lowest_network": round(float(values.min()), 6),
        "highest_network": round(float(values.max()), 6), "networks": len(values), "threshold": round(threshold, 6),
        "said": CLASSES["BM"[int(mean >= threshold)]], "slides": len(slides),
        "images": sum(len(paths) for slide in slides for paths in slide.images.values()),
    }  # fmt: skip


def draw_reasons(
    folder: Path, patients: dict[Group, list[Slide]], said: Said, album: Album, settings: Evaluation
) -> None:
    """A Grad-CAM per patient: the first composite, the network whose probability is in the middle."""
    for number, (group, slides) in enumerate(progress(patients.items(), "drawing Grad-CAM", len(patients), True), 1):
        judge, _ = sorted(said[group], key=lambda pair: pair[1])[(len(said[group]) - 1) // 2]
        used = dataclasses.replace(judge.trained, evaluation=settings)
        composite = all_composites(slides, MAGNIFICATIONS)[0]
        found = explain(judge.network, composite, album, used, judge.threshold)
        file = re.sub(r"[^\w.-]", "_", group[1])
        words = f"the network of fold {judge.trial.number}, one composite of {group[1]}"
        draw_explained(found, album, words, folder / f"{number:03d}_{file}.png")


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--run", type=Path, metavar="FOLDER", required=True, help="a trained and judged run's folder")
    parser.add_argument(
        "--input", type=Path, metavar="FOLDER", required=True, help="slides: BreakHis, or PATIENT/SLIDE/40X"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.csv", required=True, help="the patients' table")
    parser.add_argument("--gradcam", type=Path, metavar="FOLDER", help="draw for each patient what a network looks at")
    config, flags = parse_config(parser, PRESETS, arguments)
    if flags.output.suffix != ".csv":
        raise config_error(f"--output: expected a .csv file, got {flags.output}")
    keep_freed_memory()
    judges = judges_of(flags.run, inference_device())
    if flags.gradcam is not None:
        check_layer(judges[0].network, judges[0].trained, config.evaluation.gradcam_layer)
    trained = judges[0].trained  # images are prepared as in training, whatever the command says
    album, slides = Album.of(trained), find_slides(flags.input)
    if trained.data.nesting:
        nesting = nesting_of(slides, album)
        slides = [dataclasses.replace(slide, nesting=own_places(slide, nesting)) for slide in slides]
    patients: dict[Group, list[Slide]] = defaultdict(list)
    for slide in slides:
        patients["patient", slide.accession].append(slide)
    single: dict[Group, list[Slide]] = {("slide", slide.name): [slide] for slide in slides}
    said = said_of(judges, patients | single, album, config.evaluation)
    missing = [name for kind, name in patients if (kind, name) not in said]
    if missing:
        raise data_error(
            f"--input: every network was trained or validated on {missing[0]} ({len(missing)} patients in all); "
            "expected other patients"
        )
    rows = [row_of(group, own, said) for group, own in sorted(patients.items())]
    print(f"thresholds: {threshold_rule(flags.run)}, as eval.py chose them last")
    if trained.data.source == "phantom":
        print("note: these networks were trained on simulated patients")
    write_text(flags.output, as_csv(rows))
    beside = flags.output.with_name(f"{flags.output.stem}_slides.csv")
    write_text(beside, as_csv([row_of(group, own, said) for group, own in single.items()]))
    if flags.gradcam is not None:
        draw_reasons(flags.gradcam, patients, said, album, config.evaluation)
    malignant = sum(row["said"] == CLASSES["M"] for row in rows)
    written = [flags.output, beside, *([flags.gradcam] if flags.gradcam is not None else [])]
    print(f"{len(rows)} patients: {malignant} malignant, {len(rows) - malignant} benign", *written, sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
