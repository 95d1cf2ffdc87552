"""What a BreakHis folder holds: every image by name, what contradicts its folder, and how it differs from the published set."""

import csv
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.errors import config_error, data_error
from histo_mmnet.names import CLASSES, MAGNIFICATIONS, ImageName, image_name

ROOT_VARIABLE = "BREAKHIS_ROOT"  # where data.root is not set: one config serves a laptop and a cluster
BREAST = "histology_slides/breast"
INSIDE = (".", "breast", BREAST, f"BreaKHis_v1/{BREAST}", f"BreaKHis_v1/BreaKHis_v1/{BREAST}",
          f"breakhis/BreaKHis_v1/BreaKHis_v1/{BREAST}")  # fmt: skip
PUBLISHED = Path(__file__).with_name("breakhis_slides.csv")  # images of the 82 slides, as in the official file lists
DOUBLED = {"14-13412": ("SOB_M_DC_14-13412", "SOB_M_LC_14-13412")}  # the same images under two subtypes
TOLD = 5  # differences that are told one by one
Counts = dict[str, tuple[int, ...]]  # slide -> images per magnification
DoubledPolicy = Literal["drop", "ductal", "lobular", "both"]


@dataclasses.dataclass(frozen=True, order=True)
class Image:
    """One file; ordered by name."""

    name: ImageName
    path: Path


def find_breast(root: Path | None) -> Path:
    """The folder with benign/ and malignant/ below data.root, or below $BREAKHIS_ROOT where that is None.

    Raises a config error where there is none.
    """
    named = "data.root"
    if root is None:
        if ROOT_VARIABLE not in os.environ:
            raise config_error(
                f"data.root: not set, and neither is the environment variable {ROOT_VARIABLE}; expected the folder of "
                "BreaKHis_v1 in one of them. See histo_mmnet/README.md#data"
            )
        named, root = f"${ROOT_VARIABLE}", Path(os.environ[ROOT_VARIABLE])
    for inside in INSIDE:
        breast = root / inside
        if any((breast / name / method).is_dir() for name in CLASSES.values() for method in ("SOB", "CNB")):
            return breast
    state = "no benign/SOB or malignant/SOB in it or in histology_slides/breast below" if root.is_dir() else "no folder"
    raise config_error(f"{named}: {root}: {state}; expected the folder of BreaKHis_v1. See histo_mmnet/README.md#data")


def scan(breast: Path) -> list[Image]:
    """All images of .../breast/<class>/SOB/<subtype>/<slide>/<40X...400X>/*.png, sorted by name.

    Raises a data error that lists names which are not BreakHis' or which contradict the folder they lie in: either would
    put an image under a wrong label or patient. Hidden files and files that are no PNG are left alone.
    """
    found: list[Image] = []
    problems: list[str] = []
    for path in walk(breast):
        place = path.relative_to(breast)
        name = image_name(path.name)
        if name is None or len(place.parts) != 6:
            problems.append(f"{path}: no name of BreakHis; expected like {EXAMPLE}")
        elif place.parts[:-1] != name.folders:
            where = next(i for i, (is_, said) in enumerate(zip(place.parts, name.folders, strict=False)) if is_ != said)
            problems.append(f"{path}: lies in {place.parts[where]}/, its name says {name.folders[where]}/")
        else:
            found.append(Image(name, path))
    if problems:
        more = [f"{breast}: {len(problems) - TOLD} more such names"] if len(problems) > TOLD else []
        raise data_error(*problems[:TOLD], *more, f"{breast}: rename the {len(problems)} files, or move them away")
    if not found:
        raise data_error(f"{breast}: holds no image; expected like {EXAMPLE}")
    return sorted(found)


EXAMPLE = "benign/SOB/tubular_adenoma/SOB_B_TA_14-4659/40X/SOB_B_TA-14-4659-40-001.png"


def walk(folder: Path) -> Iterator[Path]:
    """Every PNG below a folder; whatever is hidden is left out."""
    return (path for path in files_below(folder) if path.suffix.lower() == ".png")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted; whatever is hidden is left out. A data error where a link leads back up."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
                raise data_error(f"{path}: this link leads back to a folder that it lies in; remove it")
            yield from files_below(path)
        else:
            yield path


def counts_of(images: list[Image]) -> Counts:
    """Images per slide and magnification."""
    counted = Counter((image.name.slide, image.name.magnification) for image in images)
    slides = sorted({slide for slide, _ in counted})
    return {slide: tuple(counted[slide, m] for m in MAGNIFICATIONS) for slide in slides}


def published_counts() -> Counts:
    """Images per slide and magnification of the whole published set."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["slide"]: tuple(int(row[f"{m}X"]) for m in MAGNIFICATIONS) for row in rows}


def differences(found: Counts, published: Counts) -> list[str]:
    """One line for what is there in all, then one per difference from the published set, at most TOLD of a kind."""
    images = sum(map(sum, found.values()))
    if found == published:
        return [f"{len(found)} slides, {images:,} images: BreakHis as published"]
    total = sum(map(sum, published.values()))
    lines = [f"{len(found)} slides, {images:,} images; BreakHis as published has {len(published)} and {total:,}"]
    other = [slide for slide in found if slide not in published]
    absent = [slide for slide in published if slide not in found]
    for words, slides in (("not of BreakHis", other), ("missing", absent)):
        if slides:
            more = f" and {len(slides) - TOLD} more" if len(slides) > TOLD else ""
            lines.append(f"  {words}: {', '.join(slides[:TOLD])}{more}")
    changed = [
        f"  {slide}: {found[slide][at]} images at {m}X, published {published[slide][at]}"
        for slide in found if slide in published
        for at, m in enumerate(MAGNIFICATIONS) if found[slide][at] != published[slide][at]
    ]  # fmt: skip
    if len(changed) > TOLD:
        changed[TOLD:] = [f"  {len(changed) - TOLD} more counts differ"]
    return lines + changed


def without_doubled(images: list[Image], policy: DoubledPolicy) -> tuple[list[Image], list[str]]:
    """The images without those that stand under two labels, as the policy says; and a line that tells."""
    kept, lines = images, []
    for accession, slides in DOUBLED.items():
        there = sorted({image.name.slide for image in images if image.name.slide in slides})
        dropped = {"drop": slides, "ductal": slides[1:], "lobular": slides[:1], "both": ()}[policy]
        gone = [slide for slide in there if slide in dropped]
        if gone:
            kept = [image for image in kept if image.name.slide not in gone]
            lines.append(
                f"accession {accession} stands under two subtypes with the same images; left out: {', '.join(gone)} "
                f"(data.doubled={policy})"
            )
    return kept, lines
