"""Figures of known volumes, thresholds against brute force, intervals."""

import dataclasses
import itertools

import numpy as np
import pytest

from common.metrics.intervals import bootstrap_interval
from common.metrics.segmentation import Overlaps, adapted_rand, add_overlaps, dice, jaccard
from em_segmentation.config_inference import Evaluation
from em_segmentation.evaluation import (
    ByteHistogram,
    Truth,
    best_mask_threshold,
    boundary_figure,
    dark_as_boundary,
    grown_into_gaps,
    in_objects,
    instance_figures,
    interval_of_counts,
    interval_of_rand,
    jaccard_curve,
    mask_counts,
    otsu_threshold,
    overlap_pieces,
    pieces,
    rand_error,
    truth_of,
)

SETTINGS = Evaluation(bootstrap_resamples=200)


def everywhere(ids: np.ndarray) -> Truth:
    return Truth(ids, np.ones(ids.shape, bool))


def halves(shape: tuple[int, int, int]) -> np.ndarray:
    """Object 1 in the lower half of x, 2 in the upper."""
    ids = np.ones(shape, np.int64)
    ids[:, :, shape[2] // 2 :] = 2
    return ids


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (4, 2, 2), (9, 7, 5), (50, 3, 40)])
def test_pieces_cover_a_volume_once(shape: tuple[int, int, int]) -> None:
    count = np.zeros(shape, int)
    for where in pieces(shape):
        count[where] += 1
        assert count[where].size > 0
    assert (count == 1).all()
    assert len(pieces(shape)) == min(4, shape[0]) * min(2, shape[1]) * min(2, shape[2])


def test_counts_of_masks_are_those_of_the_annotated_voxels() -> None:
    draw = np.random.default_rng(0)
    truth, found, annotated = (draw.random((9, 7, 5)) < p for p in (0.4, 0.5, 0.8))
    total = mask_counts(truth, found, annotated).sum(0)
    assert total.tolist() == [(truth & found & annotated).sum(), (truth & annotated).sum(), (found & annotated).sum()]
    both, either = (truth & found)[annotated].sum(), (truth | found)[annotated].sum()
    assert jaccard(mask_counts(truth, found, annotated)) == pytest.approx(both / either)
    assert dice(mask_counts(truth, found, annotated)) == pytest.approx(2 * both / (both + either))


