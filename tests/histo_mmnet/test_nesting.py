"""Nested fields: found to the pixel on fields cut from real slides, and composites are made of them."""

import csv
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from common.errors import BAD_DATA, UserError
from data.phantoms.histo import write_phantom
from data.phantoms.histo_settings import HistoPhantom
from histo_mmnet.composites import all_composites, chains
from histo_mmnet.dataset import CompositeStream
from histo_mmnet.names import MAGNIFICATIONS, Magnification
from histo_mmnet.nesting import as_fields, correlations, nesting_of, peak, places_in, read_nesting, write_nesting
from histo_mmnet.scan import scan
from histo_mmnet.slides import Album, Nesting, Place, Slide, slides_of
from tests.histo_mmnet.small_runs import records_of

SETTINGS = HistoPhantom(benign_accessions=3, malignant_accessions=3, sites=(5, 5), missing_share=0.5, size=(92, 140))


@pytest.fixture(scope="module")
def breast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(SETTINGS, tmp_path_factory.mktemp("histo") / "phantom", 1)


@pytest.fixture(scope="module")
def nesting(breast: Path) -> Nesting:
    return nesting_of(slides_of(scan(breast), {}), Album(SETTINGS.size, "none", True, {}))


def texture(seed: int, number: int) -> torch.Tensor:
    """Smooth noise (number, 3, 60, 80)."""
    noise = torch.randn(number, 3, 60, 80, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2)


def test_a_cut_is_found_where_it_was_cut_whatever_gain_and_offset() -> None:
    parents = texture(0, 3)
    field = parents[1, :, 20:44, 31:63] * torch.tensor([0.5, 2.0, 1.3])[:, None, None] + 0.2
    (scores,) = correlations(field[None], parents)
    assert int(scores.flatten(1).amax(1).argmax()) == 1
    score, y, x = peak(scores[1])
    assert score == pytest.approx(1, abs=1e-6) and (round(y), round(x)) == (20, 31)
    assert scores.max() <= 1 + 1e-6 and scores[0].max() < 0.6


