"""Slides and their photographs: what lies in which folder, and its pixels at one size and of one stain."""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pictures

from common.errors import config_error, data_error
from histo_mmnet.colours import read_picture
from histo_mmnet.config import Config
from histo_mmnet.names import MAGNIFICATIONS, Magnification, image_name
from histo_mmnet.scan import Image, files_below
from histo_mmnet.stain import macenko, reinhard

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a field lies in a photograph of the next coarser magnification."""

    parent: Path
    y: float  # of its corner, in the parent's pixels at the album's size
    x: float
    score: float  # correlation, -1..1


Nesting = dict[Path, Place]  # photograph -> where it lies; without an entry: not known


@dataclasses.dataclass(frozen=True)
class Slide:
    """The photographs of one slide folder."""

    name: str
    accession: str
    label: int  # 0 benign, 1 malignant
    images: dict[Magnification, tuple[Path, ...]]  # sorted; magnifications without any are not in it
    nesting: Nesting  # of its photographs

    @property
    def num_composites(self) -> int:
        """Images of the magnification with most."""
        return max(map(len, self.images.values()))


def slides_of(images: list[Image], nesting: Nesting) -> list[Slide]:
    """The slides of images, sorted by name, each with what is known of its own photographs."""
    grouped: dict[str, dict[Magnification, list[Path]]] = defaultdict(lambda: defaultdict(list))
    first: dict[str, Image] = {}
    for image in sorted(images):
        grouped[image.name.slide][image.name.magnification].append(image.path)
        first[image.name.slide] = image
    slides = []
    for name, own in sorted(grouped.items()):
        photographs = {m: tuple(own[m]) for m in MAGNIFICATIONS if m in own}
        slide = Slide(name, first[name].name.accession, first[name].name.label, photographs, {})
        slides.append(dataclasses.replace(slide, nesting=own_places(slide, nesting)))
    return slides


def own_places(slide: Slide, nesting: Nesting) -> Nesting:
    """The places of a slide's photographs in its own: one of another slide, or of one left out, must not come in by a place."""
    paths = {path for some in slide.images.values() for path in some}
    return {path: nesting[path] for path in sorted(paths) if path in nesting and nesting[path].parent in paths}


def new_slides(folder: Path) -> tuple[list[Slide], list[str]]:
    """The slides of PATIENT/SLIDE/40X/*.png whose diagnosis is not known, sorted by name; and the files that are none of them.

    Labels are 0 and mean nothing. Raises a data error where no PNG lies like that.
    """
    if not folder.is_dir():
        raise config_error(f"--input: {folder}: no such folder")
    grouped: dict[Path, dict[Magnification, list[Path]]] = defaultdict(lambda: defaultdict(list))
    of = {f"{m}X": m for m in MAGNIFICATIONS}
    ignored = []
    for path in files_below(folder):
        inside = path.relative_to(folder).parts
        if image_name(path.name) is not None:
            raise data_error(
                f"--input: {path}: is named as BreakHis' files are; give the folder above benign/ and malignant/, so that the "
                "accession is known"
            )
        if len(inside) == 4 and inside[-2].upper() in of and path.suffix.lower() == ".png":
            grouped[path.parents[1].relative_to(folder)][of[inside[-2].upper()]].append(path)
        else:
            ignored.append(str(path.relative_to(folder)))
    if not grouped:
        seen = f"; it holds {', '.join(ignored[:3])} and so on" if ignored else ""
        raise data_error(f"--input: {folder}: no PNG in it lies as PATIENT/SLIDE/40X/*.png (or 100X, 200X, 400X){seen}")
    slides = [
        Slide(str(place), place.parts[0], 0, {m: tuple(own[m]) for m in MAGNIFICATIONS if m in own}, {})
        for place, own in sorted(grouped.items())
    ]
    return slides, ignored


@dataclasses.dataclass
class Album:
    """Reads images at one size and of one stain; keeps what it read where asked to."""

    size: tuple[int, int]  # y, x
    normalisation: Literal["none", "macenko", "reinhard"]
    keeps: bool
    kept: dict[Path, Bytes]

    @classmethod
    def of(cls, config: Config) -> "Album":
        return cls(config.data.image_size, config.data.normalisation, config.data.use_cache, {})

    def read(self, path: Path) -> Bytes:
        """RGB bytes (y, x, 3); a data error names a file that is no image."""
        if path in self.kept:
            return self.kept[path]
        pixels = read_picture(path)
        if pixels.shape[:2] != self.size:
            across = (self.size[1], self.size[0])
            pixels = np.asarray(Pictures.fromarray(pixels).resize(across, Pictures.Resampling.BILINEAR))
        pixels = normalised(pixels, self.normalisation)
        if self.keeps:
            self.kept[path] = pixels
        return pixels


def normalised(pixels: Bytes, normalisation: str) -> Bytes:
    """RGB bytes (y, x, 3) with their stain normalised."""
    if normalisation == "none":
        return pixels
    brightness = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)[None]
    mapped = macenko(brightness) if normalisation == "macenko" else reinhard(brightness)
    found: Bytes = (255 * mapped[0]).round().byte().permute(1, 2, 0).numpy()
    return found
