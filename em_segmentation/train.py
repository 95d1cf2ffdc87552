"""Train a segmentation network on EM volumes, or continue a run that was stopped.

python em_segmentation/train.py
python em_segmentation/train.py --config em_segmentation/tutorials/lucchi.yaml data.batch_size=8 training.max_epochs=200
python em_segmentation/train.py --config lab.yaml --fast-dev-run
python em_segmentation/train.py --config lab.yaml --mode test --checkpoint runs/em_segmentation/lab/checkpoints/best.pt
torchrun --nproc-per-node 4 em_segmentation/train.py --config lab.yaml system.num_gpus=4

The default preset simulates its own volumes and needs minutes on a laptop. A YAML file names the preset it changes
(run.preset). The same command continues a killed run and ends in the same weights; --fresh starts it over.
"""

import dataclasses
import os
import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import torch
import torch.distributed as dist

from common.command import parse_config, script_parser
from common.errors import config_error, run_script
from common.lock import exclusive
from common.logbook import clear_run, open_run
from common.memory import keep_freed_memory
from common.parallel import all_ranks_do, first_rank_does, process_group
from em_segmentation.config import PRESETS, Config
from em_segmentation.dataset import open_volumes
from em_segmentation.figures import draw_learning_curve
from em_segmentation.places import resolve, run_folder, training_identity
from em_segmentation.schedule import Record, ranked
from em_segmentation.state import begin
from em_segmentation.trainer import check_hardware, train
from em_segmentation.validation import check_monitors

FAST_STEPS = 2  # of --fast-dev-run, and its validation patches


def fast(config: Config) -> Config:
    """A run of one short epoch that touches every part, in a folder of its own."""
    training = dataclasses.replace(config.training, max_epochs=1, steps_per_epoch=FAST_STEPS)
    phantom = dataclasses.replace(config.phantom, train_volumes=1, validation_volumes=1, test_volumes=0)
    return dataclasses.replace(
        config,
        training=training,
        phantom=phantom,
        data=dataclasses.replace(config.data, val_patches=FAST_STEPS),
        run=dataclasses.replace(config.run, name="fast-dev-run"),
    )


def use_processor(config: Config) -> None:
    """Threads and GPUs as system says, before torch asks for them."""
    if config.system.num_gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.system.num_cpus:
        torch.set_num_threads(config.system.num_cpus)


def make_phantom(config: Config) -> None:
    """Simulate the volumes, on first use, before the other processes look for them."""
    resolve(config)


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--fresh", action="store_true", help="start the run over: its folder is deleted first")
    parser.add_argument("--fast-dev-run", action="store_true", help="two steps and a validation, to try a config out")
    parser.add_argument("--mode", choices=("train", "test"), default="train", help="test: what eval.py does")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE.pt", help="weights to test with (default: the run's best)"
    )
    config, flags = parse_config(parser, PRESETS, arguments)
    if flags.mode == "test":
        from em_segmentation.eval import test  # the other direction would be a circle

        return test(config, run_folder(config), flags.checkpoint)
    if flags.checkpoint is not None:
        raise config_error("--checkpoint: is for --mode test; to train from its weights give model.start_from=FILE.pt")
    config = fast(config) if flags.fast_dev_run else config
    use_processor(config)
    keep_freed_memory()
    run(config, run_folder(config), flags.fresh or flags.fast_dev_run)
    return 0


def run(config: Config, folder: Path, fresh: bool) -> None:
    """Look at everything, then train in the run's folder; fresh: it is emptied first."""
    with process_group(config.system.deterministic) as device, ExitStack() as held:
        first_rank_does(lambda: check_hardware(config, device))
        first_rank_does(lambda: held.enter_context(exclusive(folder)))
        first_rank_does(lambda: make_phantom(config))
        resolved = all_ranks_do(lambda: resolve(config))
        volumes = all_ranks_do(lambda: open_volumes(resolved))
        first_rank_does(lambda: check_monitors(config, bool(volumes.val)))
        known = dataclasses.replace(config.data, voxel_size_nm=volumes.voxel_size_nm)
        seen = dataclasses.replace(config, data=known)
        state = all_ranks_do(lambda: begin(seen, device))
        if fresh:  # only now: a wrong path or name must not cost the finished run
            first_rank_does(lambda: clear_run(folder))
        command = [sys.executable, *sys.argv]
        first_rank_does(lambda: open_run(folder, config, training_identity(config), command))
        records = train(state, seen, folder, volumes)
        if dist.get_rank() == 0:
            report(records, config, folder)


def report(records: list[Record], config: Config, folder: Path) -> None:
    """The learning curve, the best validation, and where everything lies."""
    curve = folder / "figures" / "learning_curve.png"
    draw_learning_curve(records, curve)
    best = ranked(records, config)[0]
    figures = ", ".join(f"{name} {value:.4f}" for name, value in best.items() if name.startswith("val_"))
    print(
        f"best weights: epoch {best['epoch']:g}{f' ({figures})' if figures else ': the last, for lack of validation volumes'}"
    )
    print(f"run: {folder}", f"weights: {folder / 'checkpoints' / 'best.pt'}", f"curve: {curve}", sep="\n")


if __name__ == "__main__":
    run_script(main)
