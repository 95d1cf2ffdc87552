"""Cut tomograms into training patches.

python motor_detection/convert.py --preset kaggle data.root=byu/train data.labels=byu/RELABELED_DATA.csv
python motor_detection/convert.py --preset kaggle ... convert.single=5 convert.patch_size=[96,192,192]

Reads every labelled tomogram once (folds from 0; fold -1 is left out) and writes one .npz file per patch with the keys
patch (uint8), heatmap (float32), patch_type, motors (voxel index in the patch), origin, spacing_angstrom, intensity
(mean and standard deviation of the tomogram) and tomo_id. An interrupted conversion continues with the same command.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

from common.command import parse_config, script_parser
from common.errors import BAD_DATA, run_script
from common.lock import exclusive
from motor_detection.config import PRESETS, Config
from motor_detection.conversion import Summary, clear_folder, convert_all
from motor_detection.places import convert_settings, read_tomograms, resolve_data


def convert(config: Config, fresh: bool, left_out_fold: int) -> Summary:
    """Convert a config's tomograms but one fold's (-1: all); what is complete already is kept unless fresh."""
    data = resolve_data(config)
    labelled, paths = read_tomograms(data, True)
    labelled = [tomogram for tomogram in labelled if tomogram.fold != left_out_fold]
    with exclusive(data.patches):
        if fresh:
            clear_folder(data.patches)
        return convert_all(labelled, paths, data, convert_settings(config), config.convert.producers)


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument("--fresh", action="store_true", help="delete the patches of data.patches first")
    config, flags = parse_config(parser, PRESETS, arguments)
    summary = convert(config, flags.fresh, -1)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.patches.items()))
    print(f"converted {summary.converted} tomograms ({kinds or 'no patches'}), kept {summary.kept} from before")
    print(f"patches: {resolve_data(config).patches}")
    if summary.failed:
        print(f"failed: {len(summary.failed)} problems, each named above; the rest is done", file=sys.stderr)
        return BAD_DATA
    return 0


if __name__ == "__main__":
    run_script(main)
