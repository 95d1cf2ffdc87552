"""What DICOM files say of their images: where each lies, how its numbers become Hounsfield units, how it is packed.

pydicom parses; nothing here reads pixels. Positions and directions are patient coordinates in mm in the order z, y, x (towards
superior, posterior, left), DICOM's own x, y, z reversed.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.extras import extra_package

Vector = tuple[float, float, float]  # z, y, x
MAGIC = b"DICM"  # behind a preamble of 128 bytes
PIXEL_DATA = 0x7FE00010


@dataclasses.dataclass(frozen=True)
class Header:
    """One image: a file, or a frame of one."""

    path: Path
    frame: int
    series: str  # SeriesInstanceUID
    number: str  # SeriesNumber
    study: str
    patient: str  # PatientID, for grouping only: it goes into no output
    description: str
    modality: str
    sop_class: str
    image_type: tuple[str, ...]
    acquisition: str  # number of the acquisition or of the point in time
    instance: int | None  # InstanceNumber; it orders nothing
    shape: tuple[int, int]  # y, x
    position_mm: Vector | None  # of the first pixel's centre
    along_y: Vector | None  # unit vector of increasing row number
    along_x: Vector | None
    pixel_spacing_mm: tuple[float, float] | None  # y, x
    thickness_mm: float | None
    slope: float | None
    intercept: float | None
    padding: int | None  # stored value outside the field of view
    samples: int  # per pixel
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    photometric: str
    syntax: str  # transfer syntax UID


def read_headers(path: Path) -> list[Header] | str:
    """The images of a file, or why it holds none, in words."""
    pydicom = extra_package("pydicom", f"{path}: reading DICOM")
    with path.open("rb") as file:
        if file.read(132)[128:] != MAGIC:
            return "no DICOM file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are odd and do not matter here
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            return list(headers_of(path, dataset))
    except Exception as error:  # whatever a parser meets in damaged bytes is this file's fault, and is said
        return f"damaged header ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"


def headers_of(path: Path, dataset: Any) -> Iterator[Header]:
    """The images of a parsed file; none where it describes no rows and columns."""
    if "Rows" not in dataset or "Columns" not in dataset:
        return
    frames = int(value_of(dataset, "NumberOfFrames", 1) or 1)
    own = groups_of(dataset, "SharedFunctionalGroupsSequence")
    per_frame = dataset.PerFrameFunctionalGroupsSequence if "PerFrameFunctionalGroupsSequence" in dataset else []
    for frame in range(frames):
        places = [dataset, *own, *([per_frame[frame]] if frame < len(per_frame) else [])]
        yield header_of(path, frame, dataset, places)


def groups_of(dataset: Any, name: str) -> list[Any]:
    """The items of a sequence, none where it is missing."""
    return list(dataset[name].value) if name in dataset else []


def header_of(path: Path, frame: int, dataset: Any, places: list[Any]) -> Header:
    """One frame, described by the file and, in enhanced files, by groups of attributes; the last that knows one counts."""

    def attribute(name: str, group: str) -> Any:
        found = None
        for place in places:
            for item in (place, *groups_of(place, group)):
                if name in item and item[name].value not in (None, "", []):
                    found = item[name].value
        return found

    position = attribute("ImagePositionPatient", "PlanePositionSequence")
    orientation = attribute("ImageOrientationPatient", "PlaneOrientationSequence")
    spacing = attribute("PixelSpacing", "PixelMeasuresSequence")
    meta = dataset.file_meta
    return Header(
        path=path,
        frame=frame,
        series=str(value_of(dataset, "SeriesInstanceUID", "")),
        number=str(value_of(dataset, "SeriesNumber", "")),
        study=str(value_of(dataset, "StudyInstanceUID", "")),
        patient=str(value_of(dataset, "PatientID", "")),
        description=str(value_of(dataset, "SeriesDescription", "")).strip(),
        modality=str(value_of(dataset, "Modality", "")),
        sop_class=str(value_of(dataset, "SOPClassUID", "")),
        image_type=tuple(str(word).upper() for word in attribute("ImageType", "CTImageFrameTypeSequence") or ()),
        acquisition=str(value_of(dataset, "AcquisitionNumber", "")),
        instance=number_or_none(value_of(dataset, "InstanceNumber", None), int),
        shape=(int(dataset.Rows), int(dataset.Columns)),
        position_mm=reversed_vector(position, 0, 3),
        along_y=reversed_vector(orientation, 3, 6),
        along_x=reversed_vector(orientation, 0, 6),
        pixel_spacing_mm=(float(spacing[0]), float(spacing[1])) if spacing is not None and len(spacing) == 2 else None,
        thickness_mm=number_or_none(attribute("SliceThickness", "PixelMeasuresSequence"), float),
        slope=number_or_none(attribute("RescaleSlope", "PixelValueTransformationSequence"), float),
        intercept=number_or_none(attribute("RescaleIntercept", "PixelValueTransformationSequence"), float),
        padding=number_or_none(value_of(dataset, "PixelPaddingValue", None), int),
        samples=int(value_of(dataset, "SamplesPerPixel", 1)),
        bits_allocated=int(value_of(dataset, "BitsAllocated", 16)),
        bits_stored=int(value_of(dataset, "BitsStored", 16)),
        high_bit=int(value_of(dataset, "HighBit", 15)),
        is_signed=bool(value_of(dataset, "PixelRepresentation", 0)),
        photometric=str(value_of(dataset, "PhotometricInterpretation", "")),
        syntax=str(meta.TransferSyntaxUID) if "TransferSyntaxUID" in meta else "",
    )


def value_of(dataset: Any, name: str, missing: Any) -> Any:
    """An attribute's value, or another where it is missing or empty."""
    if name not in dataset or dataset[name].value in (None, ""):
        return missing
    return dataset[name].value


def number_or_none(value: Any, kind: type[int] | type[float]) -> Any:
    """A number, None where there is none."""
    return None if value is None else kind(float(value))


def reversed_vector(values: Any, first: int, length: int) -> Vector | None:
    """Three of DICOM's numbers x, y, z from a place on as z, y, x; None where they are missing or of another length."""
    if values is None or len(values) != length:
        return None
    x, y, z = (float(value) for value in values[first : first + 3])
    return z, y, x