def test_masks_of_nothing() -> None:
    """Nothing there and nothing found is perfect; something found where nothing is, is all wrong."""
    nothing, something = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    known = something
    for truth, found, expected in ((nothing, nothing, 1.0), (nothing, something, 0.0), (something, nothing, 0.0)):
        counts = mask_counts(truth, found, known)
        assert jaccard(counts) == dice(counts) == expected
        interval = interval_of_counts(counts, SETTINGS)
        assert interval.low == interval.estimate == interval.high == expected


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_threshold_is_the_best_there_is(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, annotated = draw.random((6, 7, 8)) < draw.uniform(0, 0.6), draw.random((6, 7, 8)) < 0.9
    values = np.clip(truth * draw.integers(0, 120) + draw.normal(90, 40, truth.shape), 0, 255).astype(np.uint8)
    curve = jaccard_curve(ByteHistogram.of(values, truth, annotated))
    masks = [(values >= t)[annotated] for t in range(1, 256)]
    both, either = ([op(mask, truth[annotated]).sum() for mask in masks] for op in (np.logical_and, np.logical_or))
    brute = [b / e if e else 1.0 for b, e in zip(both, either, strict=True)]
    np.testing.assert_allclose(curve, brute)
    assert brute[best_mask_threshold(curve) - 1] == max(brute)


def test_histograms_of_volumes_add_up() -> None:
    draw = np.random.default_rng(0)
    values, truth = draw.integers(0, 256, (4, 5, 6), np.uint8), draw.random((4, 5, 6)) < 0.5
    known = np.ones_like(truth)
    parts = [ByteHistogram.of(values[k], truth[k], known[k]) for k in range(4)]
    added, at_once = parts[0] + parts[1] + parts[2] + parts[3], ByteHistogram.of(values, truth, known)
    assert (added.inside == at_once.inside).all()
    assert (added.outside == at_once.outside).all()


def test_of_equal_thresholds_the_middle_one() -> None:
    """A perfect gap between 50 and 200: the threshold keeps away from both."""
    values = np.array([[[50] * 4 + [200] * 4]], np.uint8)
    curve = jaccard_curve(ByteHistogram.of(values, values > 100, np.ones(values.shape, bool)))
    assert best_mask_threshold(curve) == 126
    assert curve[125] == 1


def test_the_threshold_of_validation_volumes_without_foreground_finds_nothing() -> None:
    values = np.full((2, 3, 4), 77, np.uint8)
    curve = jaccard_curve(ByteHistogram.of(values, np.zeros(values.shape, bool), np.ones(values.shape, bool)))
    assert best_mask_threshold(curve) > 77
    assert set(curve.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_otsu_parts_the_grey_values_as_scikit_image_does(seed: int) -> None:
    filters = pytest.importorskip("skimage.filters")
    draw = np.random.default_rng(seed)
    image = (
        np.concatenate([draw.normal(-1, 0.4, 3000), draw.normal(1.2, 0.6, 1000)]).astype(np.float32).reshape(10, 20, 20)
    )
    ours, theirs = otsu_threshold(image), float(filters.threshold_otsu(image))
    assert abs(ours - theirs) <= (image.max() - image.min()) / 256 + 1e-6
    assert ((image < ours) == (image <= theirs)).mean() > 0.995


def test_dark_voxels_are_boundary() -> None:
    image = np.linspace(-2, 3, 1000, dtype=np.float32).reshape(10, 10, 10)
    values = dark_as_boundary(image)
    assert values.shape == (1, 10, 10, 10)
    assert values.dtype == np.uint8
    assert (np.diff(values.ravel().astype(int)) <= 0).all()
    assert (values.max(), values.min()) == (255, 0)
    assert dark_as_boundary(np.ones((2, 2, 2), np.float32)).max() == 0, "a constant image has no boundaries"


def test_truth_leaves_out_what_is_not_annotated_and_too_small() -> None:
    ids = np.array([[[5, 5, 5, 7, 0, 0, 9, 9]]], np.int64)
    annotated = np.array([[[1, 1, 1, 1, 1, 0, 1, 0]]], bool)
    truth = truth_of(ids, annotated, dataclasses.replace(SETTINGS, min_object_voxels=2))
    assert truth.ids.tolist() == [[[5, 5, 5, 0, 0, 0, 0, 0]]]
    assert truth.judged.tolist() == [[[True, True, True, False, True, False, False, False]]]
    plain = truth_of(ids, annotated, SETTINGS)
    assert plain.ids.tolist() == [[[5, 5, 5, 7, 0, 0, 9, 0]]]
    assert (plain.judged == annotated).all()


def test_a_perfect_segmentation() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (8, 8, 8)).repeat(3, 2)
    figures = instance_figures([overlap_pieces(everywhere(ids), ids * 7)], SETTINGS)
    assert figures["adapted_rand_error"] == pytest.approx(0, abs=1e-12)
    assert figures["voi_split"] == pytest.approx(0, abs=1e-12)
    assert figures["voi_merge"] == pytest.approx(0, abs=1e-12)
    assert figures["average_precision_50"] == figures["average_precision_90"] == figures["v_rand"] == 1
    assert figures["num_true_objects"] == figures["num_objects"] == 3
    assert boundary_figure(everywhere(ids), ids * 7, (1, 1, 1), False, SETTINGS) == 1


def test_two_halves_found_as_one_and_one_found_as_two() -> None:
    """By hand: 2 n^2 pairs of 4 n^2 are right: F1 = 2/3; one bit of information is missing."""
    two, one = halves((8, 8, 8)), np.ones((8, 8, 8), np.int64)
    merged = instance_figures([overlap_pieces(everywhere(two), one)], SETTINGS)
    cut = instance_figures([overlap_pieces(everywhere(one), two)], SETTINGS)
    n = 256
    expected = 1 - 2 * (2 * n * (n - 1)) / (2 * n * (n - 1) + 2 * n * (2 * n - 1))
    assert merged["adapted_rand_error"] == pytest.approx(expected)
    assert cut["adapted_rand_error"] == pytest.approx(expected)
    assert (merged["voi_split"], merged["voi_merge"]) == (0, 1)
    assert (cut["voi_split"], cut["voi_merge"]) == (1, 0)
    assert (merged["rand_recall"], cut["rand_precision"]) == (1, 1)


def test_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    draw = np.random.default_rng(1)
    truth = draw.integers(0, 6, (6, 6, 6)).repeat(2, 0).repeat(2, 1)
    found = np.where(draw.random(truth.shape) < 0.2, draw.integers(1, 9, truth.shape), truth + 1)
    figures = instance_figures([overlap_pieces(everywhere(truth), found)], SETTINGS)
    error, precision, recall = metrics.adapted_rand_error(truth, found, ignore_labels=(0,))
    assert figures["adapted_rand_error"] == pytest.approx(error)
    assert sorted((figures["rand_precision"], figures["rand_recall"])) == pytest.approx(sorted((precision, recall)))
    split, merge = metrics.variation_of_information(truth, found, ignore_labels=(0,))
    assert sorted((figures["voi_split"], figures["voi_merge"])) == pytest.approx(sorted((split, merge)))


def test_false_objects_in_the_background_count_against_precision() -> None:
    """One true object found exactly, three more in the background: 1 of 4; Rand looks at true objects only."""
    truth = np.zeros((8, 8, 8), np.int64)
    truth[:2, :2, :2] = 1
    found = truth.copy()
    found[4, 4], found[6, 2], found[7, 7, :3] = 2, 3, 4
    figures = instance_figures([overlap_pieces(everywhere(truth), found)], SETTINGS)
    assert figures["average_precision_50"] == 0.25
    assert figures["adapted_rand_error"] == pytest.approx(0)
    assert (figures["num_true_objects"], figures["num_objects"]) == (1, 4)
    unknown = Truth(truth, truth > 0)  # nobody looked at the background
    assert instance_figures([overlap_pieces(unknown, found)], SETTINGS)["average_precision_50"] == 1


def test_volumes_whose_ids_coincide_are_told_apart() -> None:
    """Two volumes with the same ids, each perfect: perfect; also with ids beyond 2^48, and where nothing was found."""
    ids = halves((6, 6, 6))
    for large in (0, 2**48, 2**60):
        volumes = [
            overlap_pieces(everywhere(ids + large), ids + large),
            overlap_pieces(everywhere(ids + large), ids + large),
        ]
        figures = instance_figures(volumes, SETTINGS)
        assert figures["adapted_rand_error"] == pytest.approx(0, abs=1e-12)
        assert figures["num_true_objects"] == figures["num_objects"] == 4
    one = [overlap_pieces(everywhere(np.ones((6, 6, 6), np.int64)), np.zeros((6, 6, 6), np.int64))]
    assert rand_error(one) == pytest.approx(0, abs=1e-12)
    assert rand_error(one * 2) == pytest.approx(0, abs=1e-12), "what is missed here and there is not one object"


def test_pieces_add_up_to_the_volume() -> None:
    draw = np.random.default_rng(2)
    truth, found = draw.integers(0, 9, (11, 9, 10)), draw.integers(0, 9, (11, 9, 10))
    tables = overlap_pieces(everywhere(truth), found)
    assert add_overlaps(tables).voxels.sum() == truth.size
    expected = adapted_rand(add_overlaps(in_objects([tables]))).error
    assert rand_error([tables]) == expected


@pytest.mark.parametrize("truth", [np.zeros((5, 5, 5), np.int64), np.ones((1, 1, 1), np.int64)])
def test_volumes_without_true_objects_or_of_one_voxel(truth: np.ndarray) -> None:
    for found in (np.zeros_like(truth), np.arange(truth.size).reshape(truth.shape)):
        tables = [overlap_pieces(everywhere(truth), found)]
        values = instance_figures(tables, SETTINGS)
        assert all(np.isfinite(value) for value in values.values())
        interval = interval_of_rand(tables, SETTINGS)
        assert np.isfinite([interval.low, interval.estimate, interval.high]).all()
        assert np.isfinite(boundary_figure(everywhere(truth), found, (1, 1, 1), False, SETTINGS))


def test_nothing_annotated_at_all() -> None:
    ids = halves((4, 4, 4))
    tables = [overlap_pieces(truth_of(ids, np.zeros(ids.shape, bool), SETTINGS), ids)]
    figures = instance_figures(tables, SETTINGS)
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["num_true_objects"] == figures["num_objects"] == 0
    assert np.isfinite(interval_of_rand(tables, SETTINGS).low)


@pytest.mark.parametrize("seed", range(3))
def test_the_fast_interval_is_that_of_the_tables(seed: int) -> None:
    """Resamples by products of pieces give the pairs that the tables of pieces, and of two of them together, have."""
    draw = np.random.default_rng(seed)
    volumes = []
    for _ in range(2):
        truth = draw.integers(0, 5, (4, 4, 4)).repeat(2, 0).repeat(2, 1).repeat(2, 2)
        volumes.append(overlap_pieces(everywhere(truth), np.where(draw.random(truth.shape) < 0.3, 9, truth)))
    tables = in_objects(volumes)
    n = len(tables)

    def pairs_of(table: Overlaps) -> np.ndarray:
        sizes = (table.voxels, table.truth_voxels, table.segment_voxels)
        return np.array([(one * (one - 1.0)).sum() for one in sizes])

    inside = np.array([pairs_of(table) for table in tables])
    across = np.zeros((n, n, 3))
    for one, two in itertools.permutations(range(n), 2):
        across[one, two] = (pairs_of(add_overlaps([tables[one], tables[two]])) - inside[one] - inside[two]) / 2

    def error(chosen: np.ndarray) -> float:
        total = np.zeros(3)
        for one, two in itertools.product(chosen, chosen):
            total += across[one, two] * n / (n - 1)
        both, truth, segment = total + inside[chosen].sum(0)
        return float(1 - 2 * both / (truth + segment))

    slow = bootstrap_interval(error, n, 100, 0.9, 5)
    fast = interval_of_rand(volumes, dataclasses.replace(SETTINGS, bootstrap_resamples=100, confidence=0.9, seed=5))
    assert fast.estimate == pytest.approx(rand_error(volumes), abs=1e-12)
    assert (fast.low, fast.high) == (pytest.approx(slow.low, abs=1e-12), pytest.approx(slow.high, abs=1e-12))


@pytest.mark.parametrize("seed", range(6))
def test_intervals_contain_the_estimate(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 4, (8, 6, 6)).repeat(3, 0).repeat(3, 1).repeat(3, 2)
    found = np.where(draw.random(truth.shape) < draw.uniform(0.05, 0.5), draw.integers(1, 20, truth.shape), truth + 1)
    volumes = [overlap_pieces(everywhere(truth), found)]
    interval = interval_of_rand(volumes, SETTINGS)
    assert interval.low <= interval.estimate <= interval.high
    assert interval.estimate == pytest.approx(rand_error(volumes))
    counts = mask_counts(truth == 1, found == 2, np.ones(truth.shape, bool))
    interval = interval_of_counts(counts, SETTINGS)
    assert 0 <= interval.low <= interval.estimate == jaccard(counts) <= interval.high <= 1
    assert interval.low < interval.high


def test_boundaries_are_compared_where_there_is_truth() -> None:
    truth = halves((4, 8, 8))
    for shift, expected in ((0, 1.0), (1, 1.0), (3, 0.0)):
        found = np.roll(truth, shift, 2)
        found[:, :, :shift] = 1
        settings = dataclasses.replace(SETTINGS, boundary_tolerance_nm=1.0)
        assert boundary_figure(everywhere(truth), found, (1, 1, 1), False, settings) == pytest.approx(expected)


def test_boundaries_of_sections_that_are_pictures_of_their_own() -> None:
    """Ids of the next section are others, which is no boundary; one of two sections is found."""
    truth = halves((2, 8, 8)) + 10 * np.arange(2)[:, None, None]
    found = truth.copy()
    found[1] = 11
    settings = dataclasses.replace(SETTINGS, boundary_tolerance_nm=0.5)
    assert boundary_figure(everywhere(truth), found, (1, 1, 1), False, settings) == 1
    assert boundary_figure(everywhere(truth), found, (1, 1, 1), True, settings) == pytest.approx(0.5)


@pytest.mark.parametrize("by_section", [False, True])
def test_membranes_that_are_labelled_0_are_one_boundary(by_section: bool) -> None:
    """Found without a gap, in the middle of the true one, and beside it."""
    truth = halves((2, 8, 16))
    found = truth.copy()
    truth[:, :, 6:10] = 0
    settings = dataclasses.replace(SETTINGS, boundary_tolerance_nm=2.0)
    assert boundary_figure(everywhere(truth), found, (1, 1, 1), by_section, settings) == 1
    aside = np.where(np.arange(16) < 3, 1, found * 0 + 2)
    assert boundary_figure(everywhere(truth), aside, (1, 1, 1), by_section, settings) == 0
    ids = np.array([[[1, 0, 0, 0, 0, 0, 2]]])
    assert grown_into_gaps(ids, (9, 9, 2), 4.0).tolist() == [[[1, 1, 1, 0, 2, 2, 2]]]
    assert not grown_into_gaps(ids * 0, (1, 1, 1), 4.0).any()


def test_the_interval_of_a_bad_segmentation_is_about_its_error() -> None:
    """The planted defect: pairs between the copies of a piece, which are right everywhere, took every resample below it."""
    draw = np.random.default_rng(0)
    truth = draw.integers(1, 4, (16, 4, 4)).repeat(2, 0).repeat(8, 1).repeat(8, 2)
    found = draw.integers(1, 2000, truth.shape)
    interval = interval_of_rand([overlap_pieces(everywhere(truth), found)], SETTINGS)
    assert interval.estimate > 0.9
    assert interval.low < interval.estimate < interval.high
