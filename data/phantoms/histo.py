"""Simulated breast histology in BreakHis' folders and names, the default data of histo_mmnet.

Accessions have one to three slides, slides a few places, and a place is photographed at 40X, 100X, 200X and 400X, each field
inside the one before. Malignant tissue has larger, more uneven and more crowded nuclei, more disordered glands, or some of
both; dyes and lamp differ from accession to accession whatever its class, and a place's mean of haematoxylin does not tell its
nuclei.
"""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Pictures

from common.errors import config_error, data_error
from common.files import write_atomically, write_text
from common.lock import exclusive
from common.logbook import progress
from common.processes import submit_all, worker_pool
from common.streams import random_for
from data.phantoms.histo_imaging import draw_staining, of_slide, photograph
from data.phantoms.histo_scene import RATIO, Scene, draw_scene, draw_tissue
from data.phantoms.histo_settings import HistoPhantom

GENERATOR_VERSION = 3  # raised whenever equal settings give other bits, so that stale folders are noticed
SUBTYPES = (("A", "F", "PT", "TA"), ("DC", "LC", "MC", "PC"))  # benign, malignant
FOLDERS = {"A": "adenosis", "F": "fibroadenoma", "PT": "phyllodes_tumor", "TA": "tubular_adenoma", "DC": "ductal_carcinoma",
           "LC": "lobular_carcinoma", "MC": "mucinous_carcinoma", "PC": "papillary_carcinoma"}  # fmt: skip
