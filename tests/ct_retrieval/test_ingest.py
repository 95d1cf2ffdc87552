"""From files to the store: the crop holds what it should, verdicts are told, a study is stored once."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import BAD_DATA, WRONG_CALL
from common.scan_files import read_scan
from common.scans import AIR_HU, Scan, canonical
from ct_retrieval.ingest import main
from ct_retrieval.resampling import Window, centre_of, crop
from ct_retrieval.store import open_volume, patient_hash, studies_of
from tests.common.dicom_files import AXIAL, ramp, write_series
from tests.common_runs import said

WINDOW = Window(-1000.0, 200.0)
SMALL = ["grid.shape=[30,27,27]", "grid.spacing_mm=10"]


def test_bytes_stand_for_units() -> None:
    units = np.array([-3000.0, -1000, -995.3, 0, 199, 200, 3000])
    assert WINDOW.to_bytes(units).tolist() == [0, 0, 1, 213, 255, 255, 255]
    inside = np.linspace(-1000, 200, 500)
    assert np.abs(WINDOW.to_units(WINDOW.to_bytes(inside)) - inside).max() <= 1200 / 255 / 2 + 1e-3


@pytest.mark.parametrize("turn", [0.0, 25.0])
def test_a_crop_is_the_scan_interpolated_at_its_places(turn: float) -> None:
    """A ramp is what linear interpolation keeps, on any grid; turned axes too."""
    angle = np.radians(turn)
    affine = np.eye(4)
    affine[:3, :3] = [
        [1.5, 0, 0],
        [0, 0.8 * np.cos(angle), -0.7 * np.sin(angle)],
        [0, 0.8 * np.sin(angle), 0.7 * np.cos(angle)],
    ]
    affine[:3, 3] = [-40, 3, 5]
    index = np.moveaxis(np.indices((50, 90, 100)), 0, -1)
    place = index @ affine[:3, :3].T + affine[:3, 3]
    gradient = np.array([2.0, -1.5, 3.0])
    scan = Scan((place @ gradient - 400).astype(np.float32), affine)
    centre = place[25, 45, 50]
    found = crop(scan, tuple(centre.tolist()), (12, 14, 10), 2.0, WINDOW)
    grid = np.moveaxis(np.indices((12, 14, 10)), 0, -1) - (np.array([12, 14, 10]) - 1) / 2
    assert np.abs(WINDOW.to_units(found) - ((centre + 2.0 * grid) @ gradient - 400)).max() <= 2.4


def test_outside_the_scan_is_air() -> None:
    """The original padded with water."""
    scan = Scan(np.full((4, 5, 6), 40, np.int16), np.eye(4))
    found = crop(scan, (1.5, 2.0, 2.5), (10, 11, 12), 1.0, WINDOW)
    assert (found > 0).sum() == 4 * 5 * 6 and (found[3:7, 3:8, 3:9] > 200).all() and found[0, 0, 0] == 0


def test_the_crop_lies_about_the_lungs(real_data: Path) -> None:
    """Not about the middle of the field: of a lung's voxels nearly all lie in it, wherever the patient lay."""
    scan = canonical(read_scan(real_data / "ct" / "volumes" / "cip_ct-64.nrrd"))
    lungs = canonical(read_scan(real_data / "ct" / "volumes" / "cip_wholeLung-64.nrrd"))
    moved = np.full((79, 64, 120), AIR_HU, np.int16)
    moved[:, :, 50:114] = scan.values
    affine = scan.affine.copy()
    affine[:3, 3] -= affine[:3, 2] * 50
    for one in (scan, Scan(moved, affine)):
        centre = centre_of(one)
        assert centre.of == "lungs" and 3000 < centre.lungs_ml < 6000
        index = np.argwhere(lungs.values > 0)
        place = index @ lungs.affine[:3, :3].T + lungs.affine[:3, 3]
        inside = (np.abs(place - centre.mm) < np.array([300, 270, 270]) / 2).all(1)
        assert inside.mean() > 0.99


