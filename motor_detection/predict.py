"""Find motors in tomograms, with a score each, in files that other tools open.

python motor_detection/predict.py --checkpoint runs/motor_detection/phantom-1a2b3c4d/checkpoints/best.pt --input tomo_1
python motor_detection/predict.py --checkpoint fold0.pt --checkpoint fold1.pt --input tomograms/ --threshold 0.4
python motor_detection/predict.py --checkpoint best.pt --input a.mrc b.rec data.voxel_spacing_angstrom=13.1
python motor_detection/predict.py --checkpoint best.pt --input train/ --labels labels.csv

--input takes slice folders, .npy, .mrc, .rec and .map files, or a folder of those. Writes into --output
(inference_results/): picks.csv (every pick with voxel and Å position and score), submission.csv (the best pick per
tomogram above --threshold, else -1), picks.star (RELION, with score), picks.tbl and picks.doc (Dynamo), copick/ (JSON).
A tomogram that cannot be read is named and skipped; the exit code is then 1. Finished tomograms are kept: the same
command continues.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse
import dataclasses
import hashlib
import json
import shutil

import torch

from common.command import ScriptParser, change_parser, split_changes
from common.config import as_yaml, configure
from common.errors import BAD_DATA, UserError, config_error, data_error, run_script
from common.files import parsing, read_text, write_text
from common.lock import exclusive
from common.logbook import progress
from common.memory import keep_freed_memory
from common.parallel import inference_device
from common.volumes.opening import FILE_SUFFIXES
from common.volumes.slices import SLICE_SUFFIXES
from motor_detection.config import KAGGLE, Config
from motor_detection.copick_files import write_copick_json
from motor_detection.dynamo_files import write_dynamo_table
from motor_detection.inference import (
    check_same_grid,
    load_model,
    pick_motors,
    tell_rounding,
    working_copy,
)
from motor_detection.labels import LabelledTomogram, read_labels
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.pick_files import (
    TomogramPicks,
    can_be_written,
    read_picks_csv,
    write_picks_csv,
    write_submission_csv,
)
from motor_detection.places import training_identity
from motor_detection.star_files import write_relion_star
from motor_detection.tomograms import Tomogram, open_tomogram, spacing_warnings, tomogram_name


def find_inputs(paths: list[Path]) -> list[Path]:
    """Every volume that is named, and every one inside a named folder that is not itself a slice folder."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise config_error(f"--input {path}: no such file or folder")
        inside = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
        if path.is_dir() and not any(p.suffix.lower() in SLICE_SUFFIXES for p in inside):
            volumes = [p for p in inside if p.suffix.lower() in FILE_SUFFIXES or holds_slices(p)]
            if not volumes:
                raise data_error(
                    f"--input {path}: no tomograms in it (expected slice folders, {', '.join(FILE_SUFFIXES)})"
                )
            found += volumes
        else:
            found.append(path)
    names = [tomogram_name(path) for path in found]
    unfit = [name for name in names if not can_be_written(name)]
    if unfit:
        raise config_error(
            f"--input: {', '.join(map(ascii, unfit[:5]))} cannot be a name in STAR and CSV files; rename without spaces"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise config_error(f"--input: {', '.join(twice[:5])} would be written twice; rename one or give other inputs")
    return found


def holds_slices(path: Path) -> bool:
    return path.is_dir() and any(p.suffix.lower() in SLICE_SUFFIXES for p in path.iterdir())


def load_ensemble(checkpoints: list[Path], flags: argparse.Namespace) -> tuple[list[MotorIdentifier], Config]:
    """All models, and the first one's config with the command line's changes."""
    device = inference_device()
    loaded = [load_model(path, device) for path in checkpoints]
    check_same_grid([config for _, config in loaded], checkpoints)
    trained = dataclasses.replace(loaded[0][1], data=dataclasses.replace(loaded[0][1].data, voxel_spacing_angstrom=0.0))
    config = configure(trained, flags.config, flags.changes)
    same = dataclasses.replace(config, data=trained.data)  # the spacing of the input may be given
    if training_identity(same) != training_identity(trained):
        raise config_error(
            "section.name=value: after training only inference and data.voxel_spacing_angstrom can change"
        )
    return [model for model, _ in loaded], config


def predict(
    paths: list[Path],
    labels: dict[str, LabelledTomogram],
    models: list[MotorIdentifier],
    config: Config,
    output: Path,
) -> tuple[list[TomogramPicks], list[str]]:
    """Picks of every tomogram finished in this folder; and the problems of those that could not be read."""
    device = inference_device()
    working = [working_copy(model, config.inference.precision) for model in models]
    problems = []
    told = False
    for path in progress(paths, "picking", len(paths), True):
        name = tomogram_name(path)
        label = labels[name] if name in labels else None
        finished = output / "tomograms" / f"{name}.csv"
        spacing = label.spacing_angstrom if label is not None else config.data.voxel_spacing_angstrom
        origin = stamp(path, spacing)
        if is_finished(finished, origin):
            continue
        try:
            tomogram = open_tomogram(path, label, config.data.voxel_spacing_angstrom)
            for warning in spacing_warnings(tomogram):
                print(f"warning: {warning}")
            if not told:
                tell_rounding(models[0], tomogram, config, device)
                told = True
            write_picks_csv(finished, [picks_of(tomogram, working, config, device)])
            write_text(finished.with_suffix(".source"), sealed(origin, finished))
        except UserError as error:
            problems += error.problems
            print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
    every = sorted((output / "tomograms").glob("*.csv"))
    if len(every) > len(paths) - len(problems):
        print(f"{output} holds {len(every)} finished tomograms, of this and earlier calls; --fresh forgets them")
    return [picks for path in every for picks in read_picks_csv(path)], problems


def stamp(path: Path, spacing_angstrom: float) -> str:
    """Where a tomogram lies, the newest time and the sum of the sizes of its files, and the spacing it was given."""
    files = list(path.iterdir()) if path.is_dir() else [path]
    times, sizes = [file.stat().st_mtime_ns for file in files], [file.stat().st_size for file in files]
    content = f"{len(files)} files, {max(times, default=0)} ns, {sum(sizes)} bytes"
    return f"{ascii(str(path.resolve()))} {content}, {spacing_angstrom:g} Å\n"


def is_finished(finished: Path, origin: str) -> bool:
    """Whether the picks in a table came from this very tomogram; those of another one, or spoiled ones, are deleted."""
    source = finished.with_suffix(".source")
    if finished.exists() and source.exists() and source.read_bytes() == sealed(origin, finished).encode():
        return True
    for old in (source, finished):
        old.unlink(missing_ok=True)
    return False


def sealed(origin: str, finished: Path) -> str:
    """A stamp together with the digest of the picks that came from it, so that neither is taken without the other."""
    return f"{origin}{hashlib.sha256(finished.read_bytes()).hexdigest()}\n"


def picks_of(tomogram: Tomogram, models: list[MotorIdentifier], config: Config, device: torch.device) -> TomogramPicks:
    peaks = pick_motors(models, tomogram, config, device)
    shape, spacing = tomogram.volume.shape, tomogram.spacing_angstrom
    return TomogramPicks(tomogram.tomo_id, shape, spacing, peaks.points, peaks.scores)


def write_all(
    picks: list[TomogramPicks], output: Path, threshold: float, tilt_series_pixel: float | None
) -> list[Path]:
    """Every format; submission.csv alone uses the threshold, the others hold every pick with its score.

    tilt_series_pixel: angstrom, of RELION 4's coordinates; None writes RELION 5's, which need none.
    """
    names = ("picks.csv", "submission.csv", "picks.star", "picks.tbl", "picks.doc", "copick")
    write_picks_csv(output / "picks.csv", picks)
    write_submission_csv(output / "submission.csv", picks, threshold)
    if tilt_series_pixel is None:
        write_relion_star(output / "picks.star", picks, "relion5", {})
    else:
        write_relion_star(output / "picks.star", picks, "relion4", {one.tomo_id: tilt_series_pixel for one in picks})
    write_dynamo_table(output / "picks.tbl", picks)
    write_copick_json(output / "copick", picks, "flagellar-motor", "plainscope", "1")
    return [output / name for name in names]


def usual_threshold(checkpoints: list[Path]) -> float:
    """What eval.py chose on validation for the run of a single checkpoint, if it has judged these weights; else 0.5."""
    judged = checkpoints[0].parent.parent / "results" / "metrics.json"
    if len(checkpoints) > 1 or not judged.exists() or judged.stat().st_mtime < checkpoints[0].stat().st_mtime:
        print("threshold of submission.csv: 0.5 (eval.py chooses a better one; --threshold gives it)")
        return 0.5
    with parsing(judged, "run eval.py again, or give --threshold"):
        figures = json.loads(read_text(judged))
        threshold = float(figures["threshold"])
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold}")
        fits = figures["task"] == "one_per_tomogram"
    if not fits:
        print("threshold of submission.csv: 0.5 (eval.py chose one for every motor, not for one answer per tomogram)")
        return 0.5
    print(f"threshold of submission.csv: {threshold:.3f}, from {judged}")
    return threshold