def test_correlations_equal_those_of_scikit_image() -> None:
    features = pytest.importorskip("skimage.feature")
    parents, field = texture(1, 1), texture(2, 1)[:, :, :20, :25]
    (scores,) = correlations(field, parents)
    expected = np.mean([features.match_template(parents[0, c].numpy(), field[0, c].numpy()) for c in range(3)], 0)
    assert np.allclose(scores[0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_empty_fields_lie_nowhere(level: float) -> None:
    flat = torch.full((1, 3, 20, 30), level, dtype=torch.float64)
    for field, parents in ((flat, texture(3, 2)), (flat, flat.repeat(1, 1, 2, 2)), (texture(3, 1)[:, :, :9, :9], flat)):
        (scores,) = correlations(field, parents)
        assert torch.isfinite(scores).all() and scores.abs().max() < 0.5


def test_a_peak_lies_between_pixels() -> None:
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    score, at_y, at_x = peak(1 - 0.01 * (y - 4.3) ** 2 - 0.02 * (x - 6.8) ** 2)
    assert score > 0.99 and (at_y, at_x) == (pytest.approx(4.3, abs=1e-3), pytest.approx(6.8, abs=1e-3))
    assert peak(torch.zeros(1, 1)) == (0.0, 0.0, 0.0)


def test_fields_cut_from_real_slides_are_found_to_the_pixel(real_data: Path) -> None:
    """All 15 of them, among the fields of their own slide; the nearest in other slides stays below what counts."""
    folder = real_data / "histo" / "wsi_nested"
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    boxes = {folder.parent / row["path"]: row for row in rows}
    album, right = Album(size_of(next(iter(boxes))), "none", True, {}), 0
    for coarse, fine in itertools.pairwise(MAGNIFICATIONS):
        for slide in sorted({row["slide"] for row in rows}):
            inner, outer, others = (
                tuple(path for path, row in boxes.items() if row["mag"] == str(m) and (row["slide"] == slide) == own)
                for m, own in ((fine, True), (coarse, True), (coarse, False))
            )
            for path, place in places_in(inner, outer, coarse / fine, album).items():
                child, parent = boxes[path], boxes[place.parent]
                pixel = float(parent["w0"]) / album.size[1]
                away = [(float(child[f"{axis}0"]) - float(parent[f"{axis}0"])) / pixel for axis in "yx"]
                right += np.hypot(place.y - away[0], place.x - away[1]) < 1
                assert parent["field"] == child["field"]
            assert not places_in(inner, others, coarse / fine, album)
    assert right == 15


def size_of(path: Path) -> tuple[int, int]:
    with Pictures.open(path) as picture:
        return picture.height, picture.width


def test_simulated_fields_are_found(breast: Path, nesting: Nesting) -> None:
    records = records_of(breast)
    rights = [records[path.name]["site"] == records[place.parent.name]["site"] for path, place in nesting.items()]
    there = {(path.parents[1], records[path.name]["site"], path.parent.name) for path in breast.rglob("*.png")}
    pairs = sum(
        (slide, site, f"{fine}X") in there
        for coarse, fine in itertools.pairwise(MAGNIFICATIONS)
        for slide, site, m in there
        if m == f"{coarse}X"
    )
    assert np.mean(rights) > 0.97 and sum(rights) >= 0.9 * pairs > 20


def test_known_defect_9_composites_show_fields_that_lie_inside_each_other(breast: Path, nesting: Nesting) -> None:
    """The original's i-th composite took the i-th file of each magnification, whatever it showed."""

    def kept_pairs(known: Nesting) -> float:
        composites = all_composites(slides_of(scan(breast), known), MAGNIFICATIONS)
        shown = {pair for c in composites for pair in itertools.pairwise(c.paths)}
        return float(np.mean([(place.parent, path) in shown for path, place in nesting.items()]))

    assert kept_pairs({}) < 0.8 and kept_pairs(nesting) == 1

    slides = slides_of(scan(breast), nesting)
    stream = CompositeStream(slides, MAGNIFICATIONS, Album(SETTINGS.size, "none", True, {}), 0.0, 0, 3)
    kept: Counter[bool] = Counter()
    for position in range(200):
        _, paths, _ = stream.draw(position)
        for inner, outer in itertools.pairwise(paths[::-1]):
            if inner is not None and outer is not None and inner in nesting:
                kept[nesting[inner].parent == outer] += 1
    assert kept[True] > 0.75 * kept.total()


def slide_of(counts: dict[Magnification, int], inside: dict[str, str]) -> Slide:
    """A slide with files 40-0.png, 40-1.png, 100-0.png ..."""
    images = {m: tuple(Path(f"{m}-{k}.png") for k in range(n)) for m, n in counts.items()}
    places = {Path(f"{a}.png"): Place(Path(f"{b}.png"), 0.0, 0.0, 0.9) for a, b in inside.items()}
    return Slide("s", "1", 0, images, places)


def test_chains_begin_with_what_nothing_lies_in() -> None:
    slide = slide_of({40: 2, 100: 2, 400: 1}, {"100-1": "40-0"})
    assert chains(slide, MAGNIFICATIONS) == [
        {3: Path("400-0.png")},
        {1: Path("100-0.png")},
        {1: Path("100-1.png"), 0: Path("40-0.png")},
        {0: Path("40-1.png")},
    ]
    assert chains(slide, (40,)) == [{0: Path("40-0.png")}, {0: Path("40-1.png")}]


@pytest.mark.parametrize("inside", [{}, {"100-1": "40-0"}, {"100-0": "40-1", "100-1": "40-1", "400-0": "200-0"}])
def test_whatever_is_nested_every_photograph_is_judged(inside: dict[str, str]) -> None:
    slide = slide_of({40: 2, 100: 3, 200: 1, 400: 5}, inside)
    composites = all_composites([slide], MAGNIFICATIONS)
    assert {p for c in composites for p in c.paths} == {path for paths in slide.images.values() for path in paths}
    assert len(composites) == 5
    for a, b in inside.items():
        assert any({Path(f"{a}.png"), Path(f"{b}.png")} <= set(c.paths) for c in composites)


def test_a_table_is_read_as_it_was_written(tmp_path: Path, breast: Path, nesting: Nesting) -> None:
    path = tmp_path / "nesting.csv"
    write_nesting(path, nesting)
    again = read_nesting(path, scan(breast))
    assert {a: p.parent for a, p in again.items()} == {a: p.parent for a, p in nesting.items()}
    path.write_text(path.read_text().replace("0.9", "a lot", 1))
    with pytest.raises(UserError, match="delete it") as caught:
        read_nesting(path, scan(breast))
    assert caught.value.exit_code == BAD_DATA


def test_a_coarser_field_is_smaller() -> None:
    assert as_fields(torch.zeros(1, 3, 50, 70), 0.4).shape == (1, 3, 20, 28)


def test_a_place_in_what_is_left_out_is_not_known(breast: Path, nesting: Nesting) -> None:
    """Neither another slide's photograph nor one of another role comes in by it."""
    images = scan(breast)
    first, second = (next(i.path for i in images if i.name.slide == slide and i.name.magnification == 40)
                     for slide in sorted({image.name.slide for image in images})[:2])  # fmt: skip
    inner = next(
        image.path for image in images if image.path.parents[1] == first.parents[1] and image.name.magnification == 100
    )
    across = slides_of(images, {inner: Place(second, 0.0, 0.0, 0.9)})
    assert not any(slide.nesting for slide in across)
    fine = slides_of([image for image in images if image.name.magnification != 40], nesting)
    assert all(
        place.parent in {p for paths in s.images.values() for p in paths} for s in fine for place in s.nesting.values()
    )
    assert any(slide.nesting for slide in fine)
