"""Whether what is tested was seen in training: shared patients, the same picture twice, and what colour gives away."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Pictures

from common.logbook import progress
from histo_mmnet.colours import Floats, colour_numbers, nearest, read_picture, standardised
from histo_mmnet.names import ImageName
from histo_mmnet.splits import Trial, shared_units

THUMBNAIL = (24, 16)  # pixels across and down in which pictures are compared
NEAR = 0.9  # correlation of thumbnails; another size, light or compression keeps it above, other pictures are below 0.5
FLIPS = ((1, 1), (-1, 1), (1, -1), (-1, -1))  # steps along y and x: none, upside down, mirrored, both
ROWS = 512  # of a table of pairs held at once
TOLD = 3  # examples of a finding


@dataclasses.dataclass(frozen=True, eq=False)
class Pictured:
    """What the audit keeps of the images that are there, one entry per image."""

    names: list[ImageName]
    digests: list[str]  # of the pixels, whatever the file's compression
    thumbnails: npt.NDArray[
        np.float32
    ]  # (n, 4, 384), mean 0 and length 1 each, once per flip; 0 where nothing is in it
    colours: Floats  # (n, 18), standardised


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked for in one trial, in words; a leak where test images can be known from training."""

    words: str
    is_leak: bool


def pictured(paths: dict[ImageName, Path]) -> Pictured:
    """Read every image once."""
    names = sorted(paths)
    digests, thumbnails, colours = [], [], []
    for name in progress(names, "looking at images", len(names), True):
        pixels = read_picture(paths[name])
        digests.append(hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest())
        thumbnails.append(thumbnail(pixels))
        colours.append(colour_numbers(pixels))
    table = standardised(np.array(colours)) if names else np.zeros((0, 18))
    return Pictured(names, digests, np.array(thumbnails, np.float32).reshape(len(names), len(FLIPS), -1), table)


def thumbnail(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Grey values of an image (height, width, 3) at THUMBNAIL's size as unit vectors, one per flip (4, 384)."""
    picture = Pictures.fromarray(pixels).convert("L").resize(THUMBNAIL, Pictures.Resampling.BOX)
    grey = np.asarray(picture, np.float32)
    grey = grey - grey.mean()
    length = float(np.linalg.norm(grey))
    grey = grey / length if length > 1 else np.zeros_like(grey)  # of an empty field only noise is left
    return np.stack([grey[::down, ::across].ravel() for down, across in FLIPS])


def audit(trial: Trial, pictures: Pictured | None) -> list[Finding]:
    """All findings of one trial; without pictures those that names give."""
    tested = trial.of("test")
    findings = [finding_of_units(trial), *findings_of_validation(trial)]
    if pictures is None:
        return findings
    number = {name: at for at, name in enumerate(pictures.names)}
    test = [number[name] for name in tested if name in number]
    seen = [number[name] for name in (*trial.of("train"), *trial.of("val")) if name in number]
    if not test or not seen:
        return [*findings, Finding(f"no pictures on both sides: {len(test)} of test, {len(seen)} others", False)]
    return [*findings, *findings_of_copies(pictures, test, seen), finding_of_colour(pictures, test, seen)]


def finding_of_units(trial: Trial) -> Finding:
    """Accessions on both sides."""
    shared, tested = shared_units(trial, "accession"), trial.of("test")
    images = sum(map(len, shared.values()))
    if not shared:
        return Finding(f"no accession of {len({name.accession for name in tested})} tested is trained on", False)
    share = f"{images} of {len(tested)} test images ({100 * images / len(tested):.0f} %)"
    return Finding(f"{len(shared)} accessions on both sides, {share}: {listed(sorted(shared))}", True)


def findings_of_validation(trial: Trial) -> list[Finding]:
    """Accessions that validate and are trained on: thresholds and the best epoch would be those of seen patients."""
    validating = {name.accession for name in trial.of("val")}
    shared = sorted(validating & {name.accession for name in trial.of("train")})
    if not validating:
        return []
    if not shared:
        return [Finding(f"no accession of {len(validating)} that validate is trained on", False)]
    return [Finding(f"{len(shared)} accessions both validate and are trained on: {listed(shared)}", True)]


def findings_of_copies(pictures: Pictured, test: list[int], seen: list[int]) -> list[Finding]:
    """Test images whose pixels, or nearly so, also stand on the other side."""
    trained = {pictures.digests[at]: at for at in seen}
    exact = [(at, trained[pictures.digests[at]]) for at in test if pictures.digests[at] in trained]
    known = {at for at, _ in exact}
    near = [(at, other) for at, other in near_copies(pictures, test, seen) if at not in known]
    findings = []
    for words, pairs in (("the same pixels", exact), ("nearly the same picture", near)):
        if pairs:
            told = listed([f"{pictures.names[a].file} = {pictures.names[b].file}" for a, b in pairs])
            findings.append(Finding(f"{words} on both sides: {len(pairs)} test images: {told}", True))
        else:
            findings.append(Finding(f"{words} on both sides: none of {len(test)} test images", False))
    return findings


def near_copies(pictures: Pictured, test: list[int], seen: list[int]) -> list[tuple[int, int]]:
    """Pairs (test, other) of images whose thumbnails agree, in any flip; the best other of each."""
    others, pairs = pictures.thumbnails[seen][:, 0], []
    for first in range(0, len(test), ROWS):
        own = test[first : first + ROWS]
        agreement = np.max([pictures.thumbnails[own][:, flip] @ others.T for flip in range(len(FLIPS))], 0)
        best = agreement.argmax(1)
        pairs += [(at, seen[b]) for at, b, row in zip(own, best, agreement, strict=True) if row[b] >= NEAR]
    return pairs


def finding_of_colour(pictures: Pictured, test: list[int], seen: list[int]) -> Finding:
    """How often the nearest neighbour by colour is of the same accession or class, beside chance."""
    allowed = np.ones((len(test), len(seen)), np.bool_)
    closest = nearest(pictures.colours[test], pictures.colours[seen], allowed)
    accession = np.array([name.accession for name in pictures.names])
    label = np.array([name.label for name in pictures.names])
    neighbour = np.array(seen)[closest]
    same = float((accession[neighbour] == accession[test]).mean())
    chance = float((accession[seen][None] == accession[test][:, None]).mean())
    balanced = balanced_accuracy(label[test], label[neighbour])
    return Finding(
        f"nearest by colour among the others: of the same accession {100 * same:.1f} % (chance {100 * chance:.1f} %); "
        f"its class is right with balanced accuracy {balanced:.3f} (chance 0.500, n = {len(test)})",
        False,
    )


def balanced_accuracy(labels: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> float:
    """The mean over the classes that occur of the share found right."""
    return float(np.mean([(found[labels == own] == own).mean() for own in np.unique(labels)]))


def listed(words: Iterable[str]) -> str:
    """The first few, and how many more."""
    chosen = list(words)
    more = f" and {len(chosen) - TOLD} more" if len(chosen) > TOLD else ""
    return ", ".join(chosen[:TOLD]) + more
