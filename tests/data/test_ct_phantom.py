"""Simulated chests: reproducible, of the classes that the table tells, readable as files and as DICOM series."""

import csv
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.dicom.assembly import assemble
from common.dicom.headers import read_headers
from common.dicom.series import find_series
from common.scan_files import read_scan
from common.streams import random_for
from data.phantoms.ct import Planned, plan, simulate, write_dicom, write_phantom
from data.phantoms.ct_chest import Lesion, draw_body, draw_view, place_inside, render
from data.phantoms.ct_settings import CLASSES, CtPhantom

SMALL = CtPhantom(patients=4, studies=(1, 2), shape=(72, 72), slice_mm=(7.0, 8.0), pixel_mm=(5.0, 5.6))
STUDY = Planned(1, 0, (0, 0, 0), (0, 0, 0))


def test_equal_arguments_give_equal_bits() -> None:
    one, two = (simulate(SMALL, STUDY)[0] for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, simulate(dataclasses.replace(SMALL, seed=1), STUDY)[0])


def test_the_plan_holds_all_classes_and_every_patient() -> None:
    studies = plan(CtPhantom(patients=200))
    assert set(Counter(study.label for study in studies)) == set(CLASSES)
    assert {study.patient for study in studies} == set(range(200))
    unknown = np.mean([9 in study.told for study in studies])
    assert 0.08 < unknown < 0.22 and all(t in (9, v) for s in studies for t, v in zip(s.told, s.label, strict=True))


def test_a_chest_is_made_of_what_chests_are_made_of() -> None:
    units, spacing = simulate(SMALL, STUDY)
    lungs = ((units > -950) & (units < -650)).sum() * np.prod(spacing) / 1000
    assert 1500 < lungs < 9000 and (units > 200).mean() > 0.001 and units[0, 0, 0] < -900


@pytest.mark.parametrize(
    ("kind", "radius", "low", "high"), [(0, 25.0, -250, 150), (1, 9.0, -120, 120), (2, 11.0, -1000, -880)]
)
def test_findings_have_their_density(kind: int, radius: float, low: float, high: float) -> None:
    settings = dataclasses.replace(
        SMALL, noise_hu=(1.0, 1.0), slice_mm=(2.5, 2.5), pixel_mm=(2.5, 2.5), shape=(144, 144)
    )
    body = draw_body(settings, random_for("a patient", 0))
    centre = place_inside(body, 14.0, random_for("a place", kind))
    rng = random_for("a study", 0)
    view = draw_view(settings, body, rng)
    found = render(settings, body, [Lesion(kind, centre, radius, (-20.0, 30.0, -950.0)[kind])], view, rng)
    distance = np.sqrt((view.z - centre[0]) ** 2 + (view.y - centre[1]) ** 2 + (view.x - centre[2]) ** 2)
    middle = found[distance < 0.35 * radius]
    assert len(middle) and low < np.median(middle) < high


def test_files_and_table(tmp_path: Path) -> None:
    folder = write_phantom(SMALL, tmp_path / "ct", 1)
    rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))
    studies = plan(SMALL)
    assert [row["CT"] for row in rows] == [study.name for study in studies]
    assert {row["patient"] for row in rows} == {f"P{k:04d}" for k in range(4)}
    scan = read_scan(folder / "studies" / f"{studies[0].name}.mha")
    units, spacing = simulate(SMALL, studies[0])
    assert np.abs(scan.values - units).max() <= 0.501 and scan.spacing_mm == pytest.approx(spacing)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_phantom(SMALL, folder, 1)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_as_dicom_it_is_an_ok_series(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    units, spacing = simulate(SMALL, STUDY)
    write_dicom(tmp_path / "study", units, spacing, STUDY)
    found = [read_headers(path) for path in sorted((tmp_path / "study").iterdir())]
    [series] = find_series([header for own in found if not isinstance(own, str) for header in own])
    scan, findings = assemble(series)
    assert series.status == "ok" and not findings and np.abs(scan.values - units).max() <= 0.501
    assert scan.spacing_mm == pytest.approx(spacing, rel=1e-4)
