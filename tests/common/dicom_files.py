"""DICOM series that tests write: slices of a known volume at given places."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pydicom = pytest.importorskip("pydicom")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


@dataclasses.dataclass(frozen=True)
class Stack:
    """What the files of a series share."""

    series: str
    study: str
    patient: str
    spacing_mm: tuple[float, float]  # y, x
    along_x: tuple[float, float, float]  # DICOM's x, y, z
    along_y: tuple[float, float, float]
    thickness_mm: float
    slope: float
    intercept: float


AXIAL = Stack("1.2.3", "1.2", "P1", (2.0, 2.0), (1, 0, 0), (0, 1, 0), 3.0, 1.0, -1024.0)


def write_slice(
    path: Path, units: npt.NDArray[np.floating], position: tuple[float, float, float], stack: Stack, **others: Any
) -> None:
    """One image of Hounsfield units (y, x), its first pixel at x, y, z; others: attributes to set or, None, to leave out."""
    stored = np.round((units - stack.intercept) / stack.slope).astype("<i2")
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = EXPLICIT
    file.file_meta.MediaStorageSOPClassUID = CT_IMAGE
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path)])
    values = {
        "SOPClassUID": CT_IMAGE, "Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PatientID": stack.patient,
        "StudyInstanceUID": stack.study, "SeriesInstanceUID": stack.series, "Rows": stored.shape[0],
        "Columns": stored.shape[1], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
        "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "RescaleSlope": stack.slope,
        "RescaleIntercept": stack.intercept, "PixelSpacing": list(stack.spacing_mm), "SliceThickness": stack.thickness_mm,
        "ImagePositionPatient": list(position), "ImageOrientationPatient": [*stack.along_x, *stack.along_y],
    } | others  # fmt: skip
    for name, value in values.items():
        if value is not None:
            setattr(file, name, value)
    if "PixelData" not in others:
        file.PixelData = stored.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def write_series(
    folder: Path, volume: npt.NDArray[np.floating], places_mm: npt.NDArray[np.floating], stack: Stack, **others: Any
) -> None:
    """Slices [z, y, x] at places along z; the names of the files say nothing of their order."""
    order = np.random.default_rng(0).permutation(len(volume))
    for number, k in enumerate(order):
        write_slice(folder / f"{number:03d}.dcm", volume[k], (0.0, 0.0, float(places_mm[k])), stack, **others)


def ramp(z: npt.NDArray[np.floating], shape: tuple[int, int]) -> npt.NDArray[np.floating]:
    """A volume whose Hounsfield units are linear in place, so that linear interpolation is exact: 3 z + 2 y - x - 500."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.asarray(3.0 * np.asarray(z)[:, None, None] + 2 * y - x - 500.0, float)
