"""Pool the folds of a cross-validation: every tomogram is scored by a run that never saw it.

python motor_detection/crossval.py RUN_OF_FOLD_0 RUN_OF_FOLD_1 RUN_OF_FOLD_2 RUN_OF_FOLD_3
python motor_detection/crossval.py RUN RUN RUN RUN inference.flips=true evaluation.task=every_motor

Give the folders of runs that differ in data.validation_fold alone (and train.seed), trained with data.test_fold=-1.
Each run picks motors in its own validation fold; each fold is judged at the threshold chosen on the other folds' picks,
so no threshold is chosen on what it is reported on. Prints the pooled F-beta with its bootstrap interval and writes
crossval.json and picks_out_of_fold.csv into --output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import json

import torch

from common.command import change_parser, split_changes
from common.config import as_yaml, configure
from common.errors import config_error, run_script
from common.files import write_text
from common.memory import keep_freed_memory
from common.metrics.intervals import f_beta_interval
from motor_detection.config import KAGGLE, Config
from motor_detection.evaluation import Picked, cross_fitted, pick_fold
from motor_detection.inference import inference_device, load_model, working_copy
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.pick_files import write_picks_csv
from motor_detection.places import (
    check_has_motors,
    read_tomograms,
    resolve_data,
    tomograms_of_fold,
    training_identity,
)

Member = tuple[MotorIdentifier, Config]


def load_members(runs: list[Path], files: list[Path], changes: list[str], device: torch.device) -> list[Member]:
    """Every run's weights and config, with the caller's changes of inference and evaluation."""
    members = []
    for run in runs:
        model, trained = load_model(run / "checkpoints" / "best.pt", device)
        config = configure(trained, files, changes)
        if training_identity(config) != training_identity(trained):
            raise config_error("section.name=value: only inference and evaluation can be changed after training")
        members.append((model, config))
    return members


def check_members(configs: list[Config], runs: list[Path]) -> None:
    """The runs must share everything but validation fold and seed, and no two may share the fold."""
    run_of: dict[int, Path] = {}
    for config, run in zip(configs, runs, strict=True):
        fold = config.data.validation_fold
        if fold in run_of:
            raise config_error(f"{run}: validates on fold {fold}, as {run_of[fold]} does; give one run per fold")
        run_of[fold] = run
        mine, first = lines_but_fold(config), lines_but_fold(configs[0])
        if mine != first:
            differs = next(line.strip() for line, other in zip(mine, first, strict=True) if line != other)
            raise config_error(f"{run}: differs from {runs[0]} in more than the validation fold (here {differs})")
        if config.data.test_fold >= 0:
            print(f"warning: {run} left fold {config.data.test_fold} out of training (data.test_fold); -1 would use it")
    if len(run_of) < 2:
        raise config_error("RUN: expected at least two runs of different data.validation_fold")


def lines_but_fold(config: Config) -> list[str]:
    """What two runs of one cross-validation must have in common."""
    same = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation_fold=0, test_fold=-1),
        train=dataclasses.replace(config.train, seed=0),
    )
    return training_identity(same).splitlines()


def pick_own_fold(model: MotorIdentifier, config: Config, device: torch.device) -> list[Picked]:
    """A run's picks in its own validation fold."""
    number = config.data.validation_fold
    labelled, paths = read_tomograms(resolve_data(config), True)
    fold = tomograms_of_fold(labelled, number, "data.validation_fold")
    check_has_motors(fold, number, "data.validation_fold")
    models = [working_copy(model, config.inference.precision)]
    return pick_fold(fold, paths, models, config, device, f"picking fold {number}")


def main(arguments: list[str]) -> int:
    parser = change_parser(__doc__ or "", "the full-size preset; each run brings its own", KAGGLE)
    parser.add_argument("run", nargs="+", metavar="RUN", help="a run's folder; one per fold")
    parser.add_argument("--output", type=Path, default=Path("runs/motor_detection/crossval"), metavar="FOLDER")
    flags = parser.parse_intermixed_args(arguments)
    changes, folders = split_changes([*flags.changes, *flags.run])
    runs = [Path(folder) for folder in folders]
    keep_freed_memory()
    device = inference_device()
    members = load_members(runs, flags.config, changes, device)
    if flags.print_config:
        print(as_yaml(members[0][1]), end="")
        return 0
    check_members([config for _, config in members], runs)
    settings = members[0][1].evaluation
    picked = [pick_own_fold(model, config, device) for model, config in members]
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
