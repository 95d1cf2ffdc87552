"""Train MotorIdentifier on patches of tomograms, or continue a run that was stopped.

python motor_detection/train.py
python motor_detection/train.py --preset kaggle data.validation_fold=0 train.batch_size=8
python motor_detection/train.py --config lab.yaml train.steps=5000 run.name=lab-1
torchrun --nproc-per-node 4 motor_detection/train.py --preset kaggle

The default preset simulates its own tomograms and needs minutes on a laptop. Real tomograms are cut into patches by
convert.py first. The same command continues a killed run and ends in the same weights; --fresh starts it over.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import torch.distributed as dist

from common.checkpoint import load_checkpoint
from common.command import parse_config, script_parser
from common.errors import data_error, run_script
from common.lock import exclusive
from common.logbook import clear_run, open_run
from common.memory import keep_freed_memory
from common.parallel import all_ranks_do, first_rank_does, process_group
from motor_detection.config import PRESETS, Config
from motor_detection.convert import convert
from motor_detection.dataset import Patches, choose_patches
from motor_detection.figures import draw_learning_curve
from motor_detection.places import read_tomograms, resolve_data, run_folder, training_identity
from motor_detection.trainer import KIND, check_hardware, train


def prepare(config: Config) -> None:
    """Of the phantom the tomograms and patches, on first use; of other runs the weights to start from are looked at."""
    if config.data.source == "phantom":
        summary = convert(config, False, config.data.test_fold)
        if summary.failed:
            raise data_error(*summary.failed)
    if config.train.start_from is not None:
        load_checkpoint(config.train.start_from, KIND, {"weights": dict})


def find_patches(config: Config, told: bool) -> Patches:
    """The patches of a run; told: print what the tables contradict and what was left out."""
    data = resolve_data(config)
    labelled, _ = read_tomograms(data, told)
    patches, warnings = choose_patches(config, data.patches, labelled)
    for line in [*(f"warning: {warning}" for warning in warnings), f"patches: {data.patches}"] if told else []:
        print(line)
    return patches


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--fresh", action="store_true", help="start the run over: its folder is deleted first")
    config, flags = parse_config(parser, PRESETS, arguments)
    folder = run_folder(config)
    keep_freed_memory()
    with process_group(config.train.deterministic) as device, ExitStack() as held:
        first_rank_does(lambda: check_hardware(config, device))
        first_rank_does(lambda: held.enter_context(exclusive(folder)))
        first_rank_does(lambda: prepare(config))
        patches = all_ranks_do(lambda: find_patches(config, dist.get_rank() == 0))
        if flags.fresh:  # only now: a wrong path or label must not cost the finished run
            first_rank_does(lambda: clear_run(folder))
        command = [sys.executable, *sys.argv]
        first_rank_does(lambda: open_run(folder, config, training_identity(config), command))
        records = train(config, folder, patches, device)
        if dist.get_rank() == 0:
            report(records, folder)
    return 0


def report(records: list[dict[str, float]], folder: Path) -> None:
    """The learning curve, the best validation, and where everything lies."""
    validated = [record for record in records if "average_precision" in record]
    best = max(validated, key=lambda record: (record["average_precision"], record["step"]))
    curve = folder / "figures" / "learning_curve.png"
    draw_learning_curve(records, curve)
    print(f"best average precision on validation patches: {best['average_precision']:.3f} at step {best['step']:g}")
    print(f"run: {folder}", f"weights: {folder / 'checkpoints' / 'best.pt'}", f"curve: {curve}", sep="\n")


if __name__ == "__main__":
    run_script(main)
