"""NIfTI, NRRD and MetaImage: voxels and places as ITK has them, in any orientation; damage is named."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import BAD_DATA, WRONG_CALL, UserError
from common.scan_files import read_scan
from common.scans import Scan, canonical

VOLUME = np.arange(2 * 3 * 4, dtype="<i2").reshape(2, 3, 4) - 9  # [z, y, x]
DIRECTIONS = np.array([[0.0, 0.8, -0.6], [-1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])  # rows: axis i, j, k towards x, y, z
SPACING, ORIGIN = np.array([0.7, 0.8, 2.5]), np.array([5.0, -6.0, 7.0])


def expected(index: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Patient z, y, x of an index z, y, x."""
    i = np.array(index[::-1]) * SPACING
    return np.asarray((ORIGIN + i @ DIRECTIONS)[::-1], float)


def nrrd(encoding: str, data: bytes) -> bytes:
    vectors = " ".join(
        "(" + ",".join(f"{v:.17g}" for v in row * s) + ")" for row, s in zip(DIRECTIONS, SPACING, strict=True)
    )
    head = (
        f"NRRD0004\n# made by a test\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 3 2\n"
        f"space directions: {vectors}\nkinds: domain domain domain\nendian: little\nencoding: {encoding}\n"
        f"space origin: ({ORIGIN[0]},{ORIGIN[1]},{ORIGIN[2]})\n\n"
    )
    return head.encode() + data


def meta(data: bytes, packed: bool) -> bytes:
    matrix = " ".join(f"{v:.17g}" for v in DIRECTIONS.ravel())
    head = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {packed}\n"
        f"TransformMatrix = {matrix}\nOffset = {ORIGIN[0]} {ORIGIN[1]} {ORIGIN[2]}\nElementSpacing = 0.7 0.8 2.5\n"
        "DimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    return head.encode() + data


FILES = {
    "raw.nrrd": nrrd("raw", VOLUME.tobytes()),
    "packed.nrrd": nrrd("gzip", gzip.compress(VOLUME.tobytes())),
    "windows.nrrd": nrrd("raw", b"").replace(b"\n", b"\r\n") + VOLUME.tobytes(),
    "raw.mha": meta(VOLUME.tobytes(), False),
    "packed.mha": meta(zlib.compress(VOLUME.tobytes()), True),
}


@pytest.mark.parametrize("name", FILES)
def test_voxels_and_places(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    scan = read_scan(tmp_path / name)
    assert np.array_equal(scan.values, VOLUME)
    for index in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        np.testing.assert_allclose((scan.affine @ [*index, 1])[:3], expected(index), atol=1e-12)
    assert scan.spacing_mm == pytest.approx((2.5, 0.8, 0.7))


def test_nifti_points_to_right_and_front(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[:3, 3] = [10, 20, 30]  # right, anterior, superior
    nibabel.save(nibabel.Nifti1Image(VOLUME.T, affine), tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    assert np.array_equal(scan.values, VOLUME)
    np.testing.assert_allclose((scan.affine @ [1, 1, 1, 1])[:3], [32.5, -20.8, -10.7])
    turned = canonical(scan)
    assert np.array_equal(turned.values, VOLUME[:, ::-1, ::-1]) and (np.diag(turned.affine)[:3] > 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_canonical_moves_no_voxel_in_the_patient(seed: int) -> None:
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * [2.5, 0.8, 0.7], random.normal(size=3)
    scan = Scan(random.permutation(24).reshape(2, 3, 4), affine)
    turned = canonical(scan)

    def places(of: Scan) -> dict[int, tuple[float, ...]]:
        index = np.argwhere(np.ones(of.values.shape, bool))
        where = (index @ of.affine[:3, :3].T + of.affine[:3, 3]).round(9)
        return {int(of.values[tuple(k)]): tuple(place) for k, place in zip(index, where.tolist(), strict=True)}

    assert places(turned) == places(scan)
    assert (np.diag(turned.affine)[:3] > 0).all()
    weights = np.abs(turned.affine[:3, :3] / np.linalg.norm(turned.affine[:3, :3], axis=0))
    assert np.trace(weights) == pytest.approx(
        max(np.trace(weights[:, list(p)]) for p in ((0, 1, 2), (1, 0, 2), (2, 1, 0)))
    )


def test_real_files_are_read_as_simpleitk_reads_them(real_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    pytest.importorskip("nibabel")
    files = sorted((real_data / "ct" / "volumes").iterdir())
    for path in files:
        scan, image = read_scan(path), sitk.ReadImage(str(path))
        assert np.array_equal(scan.values, sitk.GetArrayFromImage(image)), path
        there = image.TransformIndexToPhysicalPoint((3, 2, 1))[::-1]
        np.testing.assert_allclose((scan.affine @ [1, 2, 3, 1])[:3], there, atol=1e-4)
    assert len(files) == 12


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [("raw.nrrd", (b"sizes: 4 3 2", b"sizes: 4 3 9"), "samples, expected"),
     ("raw.nrrd", (b"sizes: 4 3 2", b"sizes: 40000 40000 40000"), "GiB"),
     ("raw.nrrd", (b"type: short", b"type: block"), "samples of type block"),
     ("raw.nrrd", (b"space: left-posterior-superior", b"content: x"), "space"),
     ("raw.nrrd", (b"NRRD0004", b"NOPE0004"), "no NRRD"), ("packed.nrrd", (b"\x1f\x8b", b"\x00\x00"), "while decompressing"),
     ("raw.mha", (b"DimSize = 4 3 2", b"DimSize = 4 3"), "three"),
     ("raw.mha", (b"ElementSpacing = 0.7 0.8 2.5", b"ElementSpacing = 0 0 0"), "span no volume"),
     ("packed.mha", (b"DimSize = 4 3 2", b"DimSize = 4 3 3"), "samples, expected")],
)  # fmt: skip
def test_damage_is_one_line(tmp_path: Path, name: str, change: tuple[bytes, bytes], words: str) -> None:
    assert change[0] in FILES[name]
    (tmp_path / name).write_bytes(FILES[name].replace(*change))
    with pytest.raises(UserError, match=words) as caught:
        read_scan(tmp_path / name)
    assert caught.value.exit_code == BAD_DATA and len(caught.value.problems) == 1 and name in caught.value.problems[0]


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A thousand times the bytes that the header says: only what it says is taken."""
    (tmp_path / "bomb.nrrd").write_bytes(nrrd("gzip", gzip.compress(VOLUME.tobytes() + bytes(10**8))))
    assert np.array_equal(read_scan(tmp_path / "bomb.nrrd").values, VOLUME)


def test_other_kinds_are_a_wrong_call(tmp_path: Path) -> None:
    for name in ("a.img", "missing.nrrd"):
        with pytest.raises(UserError) as caught:
            read_scan(tmp_path / name)
        assert caught.value.exit_code == WRONG_CALL
