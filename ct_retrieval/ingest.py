"""Bring CTs into a store: DICOM folders, NIfTI, NRRD or MetaImage files; every series gets a verdict.

python ct_retrieval/ingest.py --input data/original_data/ct/archive --output data/generated/ct/store
python ct_retrieval/ingest.py --input a.nii.gz b.nrrd study_folder --output store grid.spacing_mm=2 grid.shape=[150,135,135]
python ct_retrieval/ingest.py --input study_folder --check

A study is a file, or the DICOM images of one StudyInstanceUID; of its series the one that covers most is stored. verdicts.json
lists all series: ok, repaired (and how) or refused (and why). The same command continues a killed one; --check only tells.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

import argparse
import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator

from common.command import parse_config, script_parser
from common.dicom.assembly import assemble
from common.dicom.headers import Header, read_headers
from common.dicom.series import Finding, Series, find_series, places_mm
from common.errors import UserError, config_error, data_error, run_script
from common.files import write_text
from common.lock import exclusive
from common.logbook import progress
from common.scan_files import SUFFIXES, read_scan
from common.scans import Scan, canonical
from ct_retrieval.config import PRESETS, Config
from ct_retrieval.resampling import Centre, centre_of, crop, place_of
from ct_retrieval.store import (
    Study,
    patient_hash,
    read_study,
    safe_name,
    store_key,
    volume_path,
    window_of,
    write_study,
)

NO_AIR_HU = -500  # that the least value of a chest lies below


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """One study before it is read."""

    name: str
    patient: str  # identity as the files give it; it leaves this script as a keyed hash only
    file: Path | None  # a volume in one file
    series: list[Series]  # else its DICOM series


def main(arguments: list[str]) -> int:
    parser = script_parser(__doc__ or "", PRESETS)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="PATH", help="files and folders, searched"
    )
    parser.add_argument("--output", type=Path, metavar="STORE", help="the store's folder")
    parser.add_argument("--check", action="store_true", help="tell the verdicts and store nothing")
    config, flags = parse_config(parser, PRESETS, arguments)
    if (flags.output is None) == (not flags.check):
        raise config_error("--output: expected a folder, or --check and no folder")
    studies, ignored = find_studies(flags.input)
    if not studies:
        raise data_error(f"--input: no CT in {', '.join(map(str, flags.input))} ({ignored} other files); expected DICOM or "
                         f"{', '.join(SUFFIXES)}")  # fmt: skip
    if flags.check:
        for study in studies:
            print(*lines_of(study), sep="\n")
        return 0
    with exclusive(flags.output):
        return ingest(studies, ignored, config, flags)


def find_studies(inputs: list[Path]) -> tuple[list[Found], int]:
    """The studies of files and folders, sorted by name, and how many other files lie there."""
    found: list[Found] = []
    headers: list[Header] = []
    ignored = 0
    files = [file for path in inputs for file in files_below(path)]
    for file in progress(files, "reading headers", len(files), True):
        if file.name.lower().endswith(SUFFIXES):
            found.append(Found(safe_name(file.name.partition(".")[0]), str(file.resolve()), file, []))
            continue
        own = read_headers(file)
        ignored += isinstance(own, str) or not own
        headers += [] if isinstance(own, str) else own
    by_study: dict[str, list[Series]] = defaultdict(list)
    for series in find_series(headers):
        first = series.headers[0]
        by_study[first.study or str(first.path.parent)].append(series)
    for series_of_study in by_study.values():
        first = series_of_study[0].headers[0]
        folder = first.path.parent
        found.append(Found(safe_name(folder.name), first.patient or str(folder.resolve()), None, series_of_study))
    return with_different_names(sorted(found, key=lambda study: study.name)), ignored


def files_below(path: Path) -> Iterator[Path]:
    """A file, or every file below a folder; whatever is hidden is left out."""
    if not path.exists():
        raise config_error(f"--input: {path}: no such file or folder")
    if path.is_file():
        yield path
        return
    for inside in sorted(path.iterdir()):
        if not inside.name.startswith(".") and not (inside.is_symlink() and inside.is_dir()):
            yield from files_below(inside)


def with_different_names(studies: list[Found]) -> list[Found]:
    """Studies of one name get a number."""
    counted: dict[str, int] = defaultdict(int)
    found = []
    for study in studies:
        counted[study.name] += 1
        number = counted[study.name]
        found.append(dataclasses.replace(study, name=study.name if number == 1 else f"{study.name}-{number}"))
    return found


def lines_of(study: Found) -> list[str]:
    """A study's verdicts in words."""
    if study.file is not None:
        return [f"{study.name}: {study.file}"]
    return [f"{study.name}:"] + [f"  {len(series.headers)} images, {series.words}" for series in study.series]


def extent_mm(series: Series) -> float:
    """How far a series reaches along its normal."""
    place = places_mm(series.headers)
    return float(place[-1] - place[0])


