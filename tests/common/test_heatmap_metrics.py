"""Heat-map figures against known answers, and the published version's faults as planted cases."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.metrics.heatmaps import (
    comprehensive_heatmap_metric,
    peak_distance_cells,
    peak_sharpness,
    soft_dice_score,
    topk_accuracy,
)

SHAPE = (5, 6, 7)


def single_peaks(*cells: tuple[int, int, int]) -> Tensor:
    """One map per cell, 1 there and 0 elsewhere; (B, 1, 5, 6, 7)."""
    maps = torch.zeros(len(cells), 1, *SHAPE)
    for sample, cell in enumerate(cells):
        maps[sample, 0, *cell] = 1
    return maps


def random_maps(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, t = (torch.rand(count, 1, *SHAPE, generator=generator) for _ in range(2))
    return p, t


def test_soft_dice_known_answers() -> None:
    p, t = single_peaks((0, 0, 0), (1, 1, 1), (2, 2, 2)), single_peaks((0, 0, 0), (1, 1, 2), (2, 2, 2))
    p[2] *= 0.5
    assert soft_dice_score(p, t).tolist() == pytest.approx([1, 0, 1 / 1.5], abs=1e-5)
    assert soft_dice_score(torch.zeros_like(p), torch.zeros_like(p)).tolist() == [1, 1, 1]


def test_peak_distance_is_euclidean_and_not_a_difference_of_flat_indices() -> None:
    """One step along z is one cell; as flat indices it would be 42."""
    t = single_peaks((2, 2, 2), (2, 2, 2), (2, 2, 2), (0, 0, 0))
    p = single_peaks((3, 2, 2), (2, 3, 2), (2, 2, 3), (4, 5, 6))
    assert peak_distance_cells(p, t, 0.1).tolist() == pytest.approx([1, 1, 1, np.sqrt(16 + 25 + 36)])
    step_along_z, _, step_along_x, _ = comprehensive_heatmap_metric(p, t, 60, 0.1).tolist()
    assert step_along_z == pytest.approx(step_along_x)


def test_peak_distance_takes_the_nearest_of_two_equal_motors_and_the_farthest_of_tied_answers() -> None:
    t = single_peaks((0, 0, 0))
    t[0, 0, 4, 0, 0] = 1
    assert peak_distance_cells(single_peaks((3, 0, 0)), t, 0.1).tolist() == [1]
    flat = torch.full_like(t, 0.5)
    assert peak_distance_cells(flat, t, 0.1).tolist() == pytest.approx([np.sqrt(4 + 25 + 36)])


def test_comprehensive_metric_equals_its_formula_in_numpy() -> None:
    p, t = random_maps(0, 4)
    found = comprehensive_heatmap_metric(p, t, 60, 0.1)
    for row, p_map, t_map in zip(found, p[:, 0].numpy(), t[:, 0].numpy(), strict=True):
        pearson = np.corrcoef(p_map.ravel(), t_map.ravel())[0, 1]
        peaks = [np.array(np.unravel_index(m.argmax(), SHAPE)) for m in (p_map, t_map)]
        closeness = max(0, 1 - np.linalg.norm(peaks[0] - peaks[1]) / 60)
        expected = 0.5 * pearson + 0.3 * closeness + 0.2 * min(1, p_map.max() / p_map.mean() / 10)
        assert float(row) == pytest.approx(np.clip(expected, 0, 1), abs=1e-5)


def test_comprehensive_metric_of_a_perfect_and_of_a_constant_map() -> None:
    t = single_peaks((1, 2, 3))
    assert float(comprehensive_heatmap_metric(t, t, 60, 0.1)) == pytest.approx(1)
    constant = float(comprehensive_heatmap_metric(torch.full_like(t, 0.1), t, 60, 0.1))
    assert constant < 0.35  # no correlation, no prominence; only closeness on a small map


def test_topk_counts_cells_above_the_true_peak() -> None:
    p, t = random_maps(1, 20)
    flat_p, flat_t = p.flatten(1).numpy(), t.flatten(1).numpy()
    rank = np.array([(a > a[b.argmax()]).sum() for a, b in zip(flat_p, flat_t, strict=True)])
    for k in (1, 20, 100, 210):
        assert topk_accuracy(p, t, k, 0.1).tolist() == (rank < k).tolist()
    assert topk_accuracy(t, t, 1, 0.1).tolist() == [1] * 20


def test_topk_skips_samples_without_a_peak() -> None:
    """On an empty target argmax is cell 0, which a prediction that is high there would be credited for."""
    t = torch.cat([torch.zeros(1, 1, *SHAPE), 0.09 * single_peaks((0, 0, 0)), single_peaks((1, 1, 1))])
    p = single_peaks((0, 0, 0), (0, 0, 0), (1, 1, 1))
    hits = topk_accuracy(p, t, 1, 0.1)
    assert torch.isnan(hits[:2]).all() and hits[2] == 1
    assert float(hits.nanmean()) == 1
    assert torch.isnan(peak_distance_cells(p, t, 0.1)).tolist() == [True, True, False]
    assert torch.isnan(comprehensive_heatmap_metric(p, t, 60, 0.1)).tolist() == [True, True, False]


def test_a_flat_map_is_no_hit() -> None:
    t = single_peaks((0, 0, 0))
    flat = torch.full_like(t, 0.3)
    assert topk_accuracy(flat, t, 209, 0.1).tolist() == [0] and topk_accuracy(flat, t, 210, 0.1).tolist() == [1]


def test_peak_sharpness_has_no_floor() -> None:
    """A flat map has sharpness 0, where a sigmoid of a positive ratio could not fall below one half."""
    maps = torch.cat([torch.full((1, 1, *SHAPE), 0.7), torch.zeros(1, 1, *SHAPE), single_peaks((1, 2, 3))])
    assert peak_sharpness(maps).tolist() == pytest.approx([0, 0, 1 - 1 / 210], abs=1e-6)


def test_figures_do_not_depend_on_the_batch_or_on_flips() -> None:
    p, t = random_maps(2, 6)
    for figure in (
        soft_dice_score,
        lambda a, b: peak_distance_cells(a, b, 0.1),
        lambda a, b: comprehensive_heatmap_metric(a, b, 60, 0.1),
        lambda a, b: topk_accuracy(a, b, 20, 0.1),
        lambda a, b: peak_sharpness(a),
    ):
        whole = figure(p, t)
        assert torch.allclose(whole, torch.cat([figure(p[i : i + 1], t[i : i + 1]) for i in range(6)]))
        assert torch.allclose(whole, figure(p.flip(2, 4), t.flip(2, 4)), atol=1e-6)
        assert torch.allclose(whole.flip(0), figure(p.flip(0), t.flip(0)), atol=1e-6)
        assert figure(p.bfloat16(), t.bfloat16()).dtype == torch.float32


def test_shapes_are_checked() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        soft_dice_score(torch.zeros(2, 1, 3, 3, 3), torch.zeros(1, 1, 3, 3, 3))
    with pytest.raises(AssertionError, match=r"\(B, 1, z, y, x\)"):
        soft_dice_score(torch.zeros(2, 3, 3, 3), torch.zeros(2, 3, 3, 3))
