"""Simulated chest CTs, the default data of ct_retrieval: patients with several studies, as MetaImage files or DICOM series.

Classes are the label vectors of consolidation, nodules and cysts; size, fat, vessels, posture, noise and kernel differ from
patient to patient or from study to study and tell nothing.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from common.errors import config_error, data_error
from common.extras import extra_package
from common.files import write_atomically, write_text
from common.lock import exclusive
from common.logbook import progress
from common.processes import submit_all, worker_pool
from common.streams import random_for
from data.phantoms.ct_chest import Units, draw_body, draw_lesions, draw_view, render
from data.phantoms.ct_settings import CLASSES, LABELS, CtPhantom

GENERATOR_VERSION = 1  # raised whenever equal settings give other bits, so that stale folders are noticed
UNKNOWN = 9
CT_IMAGE, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
UID_ROOT = "2.25."  # of identifiers made from numbers (PS3.5, B.2)


@dataclasses.dataclass(frozen=True)
class Planned:
    """One study: whose, of which class, and what the table says of it."""

    patient: int
    study: int  # of the patient, from 0
    label: tuple[int, int, int]
    told: tuple[int, int, int]  # 9 where unknown

    @property
    def name(self) -> str:
        """In file names and in the table."""
        return f"P{self.patient:04d}_{self.study}"


def plan(settings: CtPhantom) -> list[Planned]:
    """All studies; depends on the settings alone."""
    weights = np.array(settings.class_weights, float) / sum(settings.class_weights)
    found = []
    for patient in range(settings.patients):
        rng = random_for("ct plan", settings.seed, patient)
        own = int(rng.choice(len(CLASSES), p=weights))
        for study in range(int(rng.integers(settings.studies[0], settings.studies[1] + 1))):
            if study and rng.random() < settings.changes:
                own = int(rng.choice(len(CLASSES), p=weights))
            hidden = rng.random(len(LABELS)) < settings.unknown_share
            told = tuple(UNKNOWN if gone else value for gone, value in zip(hidden, CLASSES[own], strict=True))
            found.append(Planned(patient, study, CLASSES[own], (told[0], told[1], told[2])))
    return found


def simulate(settings: CtPhantom, planned: Planned) -> tuple[Units, tuple[float, float, float]]:
    """Hounsfield units [z, y, x] of a study and its spacing in mm; equal arguments give equal bits."""
    body = draw_body(settings, random_for("ct patient", settings.seed, planned.patient))
    rng = random_for("ct study", settings.seed, planned.patient, planned.study)
    lesions = draw_lesions(settings, body, planned.label, rng)
    view = draw_view(settings, body, rng)
    return render(settings, body, lesions, view, rng), view.spacing


def write_phantom(settings: CtPhantom, folder: Path, producers: int) -> Path:
    """Write studies/*.mha and labels.csv into a folder, once, and return it.

    A killed call is continued by the next; a complete folder is left as it is. The files do not depend on `producers`
    (processes that simulate at once). Raises UserError where the settings are impossible or the folder holds others.
    """
    problems = [f"phantom.{problem}" for problem in settings.problems()]
    if problems:
        raise config_error(*problems)
    described = json.dumps({"generator_version": GENERATOR_VERSION, **dataclasses.asdict(settings)}, indent=1) + "\n"
    recorded = folder / "settings.json"
    if recorded.exists() and recorded.read_text() == described:
        return folder
    with exclusive(folder):
        unfinished = folder / "unfinished.json"
        for path in (recorded, unfinished):
            if path.exists() and path.read_text() != described:
                raise config_error(
                    f"phantom: {folder} holds studies simulated with other settings; delete it or name another"
                )
        write_text(unfinished, described)
        studies = plan(settings)
        missing = [(settings, study, folder) for study in studies if not path_of(folder, study).exists()]
        print(f"simulating {len(missing)} CTs of {settings.patients} patients into {folder}", flush=True)
        for _ in progress(written(missing, producers), "simulating CTs", len(missing), True):
            pass
        write_text(folder / "labels.csv", table_of(studies))
        write_text(recorded, described)
        unfinished.unlink()
    return folder


def path_of(folder: Path, planned: Planned) -> Path:
    """A study's file."""
    return folder / "studies" / f"{planned.name}.mha"


def table_of(studies: list[Planned]) -> str:
    """labels.csv: CT, patient, and 0, 1 or 9 (unknown) for each finding."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["CT", "patient", *LABELS])
    for study in studies:
        writer.writerow([study.name, f"P{study.patient:04d}", *study.told])
    return text.getvalue()


def written(missing: list[tuple[CtPhantom, Planned, Path]], producers: int) -> Iterator[None]:
    """Write studies one after another or by several processes, yielding once for each."""
    if producers == 1 or len(missing) < 2:
        for given in missing:
            write_study(*given)
            yield
        return
    with worker_pool(producers) as pool:
        try:
            yield from (future.result() for future in as_completed(submit_all(pool, write_study, missing)))
        except BrokenProcessPool as error:
            raise data_error(
                "phantom: a simulating process died (out of memory?); what is finished is kept, and the same command "
                "with fewer producers continues"
            ) from error


def write_study(settings: CtPhantom, planned: Planned, folder: Path) -> None:
    """Simulate one study and write it as MetaImage."""
    units, spacing = simulate(settings, planned)
    data = np.round(units).astype("<i2")
    sizes, steps = (" ".join(str(v) for v in reversed(values)) for values in (data.shape, spacing))
    head = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = {steps}\nDimSize = {sizes}\n"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    write_atomically(path_of(folder, planned), lambda file: file.write(head.encode() + data.tobytes()))


def write_dicom(folder: Path, units: Units, spacing: tuple[float, float, float], planned: Planned) -> None:
    """A study as a DICOM series of CT images, names out of order (needs pydicom)."""
    pydicom = extra_package("pydicom", f"{folder}: writing DICOM")
    stored = np.round(units + 1024).astype("<i2")
    number = int(random_for("ct uid", planned.patient, planned.study).integers(2**62))
    for k in range(len(stored)):
        file, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = EXPLICIT, CT_IMAGE
        meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = f"{UID_ROOT}{number}.{k + 1}"
        file.file_meta, file.SOPClassUID, file.Modality = meta, CT_IMAGE, "CT"
        file.StudyInstanceUID, file.SeriesInstanceUID = f"{UID_ROOT}{number}", f"{UID_ROOT}{number}.0"
        file.PatientID, file.PatientName = f"P{planned.patient:04d}", f"Simulated^P{planned.patient:04d}"
        file.ImageType, file.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
        file.Rows, file.Columns = stored.shape[1:]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
        file.RescaleSlope, file.RescaleIntercept, file.SliceThickness = 1, -1024, f"{spacing[0]:.6g}"
        file.PixelSpacing = [f"{v:.6g}" for v in spacing[1:]]
        file.ImageOrientationPatient, file.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, f"{k * spacing[0]:.6f}"]
        file.PixelData = stored[k].tobytes()
        path = folder / f"{(k * 7919) % 10007:05d}.dcm"
        write_atomically(path, lambda out, file=file: file.save_as(out, enforce_file_format=True))  # type: ignore[misc]
