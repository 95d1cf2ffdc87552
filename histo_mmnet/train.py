"""Train MMNet on every fold, and the baseline of each magnification beside, or continue a run that was stopped.

python histo_mmnet/train.py
python histo_mmnet/train.py --fold 2
python histo_mmnet/train.py --preset breakhis data.root=data/original_data/BreaKHis_v1 model.shared=true
torchrun --nproc-per-node 2 histo_mmnet/train.py --preset breakhis

The default preset simulates its own patients and needs minutes on a laptop. The same command continues a killed run and ends
in the same weights; --fresh starts it over. Writes split.csv, models/ and results/*_metrics.csv into the run's folder; eval.py
reads them.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

from collections.abc import Callable

import torch.distributed as dist

from common.command import parse_config, script_parser
from common.errors import run_script
from common.lock import exclusive
from common.logbook import clear_run, open_run
from common.memory import keep_freed_memory
from common.parallel import all_ranks_do, first_rank_does, process_group
from histo_mmnet.config import PRESETS, Config
from histo_mmnet.folds import announce, chosen_trials, train_members
from histo_mmnet.members import Member, baselines_of, build_network, mmnet_of
from histo_mmnet.places import (
    Collection,
    collect,
    find_images,
    run_folder,
    training_identity,
    with_nesting,
    with_recorded_split,
)
from histo_mmnet.splits import Trial
from histo_mmnet.trainer import Files, check_hardware

Choose = Callable[[list[Trial], Config], list[Member]]  # which members a script trains


def members_of(trials: list[Trial], config: Config) -> list[Member]:
    """MMNet of each fold, and its baselines where the config asks for them."""
    baselines = [member for t in trials for member in baselines_of(t.number)]
    return [mmnet_of(t.number) for t in trials] + (baselines if config.train.single_magnifications else [])


def main(arguments: list[str]) -> int:
    return train_script(__doc__ or "", members_of, arguments)


def train_script(description: str, choose: Choose, arguments: list[str]) -> int:
    """The whole of an entry script that trains the chosen members."""
    parser = script_parser(description, PRESETS)
    parser.add_argument("--fold", type=int, metavar="K", help="train one fold (default: all)")
    parser.add_argument(
        "--fresh", action="store_true", help="start the run over: what it trained before is deleted first"
    )
    config, flags = parse_config(parser, PRESETS, arguments)
    folder = run_folder(config)
    keep_freed_memory()
    with process_group(config.train.deterministic) as device, ExitStack() as held:
        first_rank_does(lambda: check_hardware(config, device))
        first_rank_does(lambda: held.enter_context(exclusive(folder)))
        first_rank_does(lambda: simulate(config))
        collection = all_ranks_do(lambda: collect(config))
        trials = all_ranks_do(lambda: chosen_trials(collection, flags.fold))
        members = choose(trials, config)
        kinds = {member.magnifications: member for member in members}
        # a backbone that is not known, or other weights, must not begin a run
        all_ranks_do(lambda: [build_network(member, config.model) for member in kinds.values()])
        # only now: a wrong path or fold must not cost the finished run, nor one fold anew the others
        if flags.fresh and set(members_of(collection.trials, config)) <= set(members):
            first_rank_does(lambda: clear_run(folder))
        first_rank_does(lambda: begin_run(config, folder, collection))
        if flags.fresh:
            first_rank_does(lambda: delete_members(members, folder))
        recorded = all_ranks_do(lambda: with_nesting(with_recorded_split(collection, folder), config, folder))
        if dist.get_rank() == 0:
            announce(config, recorded, device)
        train_members(members, recorded, config, folder, device)
        if dist.get_rank() == 0:
            print(f"run: {folder}", f"weights: {folder / 'models'}", f"split: {folder / 'split.csv'}", sep="\n")
    return 0


def simulate(config: Config) -> None:
    """The phantom, on first use, before the other processes look for it."""
    find_images(config)


def delete_members(members: list[Member], folder: Path) -> None:
    """So that they are trained anew."""
    for member in members:
        Files.of(folder, member).delete()


def begin_run(config: Config, folder: Path, collection: Collection) -> None:
    """The run's folder with its config, who is tested when, and what lies inside what: made by one process, read by all."""
    if (folder / "split.csv").exists():
        with_recorded_split(collection, folder)  # what is refused changes nothing
    open_run(folder, config, training_identity(config), [sys.executable, *sys.argv])
    with_nesting(with_recorded_split(collection, folder), config, folder)


if __name__ == "__main__":
    run_script(main)
