"""Measure a trained run: threshold from the validation fold, figures from the test fold, baseline and chance beside.

python motor_detection/eval.py
python motor_detection/eval.py --run runs/motor_detection/kaggle-1a2b3c4d inference.flips=true

Finds the run of the same preset and words that train.py was given (or --run FOLDER), picks motors in every whole
tomogram of the validation and the test fold, chooses the score threshold on validation and reports the test fold once:
F-beta with its bootstrap interval, precision, recall, localisation error, a blob picker and random points. Writes
results/metrics.json, results/picks_{validation,test}.csv, figures/ and report.html into the run's folder.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import torch

from common.command import parse_config, script_parser
from common.config import as_yaml
from common.errors import config_error, run_script
from common.files import read_text, write_text
from common.lock import exclusive
from common.logbook import read_metrics
from common.memory import keep_freed_memory
from common.parallel import inference_device
from common.report import Section, write_report
from motor_detection.config import PRESETS, Config
from motor_detection.evaluation import Blobs, Picked, blobs_of, choose_blobs, curve_of, evaluate, pick_fold
from motor_detection.figures import LEARNING_CURVE, draw_learning_curve, draw_picks, draw_precision_recall, view_of
from motor_detection.inference import check_unseen, load_model, tell_rounding, working_copy
from motor_detection.labels import LabelledTomogram
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.pick_files import write_picks_csv
from motor_detection.places import (
    check_has_motors,
    read_tomograms,
    resolve_data,
    run_folder,
    tomograms_of_fold,
    training_identity,
)
from motor_detection.tomograms import open_tomogram

SHOWN_TOMOGRAMS = 6


def load_run(config: Config, folder: Path, device: torch.device) -> MotorIdentifier:
    """The best weights of a run, which must be the run of these constants."""
    best = folder / "checkpoints" / "best.pt"
    model, trained = load_model(best, device)
    if training_identity(trained) != training_identity(config):
        raise config_error(
            f"{best}: was trained with other constants than these; give --run FOLDER and nothing that shapes it"
        )
    return model


def folds_to_pick(config: Config, labelled: list[LabelledTomogram]) -> dict[str, list[LabelledTomogram]]:
    """The validation and the test tomograms; what would make a figure undefined is told before the work begins."""
    data = config.data
    if data.test_fold < 0:
        raise config_error(
            "data.test_fold: -1 keeps no fold to report; pool the runs of several folds with crossval.py instead"
        )
    chosen = {}
    for name, fold in (("validation", data.validation_fold), ("test", data.test_fold)):
        chosen[name] = tomograms_of_fold(labelled, fold, f"data.{name}_fold")
        check_has_motors(chosen[name], fold, f"data.{name}_fold")
    return chosen


def measure(config: Config, folder: Path) -> dict[str, float | int | str]:
    """Pick, judge, write everything into the run's folder; return the figures."""
    device = inference_device()
    model = load_run(config, folder, device)
    labelled, paths = read_tomograms(resolve_data(config), True)
    folds = folds_to_pick(config, labelled)
    best = folder / "checkpoints" / "best.pt"
    check_unseen(best, ("train",), folds["validation"])
    check_unseen(best, ("train", "validation"), folds["test"])
    records = read_metrics(folder / "metrics.csv", ("step", "loss", *LEARNING_CURVE))
    first = folds["validation"][0]
    tomogram = open_tomogram(paths[first.tomo_id], first, config.data.voxel_spacing_angstrom)
    tell_rounding(model, tomogram, config, device)
    models = [working_copy(model, config.inference.precision)]
    picked = {name: pick_fold(fold, paths, models, config, device, f"picking {name}") for name, fold in folds.items()}
    for name, fold in picked.items():
        write_picks_csv(folder / "results" / f"picks_{name}.csv", [one.picks for one in fold])
    everyone = blobs_of([*picked["validation"], *picked["test"]], config)
    split = len(picked["validation"])
    blobs = choose_blobs(everyone[:split], everyone[split:], config.evaluation)
    figures = evaluate(picked["validation"], picked["test"], blobs, config.evaluation)
    valid = {name: None if value != value else value for name, value in figures.items()}  # JSON knows no NaN
    write_text(folder / "results" / "metrics.json", json.dumps(valid, indent=2) + "\n")
    draw_everything(picked["test"], blobs, figures, records, config, folder)
    return figures


