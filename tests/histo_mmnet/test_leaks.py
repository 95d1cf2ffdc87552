"""The audit finds planted leaks, and the colour baseline has its known figures."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pictures

from common.errors import BAD_DATA
from histo_mmnet.audit import audit, balanced_accuracy, pictured
from histo_mmnet.colours import Floats, colour_table, lab, nearest
from histo_mmnet.leaks import main
from histo_mmnet.names import ImageName, image_name
from histo_mmnet.scan import Image, find_breast, scan
from histo_mmnet.splits import Role, Trial, fold_trials, write_split
from tests.histo_mmnet.test_splits import NAMES

Bytes = np.ndarray
GOLDEN = (0.817, 0.660, 0.607)  # of the 59 images: any other image, of another slide, of another accession


def picture(number: int) -> Bytes:
    """A smooth random picture of its own (46, 70, 3)."""
    random = np.random.default_rng(number)
    small = Pictures.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((70, 46), Pictures.Resampling.BICUBIC))


def compressed(pixels: Bytes) -> Bytes:
    file = io.BytesIO()
    Pictures.fromarray(pixels).save(file, "JPEG", quality=40)
    return np.asarray(Pictures.open(file))


CHANGES: dict[str, Callable[[Bytes], Bytes]] = {
    "JPEG": compressed,
    "resized": lambda pixels: np.asarray(Pictures.fromarray(pixels).resize((96, 96))),
    "lighter": lambda pixels: np.clip(pixels * 1.15, 0, 255).astype(np.uint8),
    "mirrored": lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
    "upside down": lambda pixels: np.ascontiguousarray(pixels[::-1]),
}


def trial_of(files: dict[str, Role]) -> Trial:
    names = [image_name(file) for file in files]
    assert None not in names
    return Trial(0, tuple(name for name in names if name is not None), tuple(files.values()))


def written(folder: Path, pictures: dict[str, Bytes]) -> dict[ImageName, Path]:
    paths = {}
    for file, pixels in pictures.items():
        name = image_name(file)
        assert name is not None
        path = folder.joinpath("breast", *name.folders) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Pictures.fromarray(pixels).save(path)
        paths[name] = path
    return paths


TRAINED, TESTED = "SOB_B_A-14-1-40-001.png", "SOB_M_DC-14-2-40-001.png"
OTHERS = ("SOB_B_F-14-3-40-001.png", "SOB_M_LC-14-4-40-001.png")
ROLES: dict[str, Role] = {TRAINED: "train", OTHERS[0]: "val", TESTED: "test", OTHERS[1]: "test"}


def test_apart_nothing_leaks(tmp_path: Path) -> None:
    pictures = pictured(written(tmp_path, {file: picture(k) for k, file in enumerate(ROLES)}))
    assert not any(finding.is_leak for finding in audit(trial_of(ROLES), pictures))


def test_the_same_pixels_under_two_names(tmp_path: Path) -> None:
    own = {file: picture(k) for k, file in enumerate(ROLES)}
    findings = audit(trial_of(ROLES), pictured(written(tmp_path, own | {TESTED: own[OTHERS[0]]})))
    leaks = [finding.words for finding in findings if finding.is_leak]
    assert len(leaks) == 1 and "the same pixels" in leaks[0] and f"{TESTED} = {OTHERS[0]}" in leaks[0]


@pytest.mark.parametrize("change", CHANGES)
def test_nearly_the_same_picture_under_two_names(tmp_path: Path, change: str) -> None:
    own = {file: picture(k) for k, file in enumerate(ROLES)}
    findings = audit(trial_of(ROLES), pictured(written(tmp_path, own | {TESTED: CHANGES[change](own[TRAINED])})))
    leaks = [finding.words for finding in findings if finding.is_leak]
    assert len(leaks) == 1 and "nearly the same picture" in leaks[0] and f"{TESTED} = {TRAINED}" in leaks[0]


def test_empty_fields_are_not_copies_of_each_other(tmp_path: Path) -> None:
    white = {file: np.full((46, 70, 3), 240 - k, np.uint8) for k, file in enumerate(ROLES)}
    assert not any(finding.is_leak for finding in audit(trial_of(ROLES), pictured(written(tmp_path, white))))


def test_slides_of_one_accession_on_both_sides() -> None:
    trial = trial_of({"SOB_B_A-14-22549AB-40-001.png": "train", "SOB_B_A-14-22549CD-40-001.png": "test",
                      "SOB_M_DC-14-2-40-001.png": "test"})  # fmt: skip
    (finding,) = audit(trial, None)
    assert finding.is_leak and "1 accessions on both sides, 1 of 2 test images (50 %): 14-22549" in finding.words


def test_patients_that_validate_and_are_trained_on_are_a_leak() -> None:
    """Thresholds and the best epoch come from them."""
    trial = trial_of({"SOB_B_A-14-22549AB-40-001.png": "train", "SOB_B_A-14-22549CD-40-001.png": "val",
                      "SOB_M_DC-14-2-40-001.png": "test"})  # fmt: skip
    found = audit(trial, None)
    assert [finding.is_leak for finding in found] == [False, True] and "14-22549" in found[1].words


def test_numbers_that_begin_alike_are_other_patients() -> None:
    trial = trial_of({"SOB_B_F-14-1413-40-001.png": "train", "SOB_B_F-14-14134-40-001.png": "test"})
    assert not audit(trial, None)[0].is_leak


def test_the_script_ends_with_1_on_a_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "good.csv", fold_trials(NAMES[::10], "accession", 5, 42))
    write_split(tmp_path / "bad.csv", fold_trials(NAMES[::10], "slide", 5, 42))
    assert main([str(tmp_path / "good.csv")]) == 0
    assert "0 of 5 trials leak" in capsys.readouterr().out
    assert main([str(tmp_path / "good.csv"), str(tmp_path / "bad.csv")]) == BAD_DATA
    assert "LEAK" in capsys.readouterr().out


def test_the_audit_flags_all_official_trials_and_passes_ours(real_data: Path, tmp_path: Path) -> None:
    images = [str(real_data / "histo" / name) for name in ("BreaKHis_v1", "breakhis_500px")]
    look = [word for folder in images for word in ("--images", folder)]
    for path in sorted((real_data / "histo" / "official_folds").glob("dsfold*.txt")):
        assert main([str(path), *look]) == BAD_DATA
    write_split(tmp_path / "ours.csv", fold_trials(NAMES, "accession", 5, 42))
    assert main([str(tmp_path / "ours.csv"), *look]) == 0


def test_lab_of_known_colours() -> None:
    """sRGB red, white, black and mid grey (CIE 15; the values of Lindbloom's calculator for D65)."""
    pixels = np.array([[255, 0, 0], [255, 255, 255], [0, 0, 0], [119, 119, 119]], np.uint8)
    expected = np.array([[53.24, 80.09, 67.20], [100, 0, 0], [0, 0, 0], [50.03, 0, 0]])
    np.testing.assert_allclose(lab(pixels), expected, atol=0.05)


def test_lab_equals_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    np.testing.assert_allclose(lab(pixels), color.rgb2lab(pixels[None])[0], atol=1e-3)


def nearest_accuracy(table: Floats, images: list[Image], allowed: np.ndarray) -> float:
    labels = np.array([image.name.label for image in images])
    return balanced_accuracy(labels, labels[nearest(table, table, allowed)])


def test_the_colour_table_of_the_real_images(real_data: Path) -> None:
    """Colour finds the patient: the more strictly patients are kept apart, the less it knows."""
    images = [i for d in ("BreaKHis_v1", "breakhis_500px") for i in scan(find_breast(real_data / "histo" / d))]
    table = colour_table([image.path for image in images], len(images))
    slide, accession = (np.array([getattr(i.name, unit) for i in images]) for unit in ("slide", "accession"))
    rules = (~np.eye(len(images), dtype=bool), slide[:, None] != slide, accession[:, None] != accession)
    found = [nearest_accuracy(table, images, allowed) for allowed in rules]
    assert found == pytest.approx(GOLDEN, abs=0.001)
    of_slide = nearest(table, table, rules[1])
    shared = np.array([((accession == accession[k]) & (slide != slide[k])).any() for k in range(len(images))])
    assert shared.sum() == 28 and (accession[of_slide] == accession)[shared].mean() == pytest.approx(8 / 28)


def test_the_nearest_of_none_is_none() -> None:
    table = np.random.default_rng(0).normal(size=(3, 18))
    allowed = np.array([[False, True, True], [False, False, False], [True, True, False]])
    found = nearest(table, table, allowed)
    assert found[1] == -1 and found[0] in (1, 2)
