"""Pool the folds of a cross-validation: every tomogram is scored by weights that it had no part in.

python motor_detection/crossval.py RUN_OF_FOLD_0 RUN_OF_FOLD_1 RUN_OF_FOLD_2 RUN_OF_FOLD_3
python motor_detection/crossval.py RUN RUN RUN RUN inference.flips=true evaluation.task=every_motor

Give the folders of runs that differ in data.validation_fold alone (and train.seed), trained with data.test_fold=-1.
Each run picks motors in its own validation fold, with its last averaged weights: the best ones were chosen on that
fold. Each fold is judged at the threshold chosen on the other folds' picks, so no threshold is chosen on what it is
reported on. Prints the pooled F-beta with its bootstrap interval, a blob picker chosen in the same way and chance
beside it, and writes crossval.json and picks_out_of_fold.csv into --output.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import dataclasses
import json

import torch

from common.command import change_parser, split_changes
from common.config import as_yaml, configure
from common.errors import config_error, run_script
from common.files import write_text
from common.lock import exclusive
from common.memory import keep_freed_memory
from common.parallel import inference_device
from motor_detection.config import KAGGLE, Config
from motor_detection.evaluation import (
    Picked,
    blobs_of,
    chance,
    cross_fitted,
    cross_fitted_blobs,
    interval_of,
    middle,
    pick_fold,
)
from motor_detection.inference import check_unseen, load_model, working_copy
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
        model, trained = load_model(run / "checkpoints" / "last.pt", device)
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


def pick_own_fold(model: MotorIdentifier, config: Config, run: Path, device: torch.device) -> list[Picked]:
    """A run's picks in its own validation fold."""
    number = config.data.validation_fold
    labelled, paths = read_tomograms(resolve_data(config), True)
    fold = tomograms_of_fold(labelled, number, "data.validation_fold")
    check_has_motors(fold, number, "data.validation_fold")
    check_unseen(run / "checkpoints" / "last.pt", ("train",), fold)
    models = [working_copy(model, config.inference.precision)]
    return pick_fold(fold, paths, models, config, device, f"picking fold {number}")


def judge_pooled(picked: list[list[Picked]], config: Config) -> dict[str, float | int | None]:
    """The flat figures of crossval.json; null where too few tomograms give an interval."""
    settings = config.evaluation
    name = f"f{settings.beta:g}"
    counts, threshold = cross_fitted([[one.scored for one in fold] for fold in picked], settings)
    blobs = cross_fitted_blobs([blobs_of(fold, config) for fold in picked], settings)
    ours, theirs = interval_of(counts, settings), interval_of(blobs, settings)
    everyone = [one for fold in picked for one in fold]
    figures: dict[str, float | int] = {
        name: ours.estimate, f"{name}_low": ours.low, f"{name}_high": ours.high, "n": len(counts),
        "folds": len(picked), "mean_threshold": threshold, f"baseline_{name}": theirs.estimate,
        f"baseline_{name}_low": theirs.low, f"baseline_{name}_high": theirs.high,
        f"chance_{name}": chance(everyone, settings), f"middle_{name}": middle(everyone, settings),
    }  # fmt: skip
    return {key: None if value != value else value for key, value in figures.items()}


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
    with exclusive(flags.output):
        pool(members, runs, flags.output, device)
    return 0


def pool(members: list[Member], runs: list[Path], output: Path, device: torch.device) -> None:
    """Pick every fold, judge them together, write and print."""
    picked = [pick_own_fold(model, config, run, device) for (model, config), run in zip(members, runs, strict=True)]
    figures = judge_pooled(picked, members[0][1])
    write_text(output / "crossval.json", json.dumps(figures, indent=2) + "\n")
    write_picks_csv(output / "picks_out_of_fold.csv", [one.picks for fold in picked for one in fold])
    print(summary(figures, members[0][1]))
    print(output / "crossval.json", output / "picks_out_of_fold.csv", sep="\n")


def summary(figures: dict[str, float | int | None], config: Config) -> str:
    """The few lines that matter."""
    name = f"f{config.evaluation.beta:g}"

    def interval(key: str) -> str:
        if figures[f"{key}_low"] is None:
            return "too few tomograms for an interval"
        return (
            f"{config.evaluation.confidence:.0%} interval {figures[f'{key}_low']:.3f} to {figures[f'{key}_high']:.3f}"
        )

    return "\n".join(
        [
            f"out-of-fold {name.upper()} {figures[name]:.3f} ({interval(name)}, n = {figures['n']} tomograms in "
            f"{figures['folds']} folds, mean threshold {figures['mean_threshold']:.3f})",
            f"baseline {name.upper()} {figures[f'baseline_{name}']:.3f} ({interval(f'baseline_{name}')}): "
            "Laplacian of Gaussian, chosen on the other folds",
            f"chance {name.upper()} {figures[f'chance_{name}']:.3f}: random points; "
            f"{figures[f'middle_{name}']:.3f}: always the middle",
        ]
    )


if __name__ == "__main__":
    run_script(main)
