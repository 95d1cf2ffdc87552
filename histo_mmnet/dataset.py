"""Composites: four photographs of one slide, one per magnification; drawn at random to train on, all of them to judge.

In training, item p is the p-th draw of the run: class by a fair coin, slide by its number of photographs, one photograph of
each magnification. To validate and test, a slide has as many composites as photographs at its most photographed
magnification, and every photograph is in at least one.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as Pictures
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError, data_error
from common.streams import random_for
from histo_mmnet.colours import read_picture
from histo_mmnet.config import Config
from histo_mmnet.names import MAGNIFICATIONS, Magnification
from histo_mmnet.scan import Image
from histo_mmnet.stain import macenko, reinhard

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Slide:
    """The photographs of one slide folder."""

    name: str
    accession: str
    label: int  # 0 benign, 1 malignant
    images: dict[Magnification, tuple[Path, ...]]  # sorted; magnifications without any are not in it

    @property
    def num_composites(self) -> int:
        """Images of the magnification with most."""
        return max(map(len, self.images.values()))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Composites, stacked."""

    images: Tensor  # (B, S, 3, y, x) uint8; of an empty slot: 0
    magnification: Tensor  # (B, S) int64, place in MAGNIFICATIONS
    present: Tensor  # (B, S) bool
    label: Tensor  # (B,) int64
    index: Tensor  # (B,) int64: position in the run, or the composite's number

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(change(getattr(self, field.name)) for field in dataclasses.fields(self)))


def slides_of(images: list[Image]) -> list[Slide]:
    """The slides of images, sorted by name."""
    grouped: dict[str, dict[Magnification, list[Path]]] = defaultdict(lambda: defaultdict(list))
    first: dict[str, Image] = {}
    for image in sorted(images):
        grouped[image.name.slide][image.name.magnification].append(image.path)
        first[image.name.slide] = image
    return [
        Slide(
            name,
            first[name].name.accession,
            first[name].name.label,
            {m: tuple(own[m]) for m in MAGNIFICATIONS if m in own},
        )
        for name, own in sorted(grouped.items())
    ]


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


def stacked(paths: list[Path | None], album: Album, label: int, index: int) -> Batch:
    """A batch of one composite, a slot per magnification, None where there is no photograph."""
    images = torch.zeros(1, len(paths), 3, *album.size, dtype=torch.uint8)
    for slot, path in enumerate(paths):
        if path is not None:
            images[0, slot] = torch.from_numpy(np.ascontiguousarray(album.read(path).transpose(2, 0, 1)))
    present = torch.tensor([[path is not None for path in paths]])
    return Batch(images, torch.arange(len(paths))[None], present, torch.tensor([label]), torch.tensor([index]))


@dataclasses.dataclass(frozen=True)
class CompositeStream(Dataset[Batch | UserError]):
    """Item p is the p-th composite that a run ever sees; endless."""

    slides: list[Slide]
    magnifications: tuple[Magnification, ...]  # that are looked at; the others' slots stay empty
    album: Album
    missing_view: float
    seed: int

    def draw(self, position: int) -> tuple[Slide, list[Path | None]]:
        """The slide and the photographs of a position: a pure function of it and of the seed."""
        random = random_for("composite", self.seed, position)
        label = int(random.integers(2))
        slides = self.usable(label)
        weights = np.array([slide.num_composites for slide in slides], float)
        slide = slides[int(random.choice(len(slides), p=weights / weights.sum()))]
        there = [m for m in self.magnifications if m in slide.images]
        shown = [m for m in there if random.random() >= self.missing_view] or [there[int(random.integers(len(there)))]]
        paths: list[Path | None] = []
        for magnification in MAGNIFICATIONS:
            own = slide.images[magnification] if magnification in shown else ()
            paths.append(own[int(random.integers(len(own)))] if own else None)
        return slide, paths

    def usable(self, label: int) -> list[Slide]:
        """Slides of a class with a photograph that is looked at."""
        found = [s for s in self.slides if s.label == label and any(m in s.images for m in self.magnifications)]
        if not found:
            raise data_error(f"training: no slide of class {label} has images at {self.magnifications}")
        return found

    def name(self, position: int) -> str:
        """The photographs of a position in words."""
        _, paths = self.draw(position)
        return f"composite {position} ({', '.join(path.name for path in paths if path is not None)})"

    def __getitem__(self, position: int) -> Batch | UserError:
        try:
            slide, paths = self.draw(position)
            return stacked(paths, self.album, slide.label, position)
        except UserError as error:
            return error  # as an item: a worker process would wrap what it raises in a traceback


@dataclasses.dataclass(frozen=True)
class Composite:
    """One composite to judge."""

    slide: Slide
    paths: tuple[Path | None, ...]  # a slot per magnification


def all_composites(slides: list[Slide], magnifications: tuple[Magnification, ...]) -> list[Composite]:
    """Composites that show every photograph of the magnifications; the i-th has each magnification's i-th, or begins anew."""
    composites = []
    for slide in slides:
        counts = {m: len(slide.images[m]) for m in magnifications if m in slide.images}
        for number in range(max(counts.values(), default=0)):
            paths = (slide.images[m][number % counts[m]] if m in counts else None for m in MAGNIFICATIONS)
            composites.append(Composite(slide, tuple(paths)))
    return composites


@dataclasses.dataclass(frozen=True)
class CompositeList(Dataset[Batch | UserError]):
    """Composites to judge, in order."""

    composites: list[Composite]
    album: Album

    def __len__(self) -> int:
        return len(self.composites)

    def __getitem__(self, index: int) -> Batch | UserError:
        try:
            composite = self.composites[index]
            return stacked(list(composite.paths), self.album, composite.slide.label, index)
        except UserError as error:
            return error


def stack(items: list[Batch | UserError]) -> Batch | UserError:
    """Batches one behind the other; the first error, if there is one."""
    for item in items:
        if isinstance(item, UserError):
            return item
    batches = [item for item in items if isinstance(item, Batch)]
    return Batch(*(torch.cat([getattr(batch, f.name) for batch in batches]) for f in dataclasses.fields(Batch)))
