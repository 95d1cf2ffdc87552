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

from common.checkpoint import write_text
from common.command import parse_config, script_parser
from common.errors import config_error, run_script
from common.logbook import read_metrics
from common.memory import keep_freed_memory
from common.report import Section, write_report
from motor_detection.config import PRESETS, Config
from motor_detection.evaluation import Picked, curve_of, evaluate, pick_fold
from motor_detection.figures import draw_learning_curve, draw_picks, draw_precision_recall, view_of
from motor_detection.inference import check_identity, inference_device, load_model, working_copy
from motor_detection.pick_files import write_picks_csv
from motor_detection.places import read_tomograms, resolve_data, run_folder, tomograms_of_fold, training_identity

SHOWN_TOMOGRAMS = 6


def measure(config: Config, folder: Path) -> dict[str, float | int | str]:
    """Pick, judge, write everything into the run's folder; return the figures."""
    if config.data.test_fold < 0:
        raise config_error(
            "data.test_fold: -1 keeps no fold to report; pool the runs of several folds with crossval.py instead"
        )
    device = inference_device()
    check_identity(folder / "checkpoints" / "best.pt", training_identity(config))
    model, _ = load_model(folder / "checkpoints" / "best.pt", device)
    models = [working_copy(model, config.inference.precision)]
    labelled, paths = read_tomograms(resolve_data(config), True)
    picked: dict[str, list[Picked]] = {}
    for name, fold in (("validation", config.data.validation_fold), ("test", config.data.test_fold)):
        chosen = tomograms_of_fold(labelled, fold, f"data.{name}_fold")
        picked[name] = pick_fold(chosen, paths, models, config, device, f"picking {name}")
        write_picks_csv(folder / "results" / f"picks_{name}.csv", [one.picks for one in picked[name]])
    figures = evaluate(picked["validation"], picked["test"], config.evaluation)
    valid = {name: None if value != value else value for name, value in figures.items()}  # JSON knows no NaN
    write_text(folder / "results" / "metrics.json", json.dumps(valid, indent=2) + "\n")
    draw_everything(picked, figures, config, folder)
    return figures


def draw_everything(
    picked: dict[str, list[Picked]], figures: dict[str, float | int | str], config: Config, folder: Path
) -> None:
    """The pictures and the report of one evaluation."""
    pictures = folder / "figures"
    settings, threshold = config.evaluation, float(figures["threshold"])
    test = [one.scored for one in picked["test"]]
    curves = {"MotorIdentifier": curve_of(test, settings)}
    draw_precision_recall(curves, threshold, pictures / "precision_recall.png")
    shown = sorted(picked["test"], key=lambda one: -len(one.scored.truths))
    spread = [*shown[:3], *shown[len(shown) // 2 : len(shown) // 2 + 2], *shown[-1:]]
    draw_picks(
        [view_of(one, threshold) for one in spread[:SHOWN_TOMOGRAMS]],
        settings.tolerance_angstrom,
        pictures / "picks.png",
    )
    records = read_metrics(folder / "metrics.csv")
    draw_learning_curve(records, pictures / "learning_curve.png")
    write_report(folder / "report.html", f"motor_detection: {folder.name}", sections_of(figures, config, folder))


def sections_of(figures: dict[str, float | int | str], config: Config, folder: Path) -> list[Section]:
    pictures = folder / "figures"
    rows = [["figure", "value"]] + [[n, f"{v:.4g}" if isinstance(v, float) else str(v)] for n, v in figures.items()]
    text = (
        f"The threshold was chosen on {figures['validation_n']} validation tomograms, not on the "
        f"{figures['n']} test tomograms. Intervals: {config.evaluation.confidence:.0%}, bootstrap over tomograms."
    )
    return [
        Section("Figures on the test tomograms", text, rows, None, ""),
        Section("Picks", "", [], pictures / "picks.png", ""),
        Section("Precision and recall", "", [], pictures / "precision_recall.png", ""),
        Section("Learning curve", "", [], pictures / "learning_curve.png", ""),
        Section("Config", "", [], None, (folder / "config.yaml").read_text()),
        Section("Environment", "", [], None, (folder / "environment.json").read_text()),
    ]


def summary(figures: dict[str, float | int | str], config: Config) -> str:
    """The few lines that matter."""
    name = f"f{config.evaluation.beta:g}"
    return "\n".join(
        [
            f"test {name.upper()} {figures[name]:.3f} ({interval_in_words(figures, name, config)}, n = {figures['n']} "
            f"tomograms, {figures['n_with_motor']} with motors)",
            f"  precision {figures['precision']:.3f}, recall {figures['recall']:.3f} at threshold "
            f"{figures['threshold']:.3f} (chosen on {figures['validation_n']} validation tomograms)",
            f"  localisation error {figures['localisation_error_angstrom']:.0f} Å (median)",
            f"baseline {name.upper()} {figures[f'baseline_{name}']:.3f} "
            f"({interval_in_words(figures, f'baseline_{name}', config)}): {figures['baseline']}",
            f"chance {name.upper()} {figures[f'chance_{name}']:.3f}: random points",
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
    figures = measure(config, folder)
    print(summary(figures, config))
    best = folder / "checkpoints" / "best.pt"
    print(f"to use it: predict.py --checkpoint {best} --threshold {figures['threshold']:.3f} --input ...")
    for name in ("results/metrics.json", "results/picks_test.csv", "figures/picks.png", "report.html"):
        print(folder / name)
    return 0


if __name__ == "__main__":
    run_script(main)
