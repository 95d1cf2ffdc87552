"""Who is tested when: folds over accessions or slides, the official five trials, and the tables they are kept in.

BreakHis' 82 slide folders come from 70 accessions. Folds over slides put slides of one patient on both sides, and so does
every official trial; folds over accessions do not, as far as an accession is a patient.
"""

import csv
import dataclasses
import io
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from common.errors import config_error, data_error
from common.files import read_text, write_text
from common.streams import random_for
from histo_mmnet.names import CLASSES, ImageName, image_name

Unit = Literal["accession", "slide"]
Role = Literal["train", "val", "test"]
ROLES: tuple[Role, ...] = ("train", "val", "test")
COLUMNS = ("trial", "role", "file")
ORDERS = 64  # of units that are tried; each gives folds of its own


@dataclasses.dataclass(frozen=True)
class Trial:
    """One division of images; roles[i] is that of names[i]. An image has one role or, left out, does not occur."""

    number: int
    names: tuple[ImageName, ...]
    roles: tuple[Role, ...]

    def of(self, role: Role) -> list[ImageName]:
        """The images of a role, sorted."""
        return sorted(name for name, own in zip(self.names, self.roles, strict=True) if own == role)

    def restricted(self, names: set[ImageName]) -> "Trial":
        """The same with images that are there alone."""
        kept = [(name, role) for name, role in zip(self.names, self.roles, strict=True) if name in names]
        return Trial(self.number, tuple(name for name, _ in kept), tuple(role for _, role in kept))


def unit_of(name: ImageName, unit: Unit) -> str:
    """The unit that must not be divided: the accession, or the slide."""
    return name.accession if unit == "accession" else name.slide


def folds(names: Iterable[ImageName], unit: Unit, num_folds: int, seed: int) -> dict[str, int]:
    """The fold 0 .. num_folds - 1 of each unit, alike in subtypes and numbers of images; depends on names and seed alone.

    Raises a config error where units are too few or a fold has not both classes.
    """
    ordered = sorted(names)
    units = [unit_of(name, unit) for name in ordered]
    tumours = {own: name.tumour for own, name in zip(units, ordered, strict=True)}
    for tumour, words in CLASSES.items():
        there = sum(own == tumour for own in tumours.values())
        if there < num_folds:
            raise config_error(
                f"split.num_folds: {num_folds} folds need {num_folds} {words} {unit}s, the data has {there}; "
                f"expected at most {max(there, 2)}, or more data"
            )
    best: dict[str, int] = {}
    least = np.inf
    for attempt in range(ORDERS):  # the splitter is greedy and its folds uneven: the most even of several orders
        state = int(random_for("folds", seed, attempt).integers(2**31))
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=state)
        subtypes = [name.subtype for name in ordered]
        found: dict[str, int] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of subtypes rarer than folds
            for fold, (_, tested) in enumerate(splitter.split(np.zeros(len(ordered)), subtypes, units)):
                found |= {units[at]: fold for at in tested}
        uneven = unevenness(found, tumours, num_folds)
        if uneven < least:
            best, least = found, uneven
    if not np.isfinite(least):
        raise config_error(f"split.num_folds: {num_folds} folds over {len(tumours)} {unit}s leave one without a class")
    return best


def unevenness(fold_of: dict[str, int], tumours: dict[str, str], num_folds: int) -> float:
    """Sum over classes of the standard deviation of units per fold; infinite where a fold lacks a class."""
    total = 0.0
    for tumour in CLASSES:
        counted = Counter(fold for unit, fold in fold_of.items() if tumours[unit] == tumour)
        per_fold = [counted[fold] for fold in range(num_folds)]
        total += float(np.std(per_fold)) if min(per_fold) else np.inf
    return total