SHARES = ((4, 10, 3, 7), (38, 5, 9, 6))  # slides of each subtype in BreakHis
FIELDS = {40: 1.0, 100: 0.4, 200: 0.2, 400: 0.1}  # width of a photograph, in that of 40X
SUFFIXES = ("", "AB", "CD", "EF")  # of slides: none where an accession has one
FIRST_NUMBER = 50001  # of accessions; BreakHis' are below


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One image and what it shows."""

    path: Path  # below the folder of the classes
    pixels: npt.NDArray[np.uint8]  # (y, x, 3)
    corner_micrometre: tuple[float, float]  # y, x of its first pixel in its place
    width_micrometre: float
    site: int


def accessions(settings: HistoPhantom) -> list[tuple[int, int]]:
    """(number, label) of every accession; classes take turns."""
    labels = [0] * settings.benign_accessions + [1] * settings.malignant_accessions
    order = random_for("histo order", settings.seed).permutation(len(labels))
    return [(FIRST_NUMBER + place, labels[at]) for place, at in enumerate(order)]


def simulate_accession(settings: HistoPhantom, number: int, label: int) -> Iterator[Photograph]:
    """All photographs of an accession; equal arguments give equal bits."""
    rng = random_for("histo accession", settings.seed, number, label)
    shares = np.array(SHARES[label], float) ** 0.5  # rare subtypes are not so rare here
    subtype = str(rng.choice(SUBTYPES[label], p=shares / shares.sum()))
    tissue, staining = draw_tissue(settings, label, subtype, rng), draw_staining(settings, rng)
    slides = int(rng.integers(2, 4)) if rng.random() < settings.several_slides_share else 1
    for suffix in SUFFIXES[1 : 1 + slides] if slides > 1 else SUFFIXES[:1]:
        name = f"SOB_{'BM'[label]}_{subtype}-14-{number}{suffix}"
        slide = Path(
            ("benign", "malignant")[label], "SOB", FOLDERS[subtype], name.replace(f"{subtype}-", f"{subtype}_", 1)
        )
        dyes = of_slide(staining, settings, rng)
        sequence = dict.fromkeys(FIELDS, 0)
        for site in range(int(rng.integers(settings.sites[0], settings.sites[1] + 1))):
            scene = draw_scene(settings, tissue, rng)
            corner, width = (0.0, 0.0), settings.field_micrometre * RATIO
            high = width * settings.size[0] / settings.size[1]
            for magnification, share in FIELDS.items():
                own = settings.field_micrometre * RATIO * share
                corner = corner_inside(scene, corner, (high, width), own / width, rng)
                high, width = own / width * high, own
                sequence[magnification] += int(rng.integers(1, 3))  # numbers have gaps
                pixels = photograph(settings, scene, dyes, corner, width, rng)
                if site > 0 and rng.random() < settings.missing_share:
                    continue
                file = f"{name}-{magnification}-{sequence[magnification]:03d}.png"
                yield Photograph(slide / f"{magnification}X" / file, pixels, corner, width, site)


def corner_inside(
    scene: Scene, corner: tuple[float, float], size: tuple[float, float], share: float, rng: np.random.Generator
) -> tuple[float, float]:
    """The corner of a field inside another, about a gland where one is there: nobody photographs stroma alone."""
    begin, extent = np.array(corner), np.array(size)
    inside = ((scene.centres > begin) & (scene.centres < begin + extent)).all(1).nonzero()[0]
    centre = rng.uniform(begin, begin + extent)
    if share < 1 and len(inside):
        centre = scene.centres[rng.choice(inside)] + rng.normal(0, 0.25, 2) * share * extent
    y, x = np.clip(centre - share * extent / 2, begin, begin + (1 - share) * extent)
    return float(y), float(x)


def write_phantom(settings: HistoPhantom, folder: Path, producers: int) -> Path:
    """Write the data set into a folder, once, and return the folder of the classes.

    A killed call is continued by the next; a complete folder is left as it is. The files do not depend on `producers`
    (processes that simulate at once). Raises UserError where the settings are impossible or the folder holds others.
    """
    problems = [f"phantom.{problem}" for problem in settings.problems()]
    if problems:
        raise config_error(*problems)
    described = json.dumps({"generator_version": GENERATOR_VERSION, **dataclasses.asdict(settings)}, indent=1) + "\n"
    breast, recorded = folder / "histology_slides" / "breast", folder / "settings.json"
    if recorded.exists() and recorded.read_text() == described:
        return breast
    with exclusive(folder):
        unfinished = folder / "unfinished.json"
        for path in (recorded, unfinished):
            if path.exists() and path.read_text() != described:
                raise config_error(
                    f"phantom: {folder} holds images simulated with other settings; delete it or name another"
                )
        write_text(unfinished, described)
        work = [(settings, folder, number, label) for number, label in accessions(settings)]
        missing = [given for given in work if not record_path(folder, given[2]).exists()]
        print(f"simulating {len(missing)} patients into {folder}", flush=True)
        for _ in progress(written(missing, producers), "simulating patients", len(missing), True):
            pass
        write_text(recorded, described)
        unfinished.unlink()
    return breast


def record_path(folder: Path, number: int) -> Path:
    """What was photographed of an accession; written last."""
    return folder / "truth" / f"{number}.json"


def written(missing: list[tuple[HistoPhantom, Path, int, int]], producers: int) -> Iterator[None]:
    """Write accessions one after another or by several processes, yielding once for each."""
    if producers == 1 or len(missing) < 2:
        for given in missing:
            write_accession(*given)
            yield
        return
    with worker_pool(producers) as pool:
        try:
            yield from (future.result() for future in as_completed(submit_all(pool, write_accession, missing)))
        except BrokenProcessPool as error:
            raise data_error(
                "phantom: a simulating process died (out of memory?); what is finished is kept, and the same command "
                "with fewer producers continues"
            ) from error


def write_accession(settings: HistoPhantom, folder: Path, number: int, label: int) -> None:
    """Write one accession's images, then its record."""
    rows = []
    for taken in simulate_accession(settings, number, label):
        path = folder / "histology_slides" / "breast" / taken.path
        picture = Pictures.fromarray(taken.pixels)
        write_atomically(path, lambda file, picture=picture: picture.save(file, "PNG", compress_level=1))  # type: ignore[misc]
        y, x = taken.corner_micrometre
        rows.append({"file": path.name, "site": taken.site, "y": y, "x": x, "width": taken.width_micrometre})
    write_text(record_path(folder, number), json.dumps(rows, indent=1) + "\n")
