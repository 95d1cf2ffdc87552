"""The constants of the simulated breast histology, with units and reasons, and what makes a value impossible."""

import dataclasses
from collections.abc import Iterator

from common.config import LARGEST_INT, outside

Range = tuple[float, float]  # lowest and highest value of a uniform draw
Spread = tuple[float, float]  # mean and standard deviation of a normal draw


@dataclasses.dataclass(frozen=True)
class HistoPhantom:
    """Haematoxylin and eosin of benign and malignant breast tissue, photographed at four magnifications."""

    seed: int = 0
    benign_accessions: int = 35
    malignant_accessions: int = 45  # BreakHis: 16 and 54
    several_slides_share: float = 0.15  # of accessions with two or three slides; BreakHis: 10 of 70
    sites: tuple[int, int] = (2, 3)  # places of a slide that are photographed, fewest and most
    missing_share: float = 0.15  # of a site's four photographs that were not taken
    size: tuple[int, int] = (152, 232)  # pixels y, x; a third of BreakHis'
    field_micrometre: float = 175.0  # width of a photograph at 400X; 700 pixels of 0.25

    # What tells malignant from benign. Means overlap, and nuclei and glands are affected each by itself, as their grades are
    # (Elston & Ellis 1991): half of the malignant show the whole difference in their nuclei and `partial` of it in their
    # glands, the others the reverse. So no single cue decides.
    partial: float = 0.5
    nuclear_radius_micrometre: tuple[Spread, Spread] = ((3.0, 0.26), (3.65, 0.36))  # benign, malignant
    pleomorphism: tuple[Spread, Spread] = ((0.13, 0.03), (0.23, 0.05))  # deviation of log radius within a patient
    crowding: tuple[Spread, Spread] = ((1.0, 0.12), (1.25, 0.17))  # epithelial nuclei per area, of benign's mean
    disorder: tuple[Spread, Spread] = ((0.14, 0.06), (0.34, 0.11))  # of gland outlines, in shares of their radius

    # What tells patients apart and classes not
    haematoxylin_strength: Range = (0.6, 1.7)  # optical density of a nucleus where nuclei cover what they usually do
    compensation: float = 0.5  # stainers look at the whole: density falls with this power of what nuclei cover
    cover_factor: Range = (0.6, 1.5)  # of the subtype's share of epithelium, per accession
    eosin_strength: Range = (0.35, 0.85)  # optical density of full cytoplasm
    direction_deviation: float = 0.10  # of each stain's optical density per channel, from patient to patient
    white: Range = (0.86, 0.98)  # brightness of empty glass, per patient
    tint: float = 0.025  # deviation of its channels
    slide_deviation: float = 0.05  # of strengths from slide to slide, in shares
    defocus_pixel: Range = (0.35, 0.8)  # Gaussian blur of a photograph
    noise: Range = (0.004, 0.012)  # deviation of a photograph's brightness, of white = 1

    def problems(self) -> Iterator[str]:
        """One line per impossible value."""
        yield from outside(self, {"seed": (0, LARGEST_INT)})
        if min(self.benign_accessions, self.malignant_accessions) < 2:
            yield "benign_accessions, malignant_accessions: expected at least 2 of each, to train on one and test the other"
        if not 1 <= self.sites[0] <= self.sites[1] <= 200:
            yield f"sites: expected 1 <= fewest <= most <= 200, got {list(self.sites)}"
        if min(self.size) < 32 or max(self.size) > 2048:
            yield f"size: expected 32 to 2048 pixels, got {list(self.size)}"
        if not 0 <= self.missing_share <= 0.9 or not 0 <= self.several_slides_share <= 1:
            yield "missing_share, several_slides_share: expected shares, of missing ones at most 0.9"
        if not 0 <= self.partial <= 1:
            yield f"partial: expected a share, 0 to 1, got {self.partial:g}"
        for name in ("haematoxylin_strength", "eosin_strength", "cover_factor", "white", "defocus_pixel", "noise"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                yield f"{name}: expected 0 < lowest <= highest, got {low:g}, {high:g}"
        if self.white[1] > 1:
            yield f"white: expected brightness up to 1, got {self.white[1]:g}"
