"""Composites: a photograph of each magnification of one slide, one inside the other where that is known.

In training a composite is drawn around a photograph; to judge, every photograph is in at least one, and a slide has about as
many composites as photographs at its most photographed magnification. What is not known to lie inside anything stands beside
what is left.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np

from histo_mmnet.names import MAGNIFICATIONS, Magnification
from histo_mmnet.slides import Slide

Paths = tuple[Path | None, ...]  # a slot per magnification, or of a bag a slot per photograph
SLOTS = tuple(range(len(MAGNIFICATIONS)))


@dataclasses.dataclass(frozen=True)
class Composite:
    """One composite to judge, or a bag of all photographs of a patient."""

    slide: Slide  # of a bag the first one
    paths: Paths
    magnification: tuple[int, ...]  # of each slot, its place in MAGNIFICATIONS


def chains(slide: Slide, magnifications: tuple[Magnification, ...]) -> list[dict[int, Path]]:
    """Photographs one inside the other, by slot; each that no other lies in begins one, finest first."""
    there = {path: slot for slot, m in enumerate(MAGNIFICATIONS) if m in magnifications and m in slide.images
             for path in slide.images[m]}  # fmt: skip
    inner = {place.parent for path, place in slide.nesting.items() if path in there}
    found = []
    for path in sorted(there, key=lambda path: (-there[path], path)):
        if path in inner:
            continue
        chain = {there[path]: path}
        while path in slide.nesting and slide.nesting[path].parent in there:
            path = slide.nesting[path].parent
            chain[there[path]] = path
        found.append(chain)
    return found


def all_composites(slides: list[Slide], magnifications: tuple[Magnification, ...]) -> list[Composite]:
    """Composites that show every photograph of the magnifications.

    Each holds a chain of nested photographs; empty slots are filled by the next chains that fit, then by photographs of the
    slot's magnification in turn.
    """
    composites = []
    for slide in slides:
        left, turn = chains(slide, magnifications), dict.fromkeys(MAGNIFICATIONS, 0)
        while left:
            shown = left.pop(0)
            for chain in tuple(left):
                if not shown.keys() & chain.keys():
                    shown |= chain
                    left.remove(chain)
            for slot, m in enumerate(MAGNIFICATIONS):
                if slot not in shown and m in magnifications and m in slide.images:
                    shown[slot] = slide.images[m][turn[m] % len(slide.images[m])]
                    turn[m] += 1
            paths = (shown[slot] if slot in shown else None for slot in range(len(MAGNIFICATIONS)))
            composites.append(Composite(slide, tuple(paths), SLOTS))
    return composites


def bag_of(slides: list[Slide], magnifications: tuple[Magnification, ...]) -> list[Composite]:
    """All photographs of slides as one bag, coarse ones first; none where there is no photograph of the magnifications."""
    shown = [
        (path, slot) for slot, m in enumerate(MAGNIFICATIONS) if m in magnifications
        for slide in slides if m in slide.images for path in slide.images[m]
    ]  # fmt: skip
    return [Composite(slides[0], tuple(p for p, _ in shown), tuple(slot for _, slot in shown))] if shown else []


def drawn_bag(
    slides: list[Slide], shown: list[Magnification], size: int, random: np.random.Generator
) -> tuple[Paths, tuple[int, ...]]:
    """So many photographs of a patient's slides at random, with their magnifications' places; all, where there are fewer."""
    [bag] = bag_of(slides, tuple(shown))
    chosen = sorted(random.permutation(len(bag.paths))[:size].tolist())
    return tuple(bag.paths[k] for k in chosen), tuple(bag.magnification[k] for k in chosen)


def drawn(slide: Slide, shown: list[Magnification], random: np.random.Generator) -> Paths:
    """Photographs around one that is drawn: what it lies in, what lies in it, and others at random where nothing does."""
    inside: dict[Path, list[Path]] = defaultdict(list)
    for path, place in sorted(slide.nesting.items()):
        inside[place.parent].append(path)
    start = shown[int(random.integers(len(shown)))]
    chosen: dict[Magnification, Path] = {}
    first = MAGNIFICATIONS.index(start)
    outer: Path | None = _any(slide.images[start], random)
    for m in MAGNIFICATIONS[first::-1]:
        if outer is None:
            break
        chosen[m] = outer
        outer = slide.nesting[outer].parent if outer in slide.nesting else None
    for m in MAGNIFICATIONS[first + 1 :]:
        found = inside[chosen[MAGNIFICATIONS[MAGNIFICATIONS.index(m) - 1]]]
        if not found:
            break
        chosen[m] = _any(tuple(found), random)
    return tuple(
        None if m not in shown else chosen[m] if m in chosen else _any(slide.images[m], random) for m in MAGNIFICATIONS
    )


def _any(paths: tuple[Path, ...], random: np.random.Generator) -> Path:
    return paths[int(random.integers(len(paths)))]