def fold_trials(names: Iterable[ImageName], unit: Unit, num_folds: int, seed: int) -> list[Trial]:
    """One trial per fold: it is tested, the next one validates, the others train."""
    ordered = tuple(sorted(names))
    fold_of = folds(ordered, unit, num_folds, seed)
    trials = []
    for number in range(num_folds):
        role_of: dict[int, Role] = {number: "test", (number + 1) % num_folds: "val"}
        own = (fold_of[unit_of(name, unit)] for name in ordered)
        trials.append(Trial(number, ordered, tuple(role_of[fold] if fold in role_of else "train" for fold in own)))
    return trials


def read_official(folder: Path) -> list[Trial]:
    """The five published lists dsfold1.txt ... dsfold5.txt: FILE|MAGNIFICATION|FOLD|train or test per line; no validation."""
    paths = sorted(folder.glob("dsfold*.txt"))
    if not paths:
        raise config_error(
            f"split.official: {folder}: no dsfold1.txt ... dsfold5.txt; they come with BreakHis' mkfold.tar.gz"
        )
    return [read_list(path, number) for number, path in enumerate(paths)]


def read_list(path: Path, number: int) -> Trial:
    """One official list as trial `number`."""
    names: list[ImageName] = []
    roles: list[Role] = []
    for line_number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("|")
        name = image_name(fields[0])
        role = next((known for known in ROLES if known == fields[-1].strip()), None)
        if len(fields) != 4 or name is None or role is None:
            raise data_error(
                f"{path}:{line_number}: expected FILE.png|MAGNIFICATION|FOLD|train or test, got {line[:60]!r}"
            )
        names.append(name)
        roles.append(role)
    return checked(path, Trial(number, tuple(names), tuple(roles)))


def read_split(path: Path) -> list[Trial]:
    """The trials of a table with the columns trial, role (train, val or test) and file; or of an official list.

    Raises a data error that names the line.
    """
    if path.suffix == ".txt":
        return [read_list(path, 0)]
    reader = csv.DictReader(io.StringIO(read_text(path)))
    if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
        raise data_error(f"{path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(reader.fieldnames or ())}")
    names: dict[int, list[ImageName]] = {}
    roles: dict[int, list[Role]] = {}
    for row in reader:
        name = image_name(Path(row["file"] or "").name)
        role = next((known for known in ROLES if known == row["role"]), None)
        if name is None or role is None or not (row["trial"] or "").isdecimal():
            raise data_error(
                f"{path}:{reader.line_num}: expected a trial's number, train, val or test, and a file's name, "
                f"got {row['trial']}, {row['role']}, {row['file']}"
            )
        names.setdefault(int(row["trial"]), []).append(name)
        roles.setdefault(int(row["trial"]), []).append(role)
    if not names:
        raise data_error(f"{path}: holds no row")
    return [checked(path, Trial(number, tuple(names[number]), tuple(roles[number]))) for number in sorted(names)]


def checked(path: Path, trial: Trial) -> Trial:
    """The trial; a data error where an image stands twice or a side is empty."""
    twice = [(name.file, count) for name, count in Counter(trial.names).items() if count > 1]
    if twice:
        raise data_error(f"{path}: trial {trial.number}: {twice[0][0]} stands in it {twice[0][1]} times")
    if not trial.of("train") or not trial.of("test"):
        raise data_error(f"{path}: trial {trial.number}: expected images to train and to test on")
    return trial


def write_split(path: Path, trials: list[Trial]) -> None:
    """The trials as a table that read_split reads."""
    rows = [
        f"{trial.number},{role},{name.file}"
        for trial in trials
        for name, role in zip(trial.names, trial.roles, strict=True)
    ]
    write_text(path, "\n".join([",".join(COLUMNS), *rows]) + "\n")


def shared_units(trial: Trial, unit: Unit) -> dict[str, list[ImageName]]:
    """Units with images to test and images to train or validate on, and those that are tested."""
    seen = {unit_of(name, unit) for name in (*trial.of("train"), *trial.of("val"))}
    shared: dict[str, list[ImageName]] = {}
    for name in trial.of("test"):
        if unit_of(name, unit) in seen:
            shared.setdefault(unit_of(name, unit), []).append(name)
    return shared
