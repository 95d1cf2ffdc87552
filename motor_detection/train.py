"""Train MotorIdentifier on patches of tomograms, or continue a run that was stopped.

python motor_detection/train.py
python motor_detection/train.py --preset kaggle data.validation_fold=0 train.batch_size=8
python motor_detection/train.py --config lab.yaml train.steps=5000 run.name=lab-1
torchrun --nproc-per-node 4 motor_detection/train.py --preset kaggle

The default preset simulates its own tomograms and needs minutes on a laptop. Real tomograms are cut into patches by
convert.py first. The same command continues a killed run and ends in the same weights; --fresh starts it over.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command import parse_config, script_parser
from common.errors import data_error, run_script
from common.memory import keep_freed_memory
from motor_detection.config import PRESETS, Config
from motor_detection.convert import convert
from motor_detection.figures import draw_learning_curve
from motor_detection.places import read_tomograms, resolve_data, run_folder
from motor_detection.trainer import choose_patches, train


def prepare(config: Config) -> None:
    """The phantom's tomograms and patches, on first use; of several processes the first does it, before training."""
    if config.data.source == "phantom" and ("RANK" not in os.environ or os.environ["RANK"] == "0"):
        summary = convert(config, False)
        if summary.failed:
            raise data_error(*summary.failed)


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--fresh", action="store_true", help="start the run over: its folder is deleted first")
    config, flags = parse_config(parser, PRESETS, arguments)
    first = "RANK" not in os.environ or os.environ["RANK"] == "0"
    folder = run_folder(config, flags.preset, flags.fresh and first)
    keep_freed_memory()
    prepare(config)
    data = resolve_data(config)
    labelled, _ = read_tomograms(data)
    records = train(config, folder, choose_patches(config, data.patches, labelled), [sys.executable, *sys.argv])
    if first:
        validated = [record for record in records if "average_precision" in record]
        best = max(validated, key=lambda record: (record["average_precision"], record["step"]))
        curve = folder / "figures" / "learning_curve.png"
        draw_learning_curve(records, curve)
        print(f"best average precision on validation patches: {best['average_precision']:.3f} at step {best['step']:g}")
        print(f"run: {folder}", f"weights: {folder / 'checkpoints' / 'best.pt'}", f"curve: {curve}", sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
