"""DICOM series: right verdicts, exact pixels, repaired places, and refusal of all that is no volume."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from common.dicom.assembly import assemble
from common.dicom.headers import Header, read_headers
from common.dicom.pixels import decodes, packed_bits, stored_values
from common.dicom.series import Series, find_series
from common.errors import BAD_DATA, UserError
from common.scan_files import read_scan
from common.scans import AIR_HU
from tests.common.dicom_files import AXIAL, ramp, write_series, write_slice

SHAPE = (24, 32)
REAL = {  # folder -> status and codes of each series that must be found in it
    "dicom_chest/cip_ct64": [("ok", [])],
    "dicom_chest/cip_insp_2slices": [("ok", [])],
    "dicom_chest/ts_body_j2k_20": [("ok", ["overlap"])],
    "dicom_odd/d2n_missing_slice_a": [("repaired", ["missing_slices"])],
    "dicom_odd/panimg_4d": [("refused", ["four_dimensional"])],
    "dicom_odd/panimg_4d_enhanced": [("refused", ["four_dimensional"])],
    "dicom_odd/panimg_intercept": [("ok", ["rescale_varies"])],
    "dicom_odd/panimg_slope": [("ok", ["rescale_varies"])],
    "dicom_odd/philips_localizer": [("refused", ["localizer"])],
    "dicom_odd/philips_secondary": [("refused", ["secondary_capture"])],
    "dicom_odd/pydicom_ct5n": [("ok", [])],
    "dicom_odd/pydicom_scout_ct2n": [("refused", ["mixed_orientations", "localizer"])] * 2,
}


def series_in(folder: Path) -> list[Series]:
    headers: list[Header] = []
    for path in sorted(folder.iterdir()):
        found = read_headers(path)
        headers += found if isinstance(found, list) else []
    return find_series(headers)


def only(folder: Path) -> Series:
    [series] = series_in(folder)
    return series


def codes(series: Series) -> list[str]:
    return [finding.code for finding in series.findings]


@pytest.mark.parametrize("folder", REAL)
def test_every_real_series_gets_its_verdict(real_data: Path, folder: str) -> None:
    found = [(series.status, codes(series)) for series in series_in(real_data / "ct" / folder)]
    assert found == REAL[folder]
    assert all(series.words.startswith(series.status) for series in series_in(real_data / "ct" / folder))


def test_a_series_equals_its_twin_in_nrrd(real_data: Path) -> None:
    scan, findings = assemble(only(real_data / "ct" / "dicom_chest" / "cip_ct64"))
    twin = read_scan(real_data / "ct" / "volumes" / "cip_ct-64.nrrd")
    assert np.array_equal(scan.values, twin.values) and not findings
    np.testing.assert_allclose(scan.affine, twin.affine, atol=1e-3)


def test_what_lies_outside_the_field_of_view_is_air(real_data: Path) -> None:
    """There the file holds -2000, which would be -3024."""
    scan, _ = assemble(only(real_data / "ct" / "dicom_chest" / "cip_insp_2slices"))
    assert scan.values.min() == AIR_HU and scan.values[0, 0, 0] == AIR_HU


LOSSLESS = ("CT1_J2KR", "CT1_JPLL", "CT1_RLE", "CT1_UNC.explicit_big_endian.dcm", "CT1_UNC.implicit_little_endian.dcm")


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_twins_have_the_pixels_of_the_plain_file(real_data: Path, name: str) -> None:
    folder = real_data / "ct" / "dicom_compressed"
    plain, own = (stored_values(first(folder / file)) for file in ("CT1_UNC.explicit_little_endian.dcm", name))
    assert plain.min() == -2000 and plain.max() == 2278
    assert np.array_equal(own, plain)


def first(path: Path) -> Header:
    found = read_headers(path)
    assert isinstance(found, list), found
    return found[0]


def test_all_real_pixels_are_those_of_simpleitk(real_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    folder = real_data / "ct"
    compared = 0
    for path in [*sorted((folder / "dicom_compressed").iterdir()), *sorted((folder / "dicom_chest").glob("*/*"))[::9]]:
        headers = read_headers(path)
        if isinstance(headers, str) or not decodes(headers[0]):
            continue
        header = headers[0]
        assert header.slope is not None and header.intercept is not None
        units = stored_values(header) * header.slope + header.intercept
        assert np.array_equal(units, sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0]), path
        compared += 1
    assert compared >= 18


def test_what_is_not_decoded_is_named(real_data: Path) -> None:
    header = first(real_data / "ct" / "dicom_compressed" / "CT1_JLSL")
    with pytest.raises(UserError, match=r"JPEG-LS Lossless.*1\.2\.840\.10008\.1\.2\.4\.80.*convert it"):
        stored_values(header)


def test_order_and_step_come_from_positions(tmp_path: Path) -> None:
    """Not from names, instance numbers or the thickness."""
    places = np.arange(8) * 1.5 - 7
    write_series(tmp_path, ramp(places, SHAPE), places, AXIAL, InstanceNumber=1)
    series = only(tmp_path)
    assert codes(series) == ["overlap"] and series.status == "ok"
    scan, _ = assemble(series)
    assert np.array_equal(scan.values, ramp(places, SHAPE).round())
    assert scan.spacing_mm == pytest.approx((1.5, 2, 2)) and scan.affine[0, 3] == -7


@pytest.mark.parametrize("gone", [[3], [3, 4], [2, 5, 6], [1, 2, 3]])
def test_missing_slices_are_filled_at_their_places(tmp_path: Path, gone: list[int]) -> None:
    places = np.arange(12) * 4.0
    kept = [k for k in range(12) if k not in gone]
    write_series(tmp_path, ramp(places[kept], SHAPE), places[kept], AXIAL)
    series = only(tmp_path)
    assert series.status == "repaired" and codes(series)[0] == "missing_slices" and str(len(gone)) in series.words
    scan, _ = assemble(series)
    assert scan.values.shape[0] == 12 and np.abs(scan.values - ramp(places, SHAPE)).max() <= 0.5
    assert scan.spacing_mm[0] == pytest.approx(4)


def test_a_large_gap_is_refused(tmp_path: Path) -> None:
    places = np.array([0, 4, 8, 12, 60, 64, 68.0])
    write_series(tmp_path, ramp(places, SHAPE), places, AXIAL)
    assert only(tmp_path).status == "refused" and "48 mm" in only(tmp_path).words


def test_uneven_steps_are_resampled(tmp_path: Path) -> None:
    places = np.cumsum([0, 3, 3, 3.9, 2.4, 3, 3.5, 3])
    write_series(tmp_path, ramp(places, SHAPE), places, AXIAL)
    series = only(tmp_path)
    assert (series.status, codes(series)[0]) == ("repaired", "uneven_steps")
    scan, _ = assemble(series)
    even = places[0] + scan.spacing_mm[0] * np.arange(len(scan.values))
    assert np.abs(scan.values - ramp(np.minimum(even, places[-1]), SHAPE)).max() <= 1


@pytest.mark.parametrize("degrees", [-20.0, 5.0, 15.0])
def test_a_tilted_stack_is_straightened(tmp_path: Path, degrees: float) -> None:
    """A ball scanned with a tilted gantry is a ball again, at its place in the patient."""
    angle = np.radians(degrees)
    stack = dataclasses.replace(AXIAL, along_y=(0.0, float(np.cos(angle)), float(np.sin(angle))), thickness_mm=2.0)
    middle, radius = np.array([40.0, 30.0, 32.0]), 15.0  # z, y, x of the patient
    rows, columns = np.mgrid[:40, :32] * 2.0
    for k in range(41):  # the table moves along z, slices lie along the tilted plane
        z = 2.0 * k + rows * np.sin(angle)
        y = rows * np.cos(angle)
        inside = (z - middle[0]) ** 2 + (y - middle[1]) ** 2 + (columns - middle[2]) ** 2 < radius**2
        write_slice(tmp_path / f"{k}.dcm", np.where(inside, 40.0, -1000.0), (0.0, 0.0, 2.0 * k), stack)
    series = only(tmp_path)
    assert series.status == "repaired" and "tilt" in codes(series) and f"{abs(degrees):.1f} degrees" in series.words
    scan, _ = assemble(series)
    index = np.argwhere(scan.values > -480)
    place = index @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    np.testing.assert_allclose(place.mean(0), middle, atol=0.5 * min(scan.spacing_mm))
    np.testing.assert_allclose(np.ptp(place, 0), 2 * radius, atol=1.5 * max(scan.spacing_mm))


def test_equal_doubles_count_once_and_others_are_refused(tmp_path: Path) -> None:
    places = np.arange(6) * 3.0
    volume = ramp(places, SHAPE)
    write_series(tmp_path, volume, places, AXIAL)
    write_slice(tmp_path / "again.dcm", volume[2], (0, 0, 6.0), AXIAL)
    series = only(tmp_path)
    assert (series.status, codes(series)) == ("repaired", ["duplicates"])
    assert np.array_equal(assemble(series)[0].values, volume.round())
    write_slice(tmp_path / "other.dcm", volume[4], (0, 0, 6.0), AXIAL)
    assert only(tmp_path).status == "refused"


def test_points_in_time_are_refused(tmp_path: Path) -> None:
    places = np.arange(5) * 3.0
    for time in range(3):
        write_series(tmp_path / str(time), ramp(places, SHAPE) + time, places, AXIAL)
    for path in [path for folder in sorted(tmp_path.iterdir()) for path in folder.iterdir()]:
        path.rename(tmp_path / f"{path.parent.name}_{path.name}")
    assert codes(only_of_files(tmp_path)) == ["four_dimensional"]


def only_of_files(folder: Path) -> Series:
    [series] = find_series(
        [h for path in sorted(folder.glob("*.dcm")) for h in read_headers(path) if not isinstance(h, str)]
    )
    return series


def test_a_localizer_beside_the_slices_is_judged_alone(tmp_path: Path) -> None:
    places = np.arange(5) * 3.0
    write_series(tmp_path, ramp(places, SHAPE), places, AXIAL)
    scout = dataclasses.replace(AXIAL, along_y=(0, 0, -1))
    write_slice(
        tmp_path / "scout.dcm", ramp(places, SHAPE)[0], (0, 0, 0), scout, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    assert sorted(series.status for series in series_in(tmp_path)) == ["ok", "refused"]


@pytest.mark.parametrize(
    ("others", "code"),
    [({"Modality": "MR"}, "modality"), ({"ImagePositionPatient": None}, "geometry"), ({"PixelSpacing": None}, "geometry"),
     ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "geometry"),
     ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary_capture")],
)  # fmt: skip
def test_what_is_no_volume_is_refused_with_its_reason(tmp_path: Path, others: dict[str, object], code: str) -> None:
    places = np.arange(4) * 3.0
    write_series(tmp_path, ramp(places, SHAPE), places, AXIAL, **others)
    assert only(tmp_path).status == "refused" and code in codes(only(tmp_path))


def chest(places: np.ndarray) -> np.ndarray:
    """Air, lung, fat and muscle enough for a histogram."""
    volume = np.full((len(places), 40, 40), -1000.0)
    volume[:, 8:32, 6:34] = 40
    volume[:, 12:28, 10:18] = volume[:, 12:28, 22:30] = -850
    return volume + np.random.default_rng(1).normal(0, 10, volume.shape)


@pytest.mark.parametrize(
    ("wrong", "words"), [(-1024.0, "were Hounsfield units before"), (1024.0, "the intercept is missing")]
)
def test_mistaken_scales_are_put_right(tmp_path: Path, wrong: float, words: str) -> None:
    places = np.arange(12) * 3.0
    write_series(tmp_path, chest(places) + wrong, places, dataclasses.replace(AXIAL, intercept=0.0))
    scan, findings = assemble(only(tmp_path))
    assert [finding.code for finding in findings] == ["units"] and words in findings[0].words
    assert np.abs(scan.values - np.maximum(chest(places), AIR_HU)).max() <= 1.01


def test_slope_and_intercept_of_each_slice_count(tmp_path: Path) -> None:
    places = np.arange(4) * 3.0
    volume = ramp(places, SHAPE)
    for k, slope in enumerate((1.0, 0.5, 2.0, 1.0)):
        write_slice(tmp_path / f"{k}.dcm", volume[k], (0, 0, places[k]), dataclasses.replace(AXIAL, slope=slope))
    series = only(tmp_path)
    assert codes(series) == ["rescale_varies"] and np.abs(assemble(series)[0].values - volume).max() <= 1


def test_damaged_files_are_named(tmp_path: Path) -> None:
    places = np.arange(3) * 3.0
    write_series(tmp_path, ramp(places, SHAPE), places, AXIAL)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{path.name}: damaged pixels") as caught:
        assemble(only(tmp_path))
    assert caught.value.exit_code == BAD_DATA
    (tmp_path / "text.dcm").write_text("no image")
    assert read_headers(tmp_path / "text.dcm") == "no DICOM file"
    pretending = tmp_path / "pretends.dcm"
    pretending.write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)) * 8)
    found = read_headers(pretending)
    assert found == [] or (isinstance(found, str) and found.startswith("damaged header"))


def test_more_rows_than_bytes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    write_slice(tmp_path / "a.dcm", ramp(np.zeros(1), SHAPE)[0], (0, 0, 0), AXIAL, Rows=65535, Columns=65535)
    with pytest.raises(UserError, match="cut off"):
        stored_values(first(tmp_path / "a.dcm"))


def test_run_lengths_of_the_standard() -> None:
    """Apple's example of PackBits."""
    packed = bytes.fromhex("FE AA 02 80 00 2A FD AA 03 80 00 2A 22 F7 AA")
    plain = bytes.fromhex("AA AA AA 80 00 2A AA AA AA AA 80 00 2A 22 AA AA AA AA AA AA AA AA AA AA")
    assert packed_bits(packed, len(plain)) == plain
    with pytest.raises(ValueError, match="end after"):
        packed_bits(packed, len(plain) + 1)
