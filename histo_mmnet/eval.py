"""Judge a trained run: every fold's patients tested once, baselines and chance beside, figures and a report.

python histo_mmnet/eval.py --all
python histo_mmnet/eval.py --roc-curves --table
python histo_mmnet/eval.py --run runs/histo_mmnet/phantom-1a2b3c4d --gradcam
python histo_mmnet/eval.py --fold 2 --preset breakhis data.root=data/original_data/BreaKHis_v1
python histo_mmnet/eval.py --compare runs/histo_mmnet/other

Finds the run of the same preset, YAML and words that train.py was given, or --run FOLDER. Thresholds come from validation
images. Always writes results/ (metrics.json, predictions.csv, fold_k_results.json, results_summary.csv,
cross_validation_results.json) and report.html; flags add pictures in plots/ and gradcam/ and tables in results/.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import torch

from common.command import parse_config, script_parser
from common.errors import config_error, run_script
from common.files import read_text, write_text
from common.lock import exclusive
from common.logbook import first_difference
from common.memory import keep_freed_memory
from common.parallel import process_group
from histo_mmnet.comparison import compare, patients_of
from histo_mmnet.config import PRESETS, Config
from histo_mmnet.folds import chosen_trials
from histo_mmnet.gradcam import check_layer
from histo_mmnet.judging import check_trained, judge
from histo_mmnet.members import mmnet_of
from histo_mmnet.pages import Asked, summary, write_pages
from histo_mmnet.places import collect, run_folder, training_identity, with_nesting, with_recorded_split
from histo_mmnet.predictions import load_member
from histo_mmnet.results import write_results
from histo_mmnet.splits import Trial
from histo_mmnet.trainer import Files

FLAGS = {
    "learning_curves": "draw losses and figures over epochs",
    "roc_curves": "draw receiver operating characteristics",
    "table": "write performance_table.csv and summary_report.csv",
    "magnitude": "importance of the magnifications: Shapley values beside the network's own",
    "gradcam": "draw what the network looks at, in all four photographs at once",
}


def check_same_run(config: Config, folder: Path, trials: list[Trial]) -> None:
    """The weights of a run must be those of these constants."""
    for trial in trials:
        path = Files.of(folder, mmnet_of(trial.number)).best
        if path.exists():
            there, here = training_identity(load_config(path, trial.number)), training_identity(config)
            if there != here:
                raise config_error(
                    f"{path}: was trained with other constants than these ({first_difference(here, there)}); "
                    "give --run FOLDER and nothing that shapes it"
                )


def check_constants(config: Config, folder: Path) -> None:
    """The constants of a run must be these: told before they lead to other folds or images."""
    there, here = read_text(folder / "identity.yaml"), training_identity(config)
    if there != here:
        raise config_error(
            f"--run: {folder} was trained with other constants ({first_difference(here, there)}); give --run FOLDER and "
            "nothing that shapes it"
        )


def load_config(path: Path, fold: int) -> Config:
    """The config that a fold's weights were trained with."""
    return load_member(path, mmnet_of(fold), torch.device("cpu"))[1]


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run's folder (its config.yaml is the base)")
    parser.add_argument("--fold", type=int, metavar="K", help="judge one fold, into FOLDER/fold_K (default: all)")
    parser.add_argument("--all", action="store_true", help="all of the following")
    for name, words in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=words)
    parser.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="beside another run that was judged, patient by patient"
    )
    config, flags = parse_config(parser, PRESETS, arguments)
    folder = flags.run if flags.run is not None else run_folder(config)
    if not (folder / "split.csv").exists():
        runs = sorted(str(path.parent) for path in folder.parent.glob("*/split.csv"))
        there = f"; there are {', '.join(runs[:5])} (--run FOLDER)" if runs else ""
        raise config_error(f"--run: no run at {folder} (no split.csv); train.py with the same words makes it{there}")
    check_constants(config, folder)
    if flags.compare is not None:
        patients_of(flags.compare)  # a wrong folder is told before anything is judged
    asked = Asked(**{name: flags.all or getattr(flags, name) for name in FLAGS})
    keep_freed_memory()
    with process_group(config.train.deterministic) as device, exclusive(folder):
        collection = with_recorded_split(collect(config), folder)
        trials = chosen_trials(collection, flags.fold)
        for line in (*collection.told, *check_trained(trials, folder)):
            print(line)
        check_same_run(config, folder, trials)
        if asked.gradcam:
            network, trained = load_member(
                Files.of(folder, mmnet_of(trials[0].number)).best, mmnet_of(trials[0].number), device
            )
            check_layer(network, trained, config.evaluation.gradcam_layer)
        # a fold by itself has other thresholds and figures than the run: they do not replace it
        output = folder if flags.fold is None else folder / f"fold_{flags.fold}"
        if (output / "results" / "metrics.json").exists():
            print("note: these patients were judged before; the best of several looks is not an honest figure")
        collection = with_nesting(collection, config, folder)
        verdict = judge(collection, trials, config, folder, device)
        results = write_results(verdict, trials, config, folder, output)
        written = write_pages(verdict, results, asked, config, folder, output, device)
    print(summary(verdict, config))
    if flags.compare is not None:
        told = compare(output, flags.compare, config.evaluation)
        write_text(output / "results" / "comparison.txt", told + "\n")
        print(told)
        written.append(output / "results" / "comparison.txt")
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