def test_a_scan_and_its_turned_twin_give_the_same_picture(real_data: Path) -> None:
    """The oblique axes of the twin are known; only its place in the patient differs."""
    scan = canonical(read_scan(real_data / "ct" / "volumes" / "cip_ct-64.nrrd"))
    angle = np.radians(10)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    centre = np.array(centre_of(scan).mm)
    straight = crop(scan, tuple(centre.tolist()), (40, 40, 40), 4.0, WINDOW).astype(float)
    affine = scan.affine.copy()
    affine[:3, :3], affine[:3, 3] = turn @ affine[:3, :3], turn @ (affine[:3, 3] - centre) + centre
    turned = crop(Scan(scan.values, affine), tuple(centre.tolist()), (40, 40, 40), 4.0, WINDOW).astype(float)
    assert np.corrcoef(straight.ravel(), turned.ravel())[0, 1] < 0.97  # the patient was turned
    assert abs(straight.mean() - turned.mean()) < 12


def test_ingest_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = np.arange(60) * 3.0
    for name in ("anna", "berta"):
        write_series(tmp_path / "in" / name, ramp(places, (24, 24)), places, AXIAL_OF[name])
    scout = tmp_path / "in" / "carla"
    write_series(
        scout, ramp(places[:2], (24, 24)), places[:2], AXIAL_OF["carla"], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    (tmp_path / "in" / "notes.txt").write_text("no image")
    words = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "store"), *SMALL]
    code, out, problems = said(main, words, capsys)
    assert code == 0 and "2 studies stored, 0 were there, 1 not stored; 1 files are no images" in out, problems
    store = tmp_path / "store"
    studies = studies_of(store)
    assert list(studies) == ["anna", "berta"] and studies["anna"].patient != studies["berta"].patient
    volume = open_volume(store, studies["anna"])
    assert volume.shape == (30, 27, 27) and volume.dtype == np.uint8
    verdicts = json.loads((store / "verdicts.json").read_text())
    assert [v["stored"] for v in verdicts] == [True, True, False]
    assert verdicts[2]["series"][0]["findings"][0]["code"] == "localizer"
    for path in store.rglob("*"):
        if path.is_file():
            assert b"Anna^A" not in path.read_bytes(), f"{path} names a patient"
    code, out, _ = said(main, words, capsys)
    assert code == 0 and "0 studies stored, 2 were there" in out
    code, out, _ = said(main, [*words[:4], "grid.shape=[30,27,27]", "grid.spacing_mm=9"], capsys)
    assert code == 0 and "2 studies stored" in out
    code, out, _ = said(main, ["--input", str(tmp_path / "in"), "--check"], capsys)
    assert code == 0 and "1 images, refused" not in out and "2 images, refused: 2 localizer images" in out


AXIAL_OF = {
    name: type(AXIAL)(
        f"1.2.{k}.1", f"1.2.{k}", patient, AXIAL.spacing_mm, AXIAL.along_x, AXIAL.along_y, 3.0, 1.0, -1024.0
    )
    for k, (name, patient) in enumerate((("anna", "Anna^A"), ("berta", "Berta^B"), ("carla", "Carla^C")))
}


def test_wrong_calls_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for words, code, told in (
        (["--input", str(tmp_path / "nowhere"), "--check"], WRONG_CALL, "no such file or folder"),
        (["--input", str(tmp_path / "empty"), "--check"], BAD_DATA, "no CT in"),
        (["--input", str(tmp_path / "empty")], WRONG_CALL, "--output"),
        (["--input", str(tmp_path / "empty"), "--check", "grid.low_hu=300"], WRONG_CALL, "grid.low_hu"),
    ):
        found, _, problems = said(main, words, capsys)
        assert found == code and told in problems[0], problems


def test_a_patients_hash_needs_the_key() -> None:
    assert patient_hash(b"a" * 32, "Anna") == patient_hash(b"a" * 32, "Anna") != patient_hash(b"b" * 32, "Anna")
    assert len(patient_hash(b"a" * 32, "Anna")) == 16
