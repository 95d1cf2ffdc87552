"""DeepFinder's simulated tomograms as volumes [z, y, x] and a label table that motor_detection reads.

python data/import_deepfinder.py SOURCE TARGET

SOURCE holds tomo*.npz with `volume` (float, [x, y, z]) and `objects_axis012_label` (x, y, z, class per row). TARGET gets
tomograms/tomo_N.npy and labels.csv. All classes become one ("a particle"). Tomogram 8 is the validation fold 0, tomogram
9 the test fold 1, the others folds 2 to 4 in turn. The files state no voxel size; 10 angstrom is assumed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse

import numpy as np
import pandas as pd

from common.command import ScriptParser
from common.errors import data_error, run_script
from common.files import parsing, write_atomically, write_text
from data.phantoms.relabelled import relabelled_row

ASSUMED_SPACING_ANGSTROM = 10.0
HELD_OUT_FOLDS = {8: 0, 9: 1}  # tomogram -> fold


def import_tomogram(source: Path, number: int, target: Path) -> dict[str, str | int | float]:
    """Write one volume; return its row of the label table."""
    with parsing(source, "expected DeepFinder's volume and objects_axis012_label"):
        with np.load(source, allow_pickle=False) as file:
            volume = file["volume"].transpose(2, 1, 0).astype(np.float32)
            centres = file["objects_axis012_label"][:, 2::-1].astype(np.float64)  # z, y, x
        if volume.ndim != 3 or centres.ndim != 2 or centres.shape[1] != 3 or not np.isfinite(centres).all():
            raise ValueError(f"volume {volume.shape}, centres {centres.shape}")
    write_atomically(
        target / "tomograms" / f"tomo_{number}.npy", lambda out: np.save(out, np.ascontiguousarray(volume))
    )
    fold = HELD_OUT_FOLDS[number] if number in HELD_OUT_FOLDS else 2 + number % 3
    depth, height, width = volume.shape
    return relabelled_row(f"tomo_{number}", (depth, height, width), ASSUMED_SPACING_ANGSTROM, centres, fold)


def main(arguments: list[str]) -> int:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    flags = parser.parse_args(arguments)
    found = [path for path in sorted(flags.source.glob("tomo*.npz")) if path.stem.removeprefix("tomo").isdecimal()]
    files = {int(path.stem.removeprefix("tomo")): path for path in found}
    if len(files) < len(found):
        raise data_error(f"{flags.source}: two files of one number; expected tomo0.npz to tomo9.npz once each")
    if not files:
        raise data_error(f"{flags.source}: no tomo*.npz in it; expected DeepFinder's simulated tomograms")
    rows = [import_tomogram(files[number], number, flags.target) for number in sorted(files)]
    write_text(flags.target / "labels.csv", pd.DataFrame(rows).to_csv(index=False))
    print(f"{len(rows)} tomograms: {flags.target / 'tomograms'}, {flags.target / 'labels.csv'}")
    return 0


if __name__ == "__main__":
    run_script(main)
