"""Which photograph lies inside which: a field, made smaller, slid over the photographs of the next coarser magnification.

Normalised cross-correlation (Lewis 1995) of each colour channel and their mean: no gain or offset of a channel changes it. A
field of a slide may have been taken inside no other photograph, so a best place counts only from LEAST_SCORE on.
"""

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import parsing, read_text, write_text
from common.logbook import progress
from histo_mmnet.names import MAGNIFICATIONS
from histo_mmnet.scan import Image
from histo_mmnet.slides import Album, Nesting, Place, Slide

LEAST_SCORE = 0.7  # correlation; fields cut from other slides reach 0.6, true ones 0.8 and more
COLUMNS = ("file", "inside", "y", "x", "score")
FLAT = 1e-6  # variance of a channel, brightness 0..1, below which it says nothing


def box_sums(x: Tensor, height: int, width: int) -> Tensor:
    """Sums over all windows: (..., Y, X) -> (..., Y - height + 1, X - width + 1)."""
    total = torch.nn.functional.pad(x.cumsum(-2).cumsum(-1), (1, 0, 1, 0))
    below, above = total[..., height:, :], total[..., :-height, :]
    return below[..., width:] - below[..., :-width] - above[..., width:] + above[..., :-width]


def correlations(fields: Tensor, parents: Tensor) -> Iterator[Tensor]:
    """Of each field (m, 3, h, w) the normalised cross-correlation with all its places in parents (n, 3, Y, X).

    Yields (n, Y-h+1, X-w+1), the mean over channels; channels of no variance, of the field or at a place, count as 0.
    """
    (height, width), size = fields.shape[2:], parents.shape[2:]
    mean, square = (box_sums(values, height, width) / (height * width) for values in (parents, parents.square()))
    spectrum, variance = torch.fft.rfft2(parents), square - mean.square()
    for field in fields - fields.mean((2, 3), keepdim=True):
        product = torch.fft.irfft2(spectrum * torch.fft.rfft2(field, size).conj(), size)
        product = product[..., : size[0] - height + 1, : size[1] - width + 1] / (height * width)
        both = variance * field.square().mean((1, 2))[:, None, None]
        yield torch.where(both > FLAT**2, product / both.clamp(min=FLAT**2).sqrt(), 0.0).mean(1)


def peak(scores: Tensor) -> tuple[float, float, float]:
    """The highest of scores (Y, X) and its place y, x, between pixels by a parabola through its neighbours."""
    at = [int(k) for k in np.unravel_index(int(scores.argmax()), scores.shape)]
    place = []
    for axis, number in enumerate(at):
        line = scores.select(1 - axis, at[1 - axis])
        shift = 0.0
        if 0 < number < len(line) - 1:
            before, here, after = line[number - 1 : number + 2].tolist()
            bend = before - 2 * here + after
            shift = 0.5 * (before - after) / bend if bend < 0 else 0.0
        place.append(number + shift)
    return float(scores[at[0], at[1]]), place[0], place[1]


def as_fields(images: Tensor, share: float) -> Tensor:
    """Images (n, 3, y, x) as they look at a coarser magnification, whose fields are 1 / share as wide."""
    size = [max(1, round(share * edge)) for edge in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def pixels_of(paths: tuple[Path, ...], album: Album) -> Tensor:
    """Images (n, 3, y, x), brightness 0..1 in double precision: sums of squares lose nothing."""
    return torch.from_numpy(np.stack([album.read(path) for path in paths])).permute(0, 3, 1, 2).double() / 255


def places_in(fine: tuple[Path, ...], coarse: tuple[Path, ...], share: float, album: Album) -> Nesting:
    """Each finer photograph that lies in a coarser one, `share` as wide as it, and where."""
    found: Nesting = {}
    scored = correlations(as_fields(pixels_of(fine, album), share), pixels_of(coarse, album))
    for path, scores in zip(fine, scored, strict=True):
        number = int(scores.flatten(1).amax(1).argmax())
        score, y, x = peak(scores[number])
        if score >= LEAST_SCORE:
            found[path] = Place(coarse[number], y, x, score)
    return found


def nesting_of(slides: list[Slide], album: Album) -> Nesting:
    """Each photograph with the next coarser one of its slide that it lies in, where one is found."""
    found: Nesting = {}
    for slide in progress(slides, "finding nested fields", len(slides), True):
        for coarse, fine in itertools.pairwise(MAGNIFICATIONS):
            if coarse in slide.images and fine in slide.images:
                found |= places_in(slide.images[fine], slide.images[coarse], coarse / fine, album)
    return found


def write_nesting(path: Path, nesting: Nesting) -> None:
    """A table that read_nesting reads, by names of files."""
    rows = [
        f"{file.name},{place.parent.name},{place.y:.2f},{place.x:.2f},{place.score:.4f}"
        for file, place in sorted(nesting.items())
    ]
    write_text(path, "\n".join([",".join(COLUMNS), *rows]) + "\n")


def read_nesting(path: Path, images: list[Image]) -> Nesting:
    """The nesting of images; rows of other images are left alone. Raises a data error where the table is damaged."""
    of = {image.name.file: image.path for image in images}
    found: Nesting = {}
    with parsing(path, "delete it; it is made anew"):
        rows = csv.DictReader(io.StringIO(read_text(path)), strict=True)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"columns {rows.fieldnames}")
        for row in rows:
            if row["file"] in of and row["inside"] in of:
                numbers = (float(row[name]) for name in COLUMNS[2:])
                found[of[row["file"]]] = Place(of[row["inside"]], *numbers)
    return found
