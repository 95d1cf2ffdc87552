"""The constants of the simulated chest CTs, with units and reasons, and what makes a value impossible."""

import dataclasses
from collections.abc import Iterator

from common.config import LARGEST_INT, outside

Range = tuple[float, float]  # lowest and highest value of a uniform draw
Whole = tuple[int, int]  # the same of whole numbers

LABELS = ("condensacion", "nodulos", "quistes")  # consolidation, nodules, cysts: the columns of labels.csv
CLASSES = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1))  # by class id

RANGES = ("consolidation_radius_mm", "nodule_radius_mm", "cyst_radius_mm", "consolidation_hu", "half_width_mm", "half_depth_mm",
          "lung_height_mm", "fat_mm", "lung_hu", "vessel_scale", "noise_hu", "blur_mm", "slice_mm", "pixel_mm")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CtPhantom:
    """Chests of patients with several studies each; a study shows consolidation, nodules, cysts, several of them or none."""

    seed: int = 0
    patients: int = 120
    studies: Whole = (1, 3)  # of a patient, fewest and most
    class_weights: tuple[float, ...] = (4, 2, 2, 2, 1, 1, 1, 1)  # of CLASSES; half of all are of one finding or none
    changes: float = 0.3  # probability that a patient's later study is of another class than the one before
    unknown_share: float = 0.05  # of single labels that the table does not know (9)

    # what is told apart
    consolidation_radius_mm: Range = (16, 34)  # of one to three ragged patches
    nodule_radius_mm: Range = (4.5, 10)  # of two to six
    cyst_radius_mm: Range = (5, 12)  # of six to sixteen, thin-walled
    consolidation_hu: Range = (-100, 50)

    # what differs and tells nothing
    half_width_mm: Range = (145, 185)  # of the body
    half_depth_mm: Range = (92, 125)
    lung_height_mm: Range = (190, 250)
    fat_mm: Range = (6, 26)  # below the skin
    lung_hu: Range = (-880, -800)
    vessel_scale: Range = (0.8, 1.35)  # thick vessels look like nodules where they end
    turn_degrees: float = 6.0  # of a patient on the table, at most, about each axis
    shift_mm: float = 25.0  # of the patient from the middle of the field, at most
    noise_hu: Range = (8, 35)
    blur_mm: Range = (0.8, 1.8)  # of the reconstruction kernel

    # the scanner's grid
    slice_mm: Range = (2.0, 4.0)
    pixel_mm: Range = (2.4, 3.2)
    shape: tuple[int, int] = (144, 144)  # y, x

    def problems(self) -> Iterator[str]:
        """One line per impossible value."""
        yield from outside(self, {"seed": (0, LARGEST_INT), "patients": (4, 10**5), "changes": (0, 1),
                                  "unknown_share": (0, 0.9), "shape": (16, 1024)})  # fmt: skip
        if not 1 <= self.studies[0] <= self.studies[1] <= 50:
            yield f"studies: expected 1 <= fewest <= most <= 50, got {list(self.studies)}"
        if len(self.class_weights) != len(CLASSES) or min(self.class_weights) < 0 or not sum(self.class_weights):
            yield f"class_weights: expected {len(CLASSES)} weights, not all 0, got {list(self.class_weights)}"
        for name in RANGES:
            low, high = getattr(self, name)
            if not low <= high or (not name.endswith("_hu") and low <= 0):
                yield f"{name}: expected lowest <= highest, of lengths above 0, got {[low, high]}"
