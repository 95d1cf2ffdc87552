"""Pool the folds of a cross-validation: every tomogram is scored by a run that never saw it.

python motor_detection/crossval.py RUN_OF_FOLD_0 RUN_OF_FOLD_1 RUN_OF_FOLD_2 RUN_OF_FOLD_3

Give the folders of runs that differ in data.validation_fold, trained with data.test_fold=-1. Each run picks motors in
its own validation fold; each fold is judged at the threshold chosen on the other folds' picks, so no threshold is
chosen on what it is reported on. Prints the pooled F-beta with its bootstrap interval and writes crossval.json and
picks_out_of_fold.csv into --output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json

from common.checkpoint import write_text
from common.command import ScriptParser
from common.errors import config_error, run_script
from common.memory import keep_freed_memory
from common.metrics.intervals import f_beta_interval
from motor_detection.config import Config
from motor_detection.evaluation import Picked, cross_fitted, pick_fold
from motor_detection.inference import inference_device, load_model, working_copy
from motor_detection.pick_files import write_picks_csv
from motor_detection.places import read_tomograms, resolve_data, tomograms_of_fold


def pick_own_fold(run: Path) -> tuple[list[Picked], Config]:
    """A run's picks in its own validation fold."""
    device = inference_device()
    model, config = load_model(run / "checkpoints" / "best.pt", device)
    labelled, paths = read_tomograms(resolve_data(config), True)
    fold = tomograms_of_fold(labelled, config.data.validation_fold, "data.validation_fold")
    models = [working_copy(model, config.inference.precision)]
    return pick_fold(fold, paths, models, config, device, f"picking fold {config.data.validation_fold}"), config


def check_folds(configs: list[Config], runs: list[Path]) -> None:
    """The runs must share everything but the validation fold, and no two may share that."""
    folds = [config.data.validation_fold for config in configs]
    if len(set(folds)) < len(folds) or len(folds) < 2:
        raise config_error(f"RUN: expected at least two runs of different data.validation_fold, got folds {folds}")
    for config, run in zip(configs, runs, strict=True):
        if (config.data.labels, config.evaluation) != (configs[0].data.labels, configs[0].evaluation):
            raise config_error(
                f"{run}: differs from {runs[0]} in data.labels or evaluation; pooled figures need them equal"
            )
        if config.data.test_fold >= 0:
            print(f"warning: {run} left fold {config.data.test_fold} out of training (data.test_fold); -1 would use it")


def main(arguments: list[str]) -> int:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="a run's folder")
    parser.add_argument("--output", type=Path, default=Path("runs/motor_detection/crossval"), metavar="FOLDER")
    flags = parser.parse_args(arguments)
    keep_freed_memory()
    configs = [load_model(run / "checkpoints" / "best.pt", inference_device())[1] for run in flags.run]
    check_folds(configs, flags.run)
    settings = configs[0].evaluation
    picked = [pick_own_fold(run)[0] for run in flags.run]
    counts, threshold = cross_fitted([[one.scored for one in fold] for fold in picked], settings)
    pooled = f_beta_interval(counts, settings.beta, settings.bootstrap_resamples, settings.confidence, settings.seed)
    name = f"f{settings.beta:g}"
    figures = {name: pooled.estimate, f"{name}_low": pooled.low, f"{name}_high": pooled.high,
               "n": len(counts), "folds": len(picked), "mean_threshold": threshold}  # fmt: skip
    write_text(flags.output / "crossval.json", json.dumps(figures, indent=2) + "\n")
    write_picks_csv(flags.output / "picks_out_of_fold.csv", [one.picks for fold in picked for one in fold])
    print(f"out-of-fold {name.upper()} {pooled.estimate:.3f} ({settings.confidence:.0%} interval {pooled.low:.3f} to "
          f"{pooled.high:.3f}, n = {len(counts)} tomograms in {len(picked)} folds, threshold {threshold:.3f})")  # fmt: skip
    print(flags.output / "crossval.json", flags.output / "picks_out_of_fold.csv", sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
