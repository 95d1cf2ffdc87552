"""Segmentation metrics against scikit-image, hand-counted answers, and what must not change them."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize

from common.errors import UserError
from common.metrics import segmentation
from common.metrics.segmentation import (
    Overlaps,
    RandScore,
    VariationOfInformation,
    adapted_rand,
    add_overlaps,
    boundary_f1,
    count_overlaps,
    cremi_score,
    dice,
    instance_scores,
    jaccard,
    label_boundaries,
    mask_overlap,
    variation_of_information,
    without_truth,
)


def cells(seed: int, shape: tuple[int, int, int], number: int) -> np.ndarray:
    """Random cells around seeds, with background between some; int64."""
    draw = np.random.default_rng(seed)
    points = draw.uniform(0, 1, (number, 3)) * shape
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    nearest = np.argmin(((grid[..., None, :] - points) ** 2).sum(-1), -1) + 1
    background = scipy.ndimage.gaussian_filter(draw.standard_normal(shape), 2)
    return np.where(background > 0.08, 0, nearest)


def as_dict(table: Overlaps) -> dict[tuple[int, int], int]:
    rows, columns = table.truth_ids[table.row].tolist(), table.segment_ids[table.column].tolist()
    return dict(zip(zip(rows, columns, strict=True), table.voxels.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_the_table_counts_every_voxel_once(seed: int, dtype: type) -> None:
    truth, found = cells(seed, (7, 9, 11), 12), cells(seed + 50, (7, 9, 11), 5)
    pairs, counts = np.unique(np.stack([truth.ravel(), found.ravel()], 1), axis=0, return_counts=True)
    expected = {(int(a), int(b)): int(n) for (a, b), n in zip(pairs, counts, strict=True)}
    assert as_dict(count_overlaps(truth.astype(dtype), found.astype(dtype))) == expected


def test_ids_of_64_bits_stay_apart() -> None:
    """As floats they would be one."""
    truth = np.array([2**63, 2**63 + 1, 2**64 - 1], np.uint64)
    found = np.array([2**53, 2**53 + 1, 2**53 + 1], np.uint64)
    expected = {(2**63, 2**53): 1, (2**63 + 1, 2**53 + 1): 1, (2**64 - 1, 2**53 + 1): 1}
    assert as_dict(count_overlaps(truth, found)) == expected


def test_blocks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = cells(1, (8, 9, 10), 9), cells(2, (8, 9, 10), 7)
    whole = as_dict(count_overlaps(truth, found))
    assert as_dict(add_overlaps([count_overlaps(truth[z], found[z]) for z in range(8)])) == whole
    monkeypatch.setattr(segmentation, "BLOCK", 37)
    assert as_dict(count_overlaps(truth, found)) == whole
    monkeypatch.setattr(segmentation, "DENSE", 0)
    assert as_dict(count_overlaps(truth, found)) == whole


@pytest.mark.parametrize(
    ("labels", "words"), [(np.zeros((2, 2)), "float64"), (np.array([[0, -1]]), "-1"), (np.array([["a"]]), "<U1")]
)
def test_labels_that_are_no_ids_are_refused(labels: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        count_overlaps(np.zeros(labels.shape, np.uint8), labels)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ignored", [True, False])
def test_adapted_rand_and_information_equal_scikit_image(seed: int, ignored: bool) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    truth, found = cells(seed, (10, 20, 24), 15), cells(seed + 9, (10, 20, 24), 20)
    table = count_overlaps(truth, found)
    table = without_truth(table, 0) if ignored else table
    left_out = (0,) if ignored else ()
    rand, information = adapted_rand(table), variation_of_information(table)
    error, precision, recall = metrics.adapted_rand_error(truth, found, ignore_labels=left_out)
    assert rand.error == pytest.approx(error, abs=1e-12)
    assert sorted([rand.precision, rand.recall]) == pytest.approx(sorted([precision, recall]), abs=1e-12)
    expected = metrics.variation_of_information(truth, found, ignore_labels=left_out)
    assert [information.split, information.merge] == pytest.approx(expected.tolist(), abs=1e-9)
    assert cremi_score(rand, information) == pytest.approx(np.sqrt(error * expected.sum()))


def test_splits_and_merges_are_told_apart() -> None:
    """One object of eight voxels cut into halves: one bit of split; joined with another as large: one bit of merge."""
    one, halves = np.full(8, 1), np.repeat([1, 2], 4)
    split, merged = count_overlaps(one, halves), count_overlaps(halves, one)
    assert variation_of_information(split) == VariationOfInformation(1.0, 0.0)
    assert variation_of_information(merged) == VariationOfInformation(0.0, 1.0)
    assert adapted_rand(split).precision == adapted_rand(merged).recall == 1
    assert adapted_rand(split).recall == adapted_rand(merged).precision == pytest.approx(24 / 56)
    assert adapted_rand(split).error == pytest.approx(1 - 2 * 24 / (56 + 24))


def test_names_of_objects_do_not_matter_and_equal_partitions_are_perfect() -> None:
    truth, found = cells(3, (9, 10, 11), 10), cells(4, (9, 10, 11), 10)
    names = np.random.default_rng(0).permutation(1000)[:20].astype(np.uint64) + 2**40
    table, renamed = count_overlaps(truth, found), count_overlaps(truth, names[found])
    assert adapted_rand(renamed) == adapted_rand(table)
    assert variation_of_information(renamed).split == pytest.approx(variation_of_information(table).split)
    same = count_overlaps(truth, names[truth])
    assert adapted_rand(same) == RandScore(0.0, 1.0, 1.0)
    assert variation_of_information(same) == VariationOfInformation(0.0, 0.0)


def test_nothing_to_judge_is_no_error() -> None:
    empty = np.zeros((0, 4, 4), np.uint8)
    for table in (count_overlaps(empty, empty), without_truth(count_overlaps(np.zeros(5, int), np.ones(5, int)), 0)):
        assert adapted_rand(table).error == 0 and variation_of_information(table) == VariationOfInformation(0.0, 0.0)
    assert instance_scores(count_overlaps(empty, empty), (0.5,))[0].average_precision == 1


def test_instances_are_matched_one_to_one_at_each_threshold() -> None:
    """Truth: two objects of 10 and 6 voxels. Found: 8 of the first, 3 and 3 of the second, and a false one of 4."""
    truth = np.array([1] * 10 + [2] * 6 + [0] * 8)
    found = np.array([1] * 8 + [0] * 2 + [2] * 3 + [3] * 3 + [0] * 4 + [4] * 4)
    low, half, strict = instance_scores(count_overlaps(truth, found), (0.3, 0.5, 0.75))
    assert (low.tp, low.fp, low.fn) == (2, 2, 0)
    assert (
        (half.tp, half.fp, half.fn) == (2, 2, 0) and half.average_precision == 0.5 and half.f1 == pytest.approx(2 / 3)
    )
    assert (strict.tp, strict.fp, strict.fn) == (1, 3, 1) and strict.average_precision == pytest.approx(0.2)


def test_background_is_no_object() -> None:
    truth, found = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 5])
    (score,) = instance_scores(count_overlaps(truth, found), (1.0,))
    assert (score.tp, score.fp, score.fn) == (1, 0, 0)
    (missed,) = instance_scores(count_overlaps(truth, np.zeros(4, int)), (0.5,))
    assert (missed.tp, missed.fp, missed.fn) == (0, 0, 1)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5])
def test_no_matching_finds_more_instances(threshold: float) -> None:
    """Against scipy's assignment on a dense table of what qualifies."""
    truth, found = cells(5, (8, 16, 16), 30), cells(6, (8, 16, 16), 40)
    table = count_overlaps(truth, found)
    dense = np.zeros((truth.max() + 1, found.max() + 1))
    for (a, b), voxels in as_dict(table).items():
        dense[a, b] = voxels / ((truth == a).sum() + (found == b).sum() - voxels)
    qualifies = (dense >= threshold)[1:, 1:]
    rows, columns = scipy.optimize.linear_sum_assignment(-qualifies.astype(float))
    assert instance_scores(table, (threshold,))[0].tp == int(qualifies[rows, columns].sum())


