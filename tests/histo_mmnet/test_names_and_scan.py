"""BreakHis' names and folders: what is read, what is refused, and how a folder differs from the published set."""

from pathlib import Path

import pytest
from PIL import Image as Pictures

from common.config import configure
from common.errors import BAD_DATA, WRONG_CALL, UserError
from histo_mmnet.config import PHANTOM
from histo_mmnet.names import CLASSES, MAGNIFICATIONS, SUBTYPES, SUBTYPES_OF, image_name
from histo_mmnet.places import collect
from histo_mmnet.scan import counts_of, differences, find_breast, published_counts, scan, without_doubled

FILES = (
    "SOB_B_TA-14-4659-40-001.png",
    "SOB_M_DC-14-2523-400-027.png",
    "SOB_B_A-14-22549AB-100-003.png",
    "CNB_M_LC-15-570G-200-010.png",
)


def put(breast: Path, file: str) -> Path:
    """An image in the folders of its name."""
    name = image_name(file)
    assert name is not None
    path = breast.joinpath(*name.folders) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    Pictures.new("RGB", (70, 46), (200, 150, 180)).save(path)
    return path


def problems_of(breast: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        scan(breast)
    assert caught.value.exit_code == BAD_DATA
    return caught.value.problems


@pytest.mark.parametrize("file", FILES)
def test_a_name_is_read_and_written_back(file: str) -> None:
    name = image_name(file)
    assert name is not None and name.file == file
    assert name.folders[0] == CLASSES[name.tumour] and name.folders[2] == SUBTYPES[name.subtype]


def test_slides_of_an_accession_share_it() -> None:
    names = [image_name(f"SOB_B_A-14-22549{suffix}-40-001.png") for suffix in ("AB", "CD", "G")]
    assert {name.accession for name in names if name} == {"14-22549"}
    assert {name.slide for name in names if name} == {f"SOB_B_A_14-22549{s}" for s in ("AB", "CD", "G")}


@pytest.mark.parametrize(
    "file",
    [
        "SOB_B_DC-14-4659-40-001.png",  # a malignant subtype among the benign
        "SOB_B_TA_14-4659-40-001.png",  # a folder's underscore
        "SOB_B_TA-14-4659-50-001.png",
        "SOB_B_TA-14-4659-40-1.png",
        "SOB_B_TA-14-4659ab-40-001.png",
        "SOB_B_TA-14-4659-40-001.png.png",
        "thumb.png",
    ],
)
def test_other_names_are_none(file: str) -> None:
    assert image_name(file) is None


def test_numbers_are_compared_whole() -> None:
    """14-14134 is no part of 14-14134E's slide, though of its accession."""
    one, other = image_name("SOB_B_F-14-14134-40-001.png"), image_name("SOB_B_F-14-14134E-40-001.png")
    assert one is not None and other is not None
    assert one.slide != other.slide and one.accession == other.accession


def test_the_published_table_has_82_slides_and_7909_images() -> None:
    counts = published_counts()
    assert len(counts) == 82 and sum(map(sum, counts.values())) == 7909
    totals = [sum(own[at] for own in counts.values()) for at in range(4)]
    assert totals == [1995, 2081, 2013, 1820]
    names = [image_name(f"{slide.replace('_14-', '-14-').replace('_15-', '-15-')}-40-001.png") for slide in counts]
    assert len({name.accession for name in names if name}) == 70
    assert all(name is not None and name.subtype in SUBTYPES_OF[name.tumour] for name in names)


def test_a_tree_is_read_sorted_whatever_the_order_of_its_folders(tmp_path: Path) -> None:
    for file in reversed(FILES):
        put(tmp_path, file)
    (tmp_path / "benign" / ".hidden").mkdir()
    (tmp_path / "benign" / "Thumbs.db").write_bytes(b"")
    images = scan(tmp_path)
    assert [image.name.file for image in images] == [image.name.file for image in sorted(images)]
    assert {image.name.file for image in images} == set(FILES)


@pytest.mark.parametrize("inside", [".", "breast", "BreaKHis_v1/histology_slides/breast"])
def test_the_root_may_be_any_folder_above(tmp_path: Path, inside: str) -> None:
    put(tmp_path / inside, FILES[0])
    assert len(scan(find_breast(tmp_path))) == 1


def test_a_missing_root_is_said_and_never_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BREAKHIS_ROOT", raising=False)
    for root, words in ((None, "BREAKHIS_ROOT"), (tmp_path, "no benign/SOB"), (tmp_path / "no", "no folder")):
        with pytest.raises(UserError, match=words) as caught:
            find_breast(root)
        assert caught.value.exit_code == WRONG_CALL
    put(tmp_path, FILES[0])
    monkeypatch.setenv("BREAKHIS_ROOT", str(tmp_path))
    assert find_breast(None) == tmp_path


def test_a_strange_name_is_listed_with_an_example(tmp_path: Path) -> None:
    put(tmp_path, FILES[0])
    strange = tmp_path / "benign" / "SOB" / "tubular_adenoma" / "our slide" / "40X" / "one.png"
    strange.parent.mkdir(parents=True)
    Pictures.new("RGB", (70, 46)).save(strange)
    lines = problems_of(tmp_path)
    assert str(strange) in lines[0] and "SOB_B_TA-14-4659-40-001.png" in lines[0] and "rename" in lines[-1]


@pytest.mark.parametrize("level", range(5))
def test_an_image_in_a_folder_that_contradicts_its_name_is_refused(tmp_path: Path, level: int) -> None:
    """Its label, its patient or its magnification would be wrong."""
    path = put(tmp_path, FILES[0])
    other = image_name(FILES[1])
    assert other is not None
    parts = list(path.relative_to(tmp_path).parts)
    parts[level] = other.folders[level] if level != 1 else "CNB"
    moved = tmp_path.joinpath(*parts)
    moved.parent.mkdir(parents=True, exist_ok=True)
    path.rename(moved)
    assert "its name says" in problems_of(tmp_path)[0]


def test_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "benign" / "SOB").mkdir(parents=True)
    assert "holds no image" in problems_of(tmp_path)[0]


