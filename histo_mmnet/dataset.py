"""Batches of composites, or of bags of a patient's photographs: the endless stream to train on.

In training, item p is the p-th draw of the run: class by a fair coin, slide by its number of photographs, and
photographs around one of them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError, data_error
from common.streams import random_for
from histo_mmnet.composites import SLOTS, Paths, drawn, drawn_bag
from histo_mmnet.names import Magnification
from histo_mmnet.slides import Album, Slide


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


def stacked(paths: Paths, magnification: tuple[int, ...], album: Album, label: int, index: int) -> Batch:
    """A batch of one composite or bag; an empty slot where a path is None."""
    images = torch.zeros(1, len(paths), 3, *album.size, dtype=torch.uint8)
    for slot, path in enumerate(paths):
        if path is not None:
            images[0, slot] = torch.from_numpy(np.ascontiguousarray(album.read(path).transpose(2, 0, 1)))
    present = torch.tensor([[path is not None for path in paths]])
    return Batch(images, torch.tensor([magnification]), present, torch.tensor([label]), torch.tensor([index]))


@dataclasses.dataclass(frozen=True)
class CompositeStream(Dataset[Batch | UserError]):
    """Item p is the p-th composite that a run ever sees; endless."""

    slides: list[Slide]
    magnifications: tuple[Magnification, ...]  # that are looked at; the others' slots stay empty
    album: Album
    missing_view: float
    bag: int  # photographs of a patient; 0 = composites of a slide instead
    seed: int

    def draw(self, position: int) -> tuple[Slide, Paths, tuple[int, ...]]:
        """The slide, the photographs and their magnifications' places: a pure function of the position and the seed."""
        random = random_for("composite", self.seed, position)
        label = int(random.integers(2))
        slides = self.usable(label)
        weights = np.array([slide.num_composites for slide in slides], float)
        slide = slides[int(random.choice(len(slides), p=weights / weights.sum()))]
        there = [m for m in self.magnifications if m in slide.images]
        shown = [m for m in there if random.random() >= self.missing_view] or [there[int(random.integers(len(there)))]]
        if self.bag:
            of_patient = [own for own in slides if own.accession == slide.accession]
            return slide, *drawn_bag(of_patient, shown, self.bag, random)
        return slide, drawn(slide, shown, random), SLOTS

    def usable(self, label: int) -> list[Slide]:
        """Slides of a class with a photograph that is looked at."""
        found = [s for s in self.slides if s.label == label and any(m in s.images for m in self.magnifications)]
        if not found:
            raise data_error(f"training: no slide of class {label} has images at {self.magnifications}")
        return found

    def name(self, position: int) -> str:
        """The photographs of a position in words."""
        _, paths, _ = self.draw(position)
        return f"composite {position} ({', '.join(path.name for path in paths if path is not None)})"

    def __getitem__(self, position: int) -> Batch | UserError:
        try:
            slide, paths, magnification = self.draw(position)
            return stacked(paths, magnification, self.album, slide.label, position)
        except UserError as error:
            return error  # as an item: a worker process would wrap what it raises in a traceback


def stack(items: list[Batch | UserError]) -> Batch | UserError:
    """Batches one behind the other, bags filled up with empty slots; the first error, if there is one."""
    for item in items:
        if isinstance(item, UserError):
            return item
    batches = [item for item in items if isinstance(item, Batch)]
    slots = max(batch.present.shape[1] for batch in batches)
    filled = [batch.mapped(lambda part: with_slots(part, slots)) for batch in batches]
    return Batch(*(torch.cat([getattr(batch, f.name) for batch in filled]) for f in dataclasses.fields(Batch)))


def with_slots(part: Tensor, slots: int) -> Tensor:
    """A part of a batch (B, S, ...) with so many slots, the new ones 0; a part without slots (B,) as it is."""
    if part.dim() == 1 or part.shape[1] == slots:
        return part
    return torch.cat([part, part.new_zeros(len(part), slots - part.shape[1], *part.shape[2:])], 1)