def draw_everything(
    test: list[Picked],
    blobs: Blobs,
    figures: dict[str, float | int | str],
    records: list[dict[str, float]],
    config: Config,
    folder: Path,
) -> None:
    """The pictures and the report of one evaluation."""
    pictures = folder / "figures"
    settings, threshold = config.evaluation, float(figures["threshold"])
    curves = {
        "MotorIdentifier": (curve_of([one.scored for one in test], settings), threshold),
        "blob picker": (curve_of(blobs.test, settings), blobs.threshold),
    }
    draw_precision_recall(curves, pictures / "precision_recall.png")
    shown = sorted(test, key=lambda one: -len(one.scored.truths))
    spread = [*shown[:3], *shown[len(shown) // 2 : len(shown) // 2 + 2], *shown[-1:]]
    views = [view_of(one, threshold) for one in spread[:SHOWN_TOMOGRAMS]]
    draw_picks(views, settings.tolerance_angstrom, pictures / "picks.png")
    draw_learning_curve(records, pictures / "learning_curve.png")
    write_report(folder / "report.html", f"motor_detection: {folder.name}", sections_of(figures, config, folder))


def sections_of(figures: dict[str, float | int | str], config: Config, folder: Path) -> list[Section]:
    pictures = folder / "figures"
    rows = [["figure", "value"]] + [
        [name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)]
        for name, value in figures.items()
    ]
    text = (
        f"The threshold was chosen on {figures['validation_n']} validation tomograms, not on the "
        f"{figures['n']} test tomograms. Intervals: {config.evaluation.confidence:.0%}, bootstrap over tomograms."
    )
    return [
        Section("Figures on the test tomograms", text, rows, None, ""),
        Section("Picks", "", [], pictures / "picks.png", ""),
        Section("Precision and recall", "", [], pictures / "precision_recall.png", ""),
        Section("Learning curve", "", [], pictures / "learning_curve.png", ""),
        Section("Config", "", [], None, as_yaml(config)),
        Section("Environment", "", [], None, read_text(folder / "environment.json")),
    ]


def summary(figures: dict[str, float | int | str], config: Config) -> str:
    """The few lines that matter."""
    name = f"f{config.evaluation.beta:g}"
    return "\n".join(
        [
            f"test {name.upper()} {figures[name]:.3f} ({interval_in_words(figures, name, config)}, n = {figures['n']} "
            f"tomograms, {figures['n_with_motor']} with motors; {config.evaluation.task.replace('_', ' ')}, "
            f"{config.evaluation.tolerance_angstrom:g} Å)",
            f"  precision {figures['precision']:.3f}, recall {figures['recall']:.3f} at threshold "
            f"{figures['threshold']:.3f} (chosen on {figures['validation_n']} validation tomograms)",
            f"  localisation error {figures['localisation_error_angstrom']:.0f} Å (median)",
            f"baseline {name.upper()} {figures[f'baseline_{name}']:.3f} "
            f"({interval_in_words(figures, f'baseline_{name}', config)}): {figures['baseline']}",
            f"chance {name.upper()} {figures[f'chance_{name}']:.3f}: random points; "
            f"{figures[f'middle_{name}']:.3f}: always the middle",
        ]
    )


def interval_in_words(figures: dict[str, float | int | str], name: str, config: Config) -> str:
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    if low != low:
        return "too few tomograms for an interval"
    return f"{config.evaluation.confidence:.0%} interval {low:.3f} to {high:.3f}"


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run's folder (its config.yaml is the base)")
    config, flags = parse_config(parser, PRESETS, arguments)
    folder = flags.run if flags.run is not None else run_folder(config)
    if not (folder / "checkpoints" / "best.pt").exists():
        raise config_error(
            f"--run: no trained weights in {folder.absolute()}; train with the same words first, or give --run FOLDER"
        )
    keep_freed_memory()
    if (folder / "results" / "metrics.json").exists():
        print("note: these test tomograms were judged before; the best of several looks is not an honest figure")
    with exclusive(folder / "results"):
        figures = measure(config, folder)
    print(summary(figures, config))
    best = folder / "checkpoints" / "best.pt"
    print(f"to use it: predict.py --checkpoint {best} --threshold {figures['threshold']:.3f} --input ...")
    for name in ("results/metrics.json", "results/picks_test.csv", "figures/picks.png", "report.html"):
        print(folder / name)
    return 0


if __name__ == "__main__":
    run_script(main)
