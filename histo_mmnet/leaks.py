"""Audit a split: does anything that is tested also stand among what is trained on?

python histo_mmnet/leaks.py runs/histo_mmnet/phantom-1a2b3c4d/split.csv
python histo_mmnet/leaks.py dsfold1.txt dsfold2.txt --images data/original_data/BreaKHis_v1

A split is a CSV with the columns trial, role (train, val, test) and file (BreakHis' names), or one of the official lists
dsfold*.txt. Looked for in every trial: accessions on both sides; with --images also pictures that are the same pixel by
pixel or nearly so (recompressed, resized, lighter, flipped), and how often the nearest neighbour by colour is of the same
accession. Exit code 1 where there is a leak.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse

from common.command import ScriptParser
from common.errors import BAD_DATA, run_script
from histo_mmnet.audit import Pictured, audit, pictured
from histo_mmnet.names import ImageName
from histo_mmnet.scan import find_breast, scan
from histo_mmnet.splits import Trial, read_split


def look_at(folders: list[Path], trials: list[Trial]) -> Pictured | None:
    """The pictures of the trials' images that lie in the folders; None without folders."""
    if not folders:
        return None
    wanted = {name for trial in trials for name in trial.names}
    paths: dict[ImageName, Path] = {}
    for folder in folders:
        paths |= {image.name: image.path for image in scan(find_breast(folder)) if image.name in wanted}
    print(f"{len(paths)} of {len(wanted)} images are there to look at", flush=True)
    return pictured(paths)


def main(arguments: list[str]) -> int:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("splits", type=Path, nargs="+", metavar="SPLIT", help="tables or official lists")
    parser.add_argument(
        "--images", type=Path, action="append", default=[], metavar="FOLDER", help="BreaKHis_v1, repeatable"
    )
    chosen = parser.parse_args(arguments)
    trials = [(path, trial) for path in chosen.splits for trial in read_split(path)]
    pictures = look_at(chosen.images, [trial for _, trial in trials])
    leaks = 0
    for path, trial in trials:
        findings = audit(trial, pictures)
        is_leak = any(finding.is_leak for finding in findings)
        leaks += is_leak
        print(f"{path}, trial {trial.number}: {'LEAK' if is_leak else 'no leak found'}")
        for finding in findings:
            print(f"  {'leak: ' if finding.is_leak else ''}{finding.words}")
    print(f"{leaks} of {len(trials)} trials leak")
    return BAD_DATA if leaks else 0


if __name__ == "__main__":
    run_script(main)
