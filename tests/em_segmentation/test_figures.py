"""Pictures: colours that can be told apart, errors where they are, no empty gaps."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_segmentation.augmentation import Patch
from em_segmentation.config import Config
from em_segmentation.evaluation import Curve
from em_segmentation.figures import draw_patch, draw_thresholds
from em_segmentation.objective import build_targets, channel_ranges
from em_segmentation.overlays import (
    CLASS_COLOURS,
    ERRORS,
    PIXELS,
    Shown,
    draw_errors,
    draw_overlay,
    error_kinds,
    id_colours,
    main_partner,
    numbered,
    outlined,
    planes_of,
    thinned,
    to_rgb,
)
from tests.em_segmentation.small_networks import changed, small_config

RIGHT, MERGED, CUT, BOTH = range(4)


def shown(shape: tuple[int, int, int], size: tuple[float, float, float], classes: bool, instances: bool) -> Shown:
    draw = np.random.default_rng(0)
    ids = (np.indices(shape).sum(0) // 5 + 1).astype(np.int64)
    kinds = draw.integers(0, 3, shape).astype(np.uint8)
    return Shown(
        draw.normal(0, 1, shape).astype(np.float32), size, ("membrane", "synapse"), kinds if classes else None,
        kinds if classes else None, ids if instances else None, (ids // 2).astype(np.uint16) if instances else None, 0,
    )  # fmt: skip


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_kinds_of_errors_by_hand() -> None:
    """One true object found in two parts, two found as one, one not found, one right."""
    truth = np.array([[[1, 1, 1, 1, 2, 2, 2, 3, 4, 4, 5, 0]]])
    found = np.array([[[7, 7, 7, 8, 9, 9, 9, 9, 0, 0, 6, 6]]])
    expected = [RIGHT, RIGHT, RIGHT, CUT, RIGHT, RIGHT, RIGHT, MERGED, CUT, CUT, RIGHT, RIGHT]
    kinds = error_kinds(truth, found)
    assert kinds[0, 0].tolist() == expected
    crossed = error_kinds(np.array([[[1, 1, 1, 2, 2, 2]]]), np.array([[[5, 5, 6, 5, 6, 6]]]))
    assert crossed.tolist() == [[[RIGHT, RIGHT, BOTH, BOTH, RIGHT, RIGHT]]]


def test_what_was_not_found_at_all_is_cut() -> None:
    truth = np.ones((2, 3, 4), np.int64)
    assert (error_kinds(truth, np.zeros((2, 3, 4), np.uint8)) == CUT).all()
    assert (error_kinds(truth * 0, truth) == RIGHT).all()


def test_a_found_object_borrows_the_colour_of_its_main_partner() -> None:
    ids, labels = numbered(np.array([[[40, 40, 40, 90, 90]]]))
    assert ids.tolist() == [0, 40, 90]
    found = np.array([[[1, 1, 2, 2, 2]]])
    assert main_partner(found, labels, 4).tolist() == [-1, 1, 2, -1]


def test_colours_are_fixed_and_distinct() -> None:
    ids = np.arange(1, 60)
    colours = id_colours(ids)
    assert np.array_equal(colours, id_colours(ids)), "the same id, the same colour"
    assert np.array_equal(id_colours(ids[5:7]), colours[5:7])
    assert len(np.unique(colours.round(3), axis=0)) == len(ids)
    assert colours.max(1).min() >= 0.7, "bright over grey"
    assert id_colours(np.empty(0, np.int64)).shape == (0, 3)
    for one, other in itertools.combinations((*CLASS_COLOURS, "#000000"), 2):
        assert np.linalg.norm(np.subtract(to_rgb(one), to_rgb(other))) > 0.25, f"{one} and {other} look alike"
    for (_, one), (_, other) in itertools.combinations(ERRORS, 2):
        assert np.linalg.norm(np.subtract(to_rgb(one), to_rgb(other))) > 0.4


def test_outlines_are_opaque_and_background_clear() -> None:
    labels = np.zeros((4, 6), np.int64)
    labels[1:3, 2:5] = 1
    picture = outlined(labels, (30.0, 10.0), np.array([[0, 0, 0], [1, 0.5, 0]]), 0.3)
    assert picture.shape[0] * 6 * 10 == pytest.approx(picture.shape[1] * 4 * 30, rel=0.1), "square pixels"
    assert set(np.unique(picture[..., 3].round(3))) == {0.0, np.float32(0.3), 1.0}
    inside = picture[..., 3] > 0
    assert inside.mean() == pytest.approx(6 / 24, abs=0.01)
    assert (picture[inside][:, :3] == np.array([1, 0.5, 0], np.float32)).all()


def test_large_planes_are_thinned_out() -> None:
    assert max(thinned(np.zeros((5000, 300))).shape) <= 2 * PIXELS
    assert thinned(np.zeros((60, 300))).shape == (60, 300)


def test_the_planes_are_the_middle_ones() -> None:
    volume = np.arange(5 * 7 * 9).reshape(5, 7, 9)
    for plane, expected in zip(planes_of(volume.shape, 0), (volume[2], volume[:, 3], volume[:, :, 4]), strict=True):
        assert np.array_equal(volume[plane.index], expected)
        assert expected.shape == (volume.shape[plane.down], volume.shape[plane.across])


@pytest.mark.parametrize(
    ("shape", "size", "classes", "instances"),
    [
        ((6, 50, 40), (45.0, 5.0, 5.0), True, True),
        ((40, 30, 35), (8.0, 8.0, 8.0), False, True),
        ((12, 33, 60), (24.0, 12.0, 12.0), True, False),
        ((1, 3, 2), (30.0, 6.0, 6.0), True, True),
    ],
)
def test_overlays_have_no_large_gaps(
    tmp_path: Path, shape: tuple[int, int, int], size: tuple[float, float, float], classes: bool, instances: bool
) -> None:
    volume = shown(shape, size, classes, instances)
    draw_overlay(volume, tmp_path / "overlay.png")
    picture = pixels(tmp_path / "overlay.png")
    assert picture.shape[1] > 300 * (1 + 2 * classes + 2 * instances)
    if shape[0] > 1:
        empty = (picture > 250).all(2).all(1)  # white rows
        longest = max((len(list(run)) for is_empty, run in itertools.groupby(empty) if is_empty), default=0)
        assert longest < 0.08 * len(empty)
        assert (picture > 250).all(2).mean() < 0.25
    if instances:
        draw_errors(volume, tmp_path / "errors.png")
        assert pixels(tmp_path / "errors.png").shape[0] > 200


def test_the_map_of_errors_shows_their_colours(tmp_path: Path) -> None:
    """Half of the volume is merged; nothing is drawn in the colours of errors where all is right."""
    volume = shown((20, 40, 40), (8.0, 8.0, 8.0), False, True)
    reddish = []
    for found in (volume.true_ids, np.ones((20, 40, 40), np.int64)):
        assert found is not None
        draw_errors(Shown(*[found if name == "found_ids" else getattr(volume, name) for name in volume.__dict__]),
                    tmp_path / "errors.png")  # fmt: skip
        red, green, blue = pixels(tmp_path / "errors.png").astype(int).transpose(2, 0, 1)
        reddish.append(((red > green + 60) & (red > blue + 60)).mean())
    assert reddish[0] < 0.005
    assert reddish[1] > 0.2


def test_curves_of_thresholds(tmp_path: Path) -> None:
    curves = [
        Curve("adapted Rand error", [200, 150, 100], [0.3, 0.1, 0.2], 150),
        Curve("mitochondria Jaccard index", list(range(1, 256)), list(np.linspace(0, 1, 255)), 255),
    ]
    for number in (1, 2):
        draw_thresholds(curves[:number], tmp_path / f"{number}.png")
    assert pixels(tmp_path / "2.png").shape[1] > 1.7 * pixels(tmp_path / "1.png").shape[1]


@pytest.mark.parametrize(
    "names", [("affinity",), ("semantic", "boundary"), ("distance", "centre", "lsd", "affinity", "semantic")]
)
@pytest.mark.parametrize("classes", [1, 3])
def test_validation_patches_of_all_targets(tmp_path: Path, names: tuple[str, ...], classes: int) -> None:
    many = (0,) * len(names)
    config: Config = changed(
        small_config(), targets={"names": names, "weights": (1.0,) * len(names), "label_channels": many,
                                 "semantic_classes": classes, "semantic_names": ("a", "b")[: max(1, classes - 1)]},
    )  # fmt: skip
    labels = torch.randint(0, 3, (1, 1, 6, 20, 30), generator=torch.Generator().manual_seed(0))
    batch = Patch(torch.randn(1, 1, 6, 20, 30), labels, torch.ones(1, 1, 6, 20, 30, dtype=torch.bool), torch.zeros(1))
    targets = build_targets(batch, config.targets, (24.0, 12.0, 12.0))
    logits = torch.randn(1, max(part.stop for part in channel_ranges(config.targets).values()), 6, 20, 30)
    draw_patch(batch, logits, targets, config, tmp_path / "patch.png")
    assert pixels(tmp_path / "patch.png").shape[1] > 250 * (1 + len(names))