def test_masks() -> None:
    truth, mask = np.array([True, True, False, False]), np.array([True, False, True, False])
    everywhere, nothing = np.ones(4, bool), np.zeros(4, bool)
    overlap = mask_overlap(truth, mask, everywhere)
    assert overlap.tolist() == [1, 2, 2] and dice(overlap) == 0.5 and jaccard(overlap) == pytest.approx(1 / 3)
    assert (
        dice(mask_overlap(nothing, nothing, everywhere)) == 1 and jaccard(mask_overlap(truth, nothing, everywhere)) == 0
    )
    assert mask_overlap(truth, mask, ~mask).tolist() == [0, 1, 0]
    assert jaccard(np.stack([overlap, overlap])) == jaccard(overlap)


def test_boundaries_lie_on_both_sides_of_a_face() -> None:
    labels = np.zeros((3, 4, 5), int)
    labels[:, :, 3:] = 7
    expected = np.zeros(labels.shape, bool)
    expected[:, :, 2:4] = True
    np.testing.assert_array_equal(label_boundaries(labels), expected)


def test_boundary_f1_measures_in_nanometres() -> None:
    """A face that is one section off, 40 nm, and the same one pixel off, 4 nm."""
    truth, section, pixel = (np.zeros((12, 12, 12), int) for _ in range(3))
    truth[6:], section[7:] = 1, 1
    size = (40.0, 4.0, 4.0)
    everywhere = np.ones(truth.shape, np.bool_)
    assert boundary_f1(truth, truth, everywhere, size, 1.0) == 1
    assert (
        boundary_f1(truth, section, everywhere, size, 39.0) == 0.5
        and boundary_f1(truth, section, everywhere, size, 40.0) == 1
    )
    truth[:], pixel[:] = 0, 0
    truth[:, 6:], pixel[:, 7:] = 1, 1
    assert (
        boundary_f1(truth, pixel, everywhere, size, 3.9) == 0.5
        and boundary_f1(truth, pixel, everywhere, size, 4.0) == 1
    )
    nothing, something, cube = np.zeros((4, 4, 4), int), truth[:4, 5:9, :4], everywhere[:4, :4, :4]
    assert boundary_f1(nothing, nothing, cube, size, 1.0) == 1 and boundary_f1(nothing, something, cube, size, 1.0) == 0
    around = truth.copy()
    around[:, :6] = 2  # two objects; found as one: nothing of their boundary
    assert boundary_f1(around, np.ones_like(around), everywhere, size, 50.0) == 0
    assert boundary_f1(around, around, everywhere & (around == 2), size, 1.0) == 1