def test_differences_from_the_published_set_are_counted_and_named() -> None:
    published = published_counts()
    assert differences(published, published) == ["82 slides, 7,909 images: BreakHis as published"]
    slides = list(published)
    changed = {slide: published[slide] for slide in slides[1:]} | {"SOB_B_A_16-1": (1, 0, 0, 0)}
    changed[slides[2]] = (published[slides[2]][0] - 1, *published[slides[2]][1:])
    lines = "\n".join(differences(changed, published))
    assert (
        slides[0] in lines
        and "SOB_B_A_16-1" in lines
        and f"{slides[2]}: {published[slides[2]][0] - 1} images at 40X" in lines
    )


@pytest.mark.parametrize(
    ("policy", "left"), [("drop", []), ("ductal", ["DC"]), ("lobular", ["LC"]), ("both", ["DC", "LC"])]
)
def test_known_defect_15_the_slide_under_two_labels(tmp_path: Path, policy: str, left: list[str]) -> None:
    """14-13412 stands under DC and LC with the same images: two patients for the original."""
    for subtype in ("DC", "LC"):
        put(tmp_path, f"SOB_M_{subtype}-14-13412-40-001.png")
    put(tmp_path, FILES[0])
    kept, told = without_doubled(scan(tmp_path), policy)  # type: ignore[arg-type]
    assert [image.name.subtype for image in kept if image.name.accession == "14-13412"] == left
    assert (len(told) == 1 and "14-13412" in told[0]) or policy == "both"
    assert any(image.name.file == FILES[0] for image in kept)


def test_real_images(real_data: Path) -> None:
    for folder, number in (("BreaKHis_v1", 17), ("breakhis_500px", 42)):
        images = scan(find_breast(real_data / "histo" / folder))
        counts = counts_of(images)
        assert len(images) == number == sum(map(sum, counts.values()))
        published = published_counts()
        assert all(slide in published for slide in counts)
        assert all(
            own[at] <= published[slide][at] for slide, own in counts.items() for at in range(len(MAGNIFICATIONS))
        )
        assert "BreakHis as published has 82 and 7,909" in differences(counts, published)[0]


def test_links_that_lead_back_are_told(tmp_path: Path) -> None:
    """Two of them in one folder would be followed for ever."""
    inside = tmp_path / "benign" / "SOB"
    inside.mkdir(parents=True)
    (inside / "loop").symlink_to("..")
    with pytest.raises(UserError, match="loop: this link leads back") as caught:
        scan(tmp_path)
    assert caught.value.exit_code == BAD_DATA


def test_photographs_are_not_taken_for_the_place_of_a_phantom(tmp_path: Path) -> None:
    """Forgetting --preset breakhis must not end in figures of simulated patients."""
    (tmp_path / "BreaKHis_v1" / "histology_slides" / "breast" / "benign").mkdir(parents=True)
    config = configure(PHANTOM, [], [f"data.root={tmp_path / 'BreaKHis_v1'}"])
    with pytest.raises(UserError, match="give --preset breakhis") as caught:
        collect(config)
    assert caught.value.exit_code == WRONG_CALL and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="data.root: expected a folder to simulate into"):
        configure(PHANTOM, [], ["data.root=null"])
