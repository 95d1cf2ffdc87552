"""The importers of public EM data on small copies of their folders, and on the real ones where they are there."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from common.errors import BAD_DATA, WRONG_CALL, UserError
from data import import_em
from data.import_em import VNC_CLASSES

SHAPE = (12, 20, 30)  # voxels z, y, x; two-digit names; no two axes alike
GREY = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)


def write_sections(folder: Path, volume: np.ndarray, suffix: str) -> None:
    """1.png, 2.png ... 12.png: their natural order is not that of their texts."""
    folder.mkdir(parents=True)
    for z, section in enumerate(volume, start=1):
        Image.fromarray(section).save(folder / f"{z}{suffix}")


def imported(name: str, source: Path, target: Path) -> tuple[np.ndarray, np.ndarray]:
    assert import_em.main([name, str(source), str(target)]) == 0
    return np.load(target / "image.npy"), np.load(target / "labels.npy")


def refusal(name: str, source: Path, target: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_em.main([name, str(source), str(target)])
    assert caught.value.exit_code == BAD_DATA and len(caught.value.problems) == 1
    assert not (target / "labels.npy").exists()
    return caught.value.problems[0]


def write_fib25(source: Path, stack: np.ndarray, transforms: np.ndarray) -> Path:
    h5py = pytest.importorskip("h5py")
    write_sections(source / "grayscale_maps", GREY, ".png")
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        file["stack"], file["transforms"] = stack, transforms
    (source / "groundtruth.h5.gz").write_bytes(gzip.compress(packed.getvalue()))
    return source


def test_fib25_maps_supervoxels_to_bodies_and_keeps_the_labelled_sections(tmp_path: Path) -> None:
    stack = np.random.default_rng(1).integers(0, 6, (9, 20, 30)).astype(np.uint32)
    transforms = np.array([[1, 7], [2, 7], [3, 9], [4, 1000], [5, 9]])
    image, labels = imported("fib25", write_fib25(tmp_path / "source", stack, transforms), tmp_path / "out")
    assert (image == GREY[:9]).all() and labels.dtype == np.uint32
    assert (labels == np.array([0, 7, 7, 9, 1000, 9])[stack]).all()


def test_fib25_that_is_damaged_is_told(tmp_path: Path) -> None:
    stack, transforms = np.ones((9, 20, 30), np.uint32), np.array([[1, 7]])
    source = write_fib25(tmp_path / "beyond", stack, np.array([[99, 7]]))
    assert "groundtruth.h5.gz" in refusal("fib25", source, tmp_path / "out")
    source = write_fib25(tmp_path / "longer", np.ones((15, 20, 30), np.uint32), transforms)
    assert "image [12, 20, 30], labels [15, 20, 30]" in refusal("fib25", source, tmp_path / "out")
    source = write_fib25(tmp_path / "cut", stack, transforms)
    whole = (source / "groundtruth.h5.gz").read_bytes()
    (source / "groundtruth.h5.gz").write_bytes(whole[: len(whole) // 2])
    assert "groundtruth.h5.gz" in refusal("fib25", source, tmp_path / "out")


def test_isbi2012_has_membranes_and_the_cells_between_them_section_by_section(tmp_path: Path) -> None:
    cells = np.full((8, 20, 30), 255, np.uint8)
    cells[:, :, 14:16] = 0  # a membrane that parts every section into two
    write_sections(tmp_path / "train/image", GREY, ".png")
    write_sections(tmp_path / "train/label", cells, ".png")
    image, labels = imported("isbi2012", tmp_path, tmp_path / "out")
    assert (image == GREY[:8]).all() and (np.load(tmp_path / "out/unlabelled.npy") == GREY[8:]).all()
    assert (labels[0] == (cells == 0)).all(), "membrane is the class that is learnt"
    assert len(np.unique(labels[1])) == 1 + 2 * 8, "a cell of one section is not that of the next"
    assert ((labels[1] == 0) == (labels[0] == 1)).all()


def test_vnc_has_classes_and_mitochondria_of_soft_edged_masks(tmp_path: Path) -> None:
    grey = np.random.default_rng(2).choice(list(VNC_CLASSES), SHAPE).astype(np.uint8)
    mitochondria = np.random.default_rng(3).integers(0, 256, SHAPE, np.uint8)
    write_sections(tmp_path / "raw", GREY, ".tif")
    write_sections(tmp_path / "labels", grey, ".png")
    write_sections(tmp_path / "mitochondria", mitochondria, ".png")
    image, labels = imported("vnc", tmp_path, tmp_path / "out")
    assert (image == GREY).all() and labels.shape == (2, *SHAPE)
    assert all((labels[0][grey == level] == kind).all() for level, kind in VNC_CLASSES.items())
    assert (labels[1] == (mitochondria >= 128)).all()
    grey[3, 4, 5] = 17
    Image.fromarray(grey[3]).save(tmp_path / "labels/4.png")
    assert "grey levels other than" in refusal("vnc", tmp_path, tmp_path / "other")


def test_sections_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    write_sections(tmp_path / "raw", GREY, ".tif")
    write_sections(tmp_path / "labels", GREY * 0, ".png")
    write_sections(tmp_path / "mitochondria", GREY[:-1] * 0, ".png")
    assert "labels [12, 20, 30], mitochondria [11, 20, 30]" in refusal("vnc", tmp_path, tmp_path / "out")
    Image.fromarray(GREY[0, :, :29]).save(tmp_path / "raw/7.tif")
    Image.fromarray(GREY[11] * 0).save(tmp_path / "mitochondria/12.png")
    told = refusal("vnc", tmp_path, tmp_path / "out")
    assert "7.tif: has [20, 29]" in told and "1.tif [20, 30]" in told
    assert "no .png or .tif sections" in refusal("isbi2012", tmp_path / "empty", tmp_path / "out")
    (tmp_path / "raw/9.tif").write_bytes(b"no image")
    assert "9.tif" in refusal("vnc", tmp_path, tmp_path / "out") or "7.tif" in refusal(
        "vnc", tmp_path, tmp_path / "out"
    )


def test_an_unknown_data_set_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        import_em.main(["cremi", str(tmp_path), str(tmp_path / "out")])
    assert caught.value.exit_code == WRONG_CALL and "fib25" in caught.value.problems[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "shape"),
    [
        ("fib25", "fib25/training_sample2", (140, 250, 250)),
        ("isbi2012", "isbi2012", (24, 512, 512)),
        ("vnc", "vnc_sstem/stack1", (16, 1024, 1024)),
    ],
)
def test_the_real_data_have_their_borders_where_the_image_does(
    real_data: Path, tmp_path: Path, name: str, source: str, shape: tuple[int, int, int]
) -> None:
    """Dark lines lie between labels, in every section by itself: labels and images are in the same order."""
    image, labels = imported(name, real_data / "em" / source, tmp_path)
    assert image.shape == labels.shape[-3:] and image.shape[1:] == shape[1:] and len(image) == shape[0]
    borders = (
        labels[0] == 1
        if labels.ndim == 4
        else labels != scipy.ndimage.shift(labels, (0, 1, 1), order=0, mode="nearest")
    )
    contrast = [
        float(section[~edge].mean() - section[edge].mean()) for section, edge in zip(image, borders, strict=True)
    ]
    assert min(contrast) > 8, contrast
