"""Measure a trained run: thresholds from the validation volumes, figures from the test volumes, a baseline beside.

python em_segmentation/eval.py
python em_segmentation/eval.py --run runs/em_segmentation/phantom-1a2b3c4d inference.tta=flips
python em_segmentation/eval.py --config em_segmentation/tutorials/fib25.yaml --checkpoint other/checkpoints/best.pt

Finds the run of the same preset, YAML and words that train.py was given (or --run FOLDER, --checkpoint FILE.pt), predicts
every validation and test volume, decodes instances where decoding.target says so, and reports the test volumes once. Writes
results/metrics.json, predictions, classes and instances beside it, figures/ and report.html into the run's folder. Volumes are
judged whole: up to a few hundred million voxels; predict.py knows no such limit.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import dataclasses
import json

from common.command import parse_config, script_parser
from common.errors import config_error, run_script
from common.files import write_text
from common.lock import exclusive
from common.logbook import first_difference
from common.memory import keep_freed_memory
from common.parallel import process_group
from common.volumes.opening import split_location
from em_segmentation.config import PRESETS, Config, Data
from em_segmentation.inference import inference_precision, load_model, rounding_cost, working_copy
from em_segmentation.judging import check_judged, judge, predict_role
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.pages import summary, write_pages
from em_segmentation.places import resolve, run_folder, training_identity
from em_segmentation.train import use_processor
from em_segmentation.volumes import Annotated, Role, check_apart, matching, open_role


def check_same_run(trained: Config, config: Config, path: Path) -> None:
    """The best weights of a run must be those of these constants."""
    there, here = training_identity(trained), training_identity(config)
    if there != here:
        raise config_error(
            f"{path}: was trained with other constants than these ({first_difference(here, there)}); "
            "give --run FOLDER and nothing that shapes it"
        )


def check_together(known: Config, roles: dict[Role, list[Annotated]]) -> None:
    """The weights' targets, the decoding and the volumes must fit each other."""
    if problems := list(known.problems()):  # the checkpoint may be another config's
        raise config_error(*problems)
    if not roles["test"]:
        raise config_error("data.test_image, data.test_label: expected labelled volumes to judge the weights on")
    if "semantic" not in known.targets.names and known.decoding.target == "none":
        raise config_error(
            "decoding.target: none, and no semantic target: nothing to judge; expected decoding.target=affinity or boundary"
        )
    for volume in (*roles["val"], *roles["test"]):
        check_judged(volume, known)


def trained_on(trained: Config, resolved: Config) -> list[Annotated]:
    """The images that the weights were trained on, as far as they are still there; a note tells of the others."""
    data = trained.data if trained.data.source == "files" else resolved.data
    there = tuple(name for name in data.train_image if matching(split_location(name)[0]))
    if len(there) < len(data.train_image):
        lost = next(name for name in data.train_image if name not in there)
        print(f"note: {lost} was trained on and is not here, so it may be among what is judged", flush=True)
    return open_role(dataclasses.replace(data, train_image=there, train_label=(), train_mask=()), "train")


def with_judged(trained: Data, judged: Data) -> Data:
    """The data section that the weights were trained with, with the volumes that are judged now."""
    kinds = [f"{role}_{kind}" for role in ("val", "test") for kind in ("image", "label", "mask", "sections")]
    names = ("source", "root", "image_axes", "label_axes", *kinds)
    return dataclasses.replace(trained, **{name: getattr(judged, name) for name in names})


def test(config: Config, folder: Path, checkpoint: Path | None) -> int:
    """Predict, judge, write everything into a run's folder, print the few figures that matter."""
    best = checkpoint if checkpoint is not None else folder / "checkpoints" / "best.pt"
    if not best.exists():
        raise config_error(
            f"--run: no trained weights at {best.absolute()}; train with the same words first, or give --run FOLDER"
        )
    keep_freed_memory()
    use_processor(config)
    results = folder / "results"
    with process_group(config.system.deterministic) as device, exclusive(results):
        model, trained = load_model(best, device)
        if checkpoint is None:
            check_same_run(trained, config, best)
        resolved = resolve(config)
        roles: dict[Role, list[Annotated]] = {role: open_role(resolved.data, role) for role in ("val", "test")}
        check_apart({"train": trained_on(trained, resolved), **roles})
        known = dataclasses.replace(
            trained,
            inference=config.inference,
            decoding=config.decoding,
            evaluation=config.evaluation,
            data=with_judged(trained.data, resolved.data),
        )
        check_together(known, roles)
        tell(model, roles["test"][0], known)
        if (results / "metrics.json").exists():
            print("note: these test volumes were judged before; the best of several looks is not an honest figure")
        network = working_copy(model, config.inference.precision)
        predictions = {
            role: predict_role(network, volumes, known, best, results, role) for role, volumes in roles.items()
        }
        verdict = judge(roles, predictions, known, results)
        write_text(results / "metrics.json", json.dumps(verdict.figures, indent=2, allow_nan=False) + "\n")
        write_pages(verdict, roles["test"], known, folder)
    print(summary(verdict, known))
    print(results / "metrics.json", *sorted((folder / "figures").glob("*.png")), folder / "report.html", sep="\n")
    return 0


def tell(model: SegmentationModel, volume: Annotated, config: Config) -> None:
    """What the working precision costs."""
    device = next(model.parameters()).device
    if inference_precision(config.inference.precision, device) != "float32":
        cost = rounding_cost(model, volume.image, volume.scale, config)
        words = f"changes probabilities by at most {cost:.4f} (middle of {volume.image.path.name})"
        print(f"{config.inference.precision} {words}", flush=True)


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run's folder (its config.yaml is the base)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE.pt", help="other weights than the run's best")
    config, flags = parse_config(parser, PRESETS, arguments)
    return test(config, flags.run if flags.run is not None else run_folder(config), flags.checkpoint)


if __name__ == "__main__":
    run_script(main)
