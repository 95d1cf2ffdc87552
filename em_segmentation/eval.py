"""Measure a trained run: thresholds from the validation volumes, figures from the test volumes, a baseline beside.

python em_segmentation/eval.py
python em_segmentation/eval.py --run runs/em_segmentation/phantom-1a2b3c4d inference.tta=flips
python em_segmentation/eval.py --config em_segmentation/tutorials/fib25.yaml --checkpoint other/checkpoints/best.pt

Finds the run of the same preset, YAML and words that train.py was given (or --run FOLDER, --checkpoint FILE.pt), predicts
every validation and test volume, decodes instances where decoding.target says so, and reports the test volumes once. Writes
results/metrics.json, the predictions and instances beside it, figures/ and report.html into the run's folder.
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
from common.memory import keep_freed_memory
from common.parallel import process_group
from em_segmentation.config import PRESETS, Config
from em_segmentation.inference import load_model, rounding_cost, working_copy
from em_segmentation.judging import judge, predict_role
from em_segmentation.pages import summary, write_pages
from em_segmentation.places import resolve, run_folder, training_identity
from em_segmentation.volumes import open_role


def check_same_run(trained: Config, config: Config, path: Path) -> None:
    """The best weights of a run must be those of these constants."""
    if training_identity(trained) != training_identity(config):
        raise config_error(
            f"{path}: was trained with other constants than these; give --run FOLDER and nothing that shapes it"
        )


def test(config: Config, folder: Path, checkpoint: Path | None) -> int:
    """Predict, judge, write everything into a run's folder, print the few figures that matter."""
    best = checkpoint if checkpoint is not None else folder / "checkpoints" / "best.pt"
    if not best.exists():
        raise config_error(
            f"--run: no trained weights at {best.absolute()}; train with the same words first, or give --run FOLDER"
        )
    keep_freed_memory()
    with process_group(config.system.deterministic) as device, exclusive(folder / "results"):
        model, trained = load_model(best, device)
        if checkpoint is None:
            check_same_run(trained, config, best)
        resolved = resolve(config)
        roles = {"val": open_role(resolved.data, "val"), "test": open_role(resolved.data, "test")}
        if not roles["test"] or any(volume.label is None for volume in (*roles["val"], *roles["test"])):
            raise config_error("data.test_image, data.test_label: expected labelled volumes to judge the weights on")
        known = dataclasses.replace(trained, inference=config.inference, decoding=config.decoding)
        if config.inference.precision != "32":
            volume = roles["test"][0]
            cost = rounding_cost(model, volume.image, volume.scale, known)
            print(
                f"{config.inference.precision} changes probabilities by at most {cost:.4f} (middle of {volume.image.path.name})"
            )
        network = working_copy(model, config.inference.precision)
        if (folder / "results" / "metrics.json").exists():
            print("note: these test volumes were judged before; the best of several looks is not an honest figure")
        predictions = {
            role: predict_role(network, volumes, known, best, folder / "results", role)
            for role, volumes in roles.items()
        }
        verdict = judge(roles, predictions, known, config.evaluation, folder / "results")
        write_text(folder / "results" / "metrics.json", json.dumps(verdict.figures, indent=2) + "\n")
        write_pages(verdict, roles["test"], predictions["test"], known, config.evaluation, folder)
    print(summary(verdict, known))
    for name in ("results/metrics.json", "figures/overlay.png", "report.html"):
        print(folder / name)
    return 0


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run's folder (its config.yaml is the base)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE.pt", help="other weights than the run's best")
    config, flags = parse_config(parser, PRESETS, arguments)
    return test(config, flags.run if flags.run is not None else run_folder(config), flags.checkpoint)


if __name__ == "__main__":
    run_script(main)