def best_series(study: Found) -> Series | None:
    """Of the series that are volumes the one that covers most, of equals the one with most images."""
    usable = [series for series in study.series if series.status != "refused"]
    return max(usable, key=lambda series: (round(extent_mm(series)), len(series.headers))) if usable else None


def scan_of(study: Found, config: Config) -> tuple[Scan, list[Finding]]:
    """A study's volume and all findings of it. Raises a data error where it has none."""
    if study.file is not None:
        scan = canonical(read_scan(study.file))
        check_units(study.file, scan)
        check_extent(study.name, (scan.values.shape[0] - 1) * scan.spacing_mm[0], config)
        return scan, []
    series = best_series(study)
    if series is None:
        raise data_error(f"{study.name}: no series is a volume")
    check_extent(study.name, extent_mm(series), config)
    scan, more = assemble(series)
    return canonical(scan), [*series.findings, *more]


def check_extent(name: str, extent: float, config: Config) -> None:
    """A data error for a few slices."""
    if extent < config.ingest.least_extent_mm:
        least = config.ingest.least_extent_mm
        raise data_error(f"{name}: {extent:.0f} mm of slices; expected at least {least:g} (ingest.least_extent_mm)")


def check_units(path: Path, scan: Scan) -> None:
    """A data error for numbers that are no Hounsfield units: masks, labels, scaled pictures have no air."""
    if scan.values.min() > NO_AIR_HU:
        low, high = scan.values.min(), scan.values.max()
        raise data_error(f"{path}: holds {low:g} to {high:g}, no air: a mask or a picture? expected Hounsfield units")


def source_of(study: Found) -> str:
    """A digest of what a study is made from: names, sizes and times of its files."""
    files = [study.file] if study.file is not None else sorted({h.path for s in study.series for h in s.headers})
    facts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file is not None]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def ingest(studies: list[Found], ignored: int, config: Config, flags: argparse.Namespace) -> int:
    """Store every study that is a chest's volume; tell of each."""
    key, verdicts, stored, told = store_key(flags.output), [], 0, 0
    for study in progress(studies, "storing", len(studies), True):
        source, problem = source_of(study), ""
        if is_stored(flags.output, study.name, source, config):
            told += 1
        else:
            try:
                store_study(study, source, key, config, flags.output)
                stored += 1
            except UserError as error:
                problem = error.problems[0]
        verdicts.append(verdict_of(study, problem))
        print(*lines_of(study), *([f"  not stored: {problem}"] if problem else []), sep="\n", flush=True)
        write_text(flags.output / "verdicts.json", json.dumps(verdicts, indent=1) + "\n")
    refused = len(studies) - stored - told
    print(f"{stored} studies stored, {told} were there, {refused} not stored; {ignored} files are no images",
          flags.output, flags.output / "verdicts.json", sep="\n")  # fmt: skip
    return 0


def is_stored(store: Path, name: str, source: str, config: Config) -> bool:
    """Whether a study is in the store as these files and this grid make it."""
    path = volume_path(store, name)
    if not path.exists() or not path.with_suffix(".json").exists():
        return False
    there = read_study(path.with_suffix(".json"))
    return there.source == source and there.grid == grid_of(config)


def grid_of(config: Config) -> dict[str, object]:
    """The grid as JSON gives it back."""
    found: dict[str, object] = json.loads(
        json.dumps(dataclasses.asdict(config.grid) | {"centre": config.ingest.centre})
    )
    return found


def store_study(study: Found, source: str, key: bytes, config: Config, store: Path) -> None:
    """Read, crop, write."""
    scan, findings = scan_of(study, config)
    middle = [(n - 1) / 2 for n in scan.values.shape]
    centre = centre_of(scan) if config.ingest.centre == "lungs" else Centre(place_of(scan, middle), "volume", 0.0)
    volume = crop(scan, centre.mm, config.grid.shape, config.grid.spacing_mm, window_of(config.grid))
    status = "repaired" if any(finding.status == "repaired" for finding in findings) else "ok"
    known = Study(
        study.name, patient_hash(key, study.patient), source, status, [dataclasses.asdict(f) for f in findings],
        list(centre.mm), centre.of, round(centre.lungs_ml, 1), list(scan.values.shape), list(scan.spacing_mm), grid_of(config),
    )  # fmt: skip
    write_study(store, known, volume)


def verdict_of(study: Found, problem: str) -> dict[str, object]:
    """What verdicts.json says of a study; no name, number or date of a patient."""
    return {
        "study": study.name,
        "stored": not problem,
        "problem": problem,
        "series": [
            {"images": len(series.headers), "status": series.status,
             "findings": [dataclasses.asdict(finding) for finding in series.findings]}
            for series in study.series
        ],
    }  # fmt: skip


if __name__ == "__main__":
    run_script(main)
