"""BreakHis' names: what a file's and a folder's name say of an image (Spanhol et al. 2016, doi 10.1109/TBME.2015.2496264).

    SOB_B_TA-14-4659-40-001.png lies in .../benign/SOB/tubular_adenoma/SOB_B_TA_14-4659/40X/

biopsy method, tumour class, subtype, year, number of the accession with the letters of a slide, magnification, sequence.
Letters behind the number tell slides of one accession apart: 14-22549AB, 14-22549CD and 14-22549G are of one patient.
"""

import dataclasses
import re
from typing import Literal

Magnification = Literal[40, 100, 200, 400]
MAGNIFICATIONS: tuple[Magnification, ...] = (40, 100, 200, 400)  # of objective and ocular together
CLASSES = {"B": "benign", "M": "malignant"}
SUBTYPES = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
SUBTYPES_OF = {"B": ("A", "F", "PT", "TA"), "M": ("DC", "LC", "MC", "PC")}
FILE = re.compile(
    r"(?P<method>SOB|CNB)_(?P<tumour>[BM])_(?P<subtype>A|F|PT|TA|DC|LC|MC|PC)-(?P<year>\d\d)-(?P<number>\d+)"
    r"(?P<suffix>[A-Z]*)-(?P<magnification>40|100|200|400)-(?P<sequence>\d{3})"
)


@dataclasses.dataclass(frozen=True, order=True)
class ImageName:
    """The parts of an image's name; names are ordered by slide, magnification and sequence."""

    method: str  # SOB: excision; CNB: core needle
    tumour: str  # B benign, M malignant
    subtype: str  # of SUBTYPES
    year: str  # two digits
    number: int  # of the accession within its year
    suffix: str  # letters of the slide; "" where the accession has one
    magnification: Magnification
    sequence: int

    @property
    def label(self) -> int:
        """0 benign, 1 malignant."""
        return int(self.tumour == "M")

    @property
    def slide(self) -> str:
        """The slide folder's name, SOB_B_TA_14-4659."""
        return f"{self.method}_{self.tumour}_{self.subtype}_{self.year}-{self.number}{self.suffix}"

    @property
    def accession(self) -> str:
        """Year and number without the slide's letters, 14-4659: one patient's specimen."""
        return f"{self.year}-{self.number}"

    @property
    def file(self) -> str:
        """The file's name."""
        case = f"{self.method}_{self.tumour}_{self.subtype}-{self.year}-{self.number}{self.suffix}"
        return f"{case}-{self.magnification}-{self.sequence:03d}.png"

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders it lies in, from the class down."""
        return CLASSES[self.tumour], self.method, SUBTYPES[self.subtype], self.slide, f"{self.magnification}X"


def image_name(file: str) -> ImageName | None:
    """The parts of a file's name; None where it is no such name."""
    found = FILE.fullmatch(file.removesuffix(".png"))
    if found is None or found["subtype"] not in SUBTYPES_OF[found["tumour"]]:
        return None
    magnification = MAGNIFICATIONS[[str(m) for m in MAGNIFICATIONS].index(found["magnification"])]
    return ImageName(
        found["method"], found["tumour"], found["subtype"], found["year"], int(found["number"]), found["suffix"],
        magnification, int(found["sequence"]),
    )  # fmt: skip