def claim_output(output: Path, config: Config, checkpoints: list[Path], fresh: bool) -> None:
    """Finished tomograms are only kept where they came from the same weights and constants; fresh forgets them.

    The voxel spacing may differ from call to call: it is part of every tomogram's own stamp.
    """
    weights = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in checkpoints]
    same = dataclasses.replace(config, data=dataclasses.replace(config.data, voxel_spacing_angstrom=0.0))
    text = f"# weights {' '.join(weights)}\n{as_yaml(same)}"
    recorded = output / "config.yaml"
    if recorded.exists() and not read_text(recorded).startswith("# weights"):
        raise config_error(f"--output {output}: holds a config.yaml of something else (a run?); give another folder")
    tables, stamps = (output / "tomograms").glob("*.csv"), (output / "tomograms").glob("*.source")
    if fresh:
        for old in [*tables, *stamps]:
            old.unlink()
        shutil.rmtree(output / "copick", ignore_errors=True)
    elif recorded.exists() and read_text(recorded) != text and any(tables):
        raise config_error(
            f"--output {output}: holds picks of other weights or constants; give another folder, or --fresh"
        )
    write_text(recorded, text)


def flag_parser() -> ScriptParser:
    """The command line of this script."""
    parser = change_parser(__doc__ or "", "the full-size preset; a checkpoint brings its own", KAGGLE)
    parser.add_argument("--checkpoint", type=Path, action="append", required=True, metavar="FILE.pt",
                        help="best.pt of a run; repeat for an ensemble")  # fmt: skip
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="tomograms, or folders of them")
    parser.add_argument("--labels", type=Path, metavar="FILE.csv",
                        help="a label table: the voxel spacing of the tomograms that it names")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("inference_results"), metavar="FOLDER")
    parser.add_argument("--threshold", type=float,
                        help="of submission.csv (default: what eval.py chose for the checkpoint's run, or 0.5)")  # fmt: skip
    parser.add_argument("--star", choices=("relion4", "relion5"), default="relion5",
                        help="STAR coordinates: unbinned pixels of the tilt series, or centred Å")  # fmt: skip
    parser.add_argument(
        "--tilt-series-pixel", type=float, metavar="Å", help="of the unbinned images; for --star relion4"
    )
    parser.add_argument("--fresh", action="store_true", help="pick finished tomograms again")
    return parser


def check_flags(flags: argparse.Namespace) -> None:
    """What argparse cannot know."""
    if flags.threshold is not None and not 0 < flags.threshold <= 1:
        raise config_error(f"--threshold {flags.threshold}: expected a score in (0, 1]")
    if (flags.star == "relion4") != (flags.tilt_series_pixel is not None):
        raise config_error("--star relion4 and --tilt-series-pixel: expected both or none (Å per unbinned pixel)")
    if flags.tilt_series_pixel is not None and not 0.1 <= flags.tilt_series_pixel <= 1000:
        raise config_error(f"--tilt-series-pixel {flags.tilt_series_pixel}: expected 0.1 to 1000 Å")


def main(arguments: list[str]) -> int:
    flags = flag_parser().parse_intermixed_args(arguments)
    check_flags(flags)
    keep_freed_memory()
    changes, inputs = split_changes(flags.input)  # --input takes them too
    flags.changes += changes
    paths = find_inputs([Path(word) for word in inputs])
    labels = {label.tomo_id: label for label in read_labels(flags.labels)[0]} if flags.labels is not None else {}
    models, config = load_ensemble(flags.checkpoint, flags)
    if flags.print_config:
        print(as_yaml(config), end="")
        return 0
    threshold = flags.threshold if flags.threshold is not None else usual_threshold(flags.checkpoint)
    with exclusive(flags.output):
        claim_output(flags.output, config, flags.checkpoint, flags.fresh)
        picks, problems = predict(paths, labels, models, config, flags.output)
        if picks:
            written = write_all(picks, flags.output, threshold, flags.tilt_series_pixel)
            above = sum(int((one.scores >= threshold).sum()) for one in picks)
            print(f"{above} picks with a score of at least {threshold:.3f} in {len(picks)} tomograms")
            print("\n".join(map(str, written)))
    return BAD_DATA if problems else 0


if __name__ == "__main__":
    run_script(main)
