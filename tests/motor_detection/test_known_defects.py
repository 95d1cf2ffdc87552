"""The known defects of the original system: one test each, so that none comes back.

 1 labels shifted by the patch origin's remainder  tests/motor_detection/test_heatmap.py::test_known_defect_1_labels_are_not_shifted_by_the_remainder_of_the_patch_origin
 2 clipping of scaled gradients, per micro-batch   tests/motor_detection/test_training.py::test_known_defect_2_gradients_are_clipped_once_per_step_after_unscaling
 3 loss not divided by the accumulation            tests/motor_detection/test_training.py::test_known_defect_3_accumulated_gradients_equal_those_of_one_batch
 4 without validation every epoch is the best      tests/motor_detection/test_training.py::test_known_defect_4_without_validation_tomograms_nothing_is_best
 5 one voxel spacing for all tolerances            tests/common/test_detection_metrics.py::test_tolerance_follows_the_spacing_of_each_tomogram_and_axis
 6 matching before gating loses matches            tests/common/test_detection_metrics.py::test_gating_never_costs_a_match
 7 differences of flat indices as distances        tests/common/test_heatmap_metrics.py::test_peak_distance_is_euclidean_and_not_a_difference_of_flat_indices
 8 empty patches scored as hits of cell 0          tests/common/test_heatmap_metrics.py::test_topk_skips_samples_without_a_peak
 9 fractions truncated to voxels                   test_known_defect_9_fractions_of_a_voxel_survive_from_table_to_patch
10 peak sharpness with a floor of 0.5              tests/common/test_heatmap_metrics.py::test_peak_sharpness_has_no_floor
11 presets that augment nothing                    tests/motor_detection/test_augmentation.py::test_known_defect_11_every_preset_augments
12 all predictions of an epoch kept in memory      test_known_defect_12_validation_keeps_picks_and_forgets_maps
13 a graphics card is taken for granted            test_known_defect_13_everything_runs_without_a_graphics_card
14 its own rules are broken in its code            test_known_defect_14_the_rules_are_checked_by_a_machine
15 group norm's statistics depend on the tile      tests/motor_detection/test_model.py::test_known_defect_15_group_norm_depends_on_the_tile_and_batch_norm_does_not
"""  # noqa: E501

import ast
import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.parallel import inference_device, process_group
from motor_detection import validation
from motor_detection.dataset import Sample
from motor_detection.inference import pick_motors
from motor_detection.labels import LabelledTomogram, read_labels
from motor_detection.patches import ByteVolume, PatchPlan, cut_patch
from motor_detection.places import read_tomograms
from motor_detection.tomograms import open_tomogram
from tests.common_runs import ROOT
from tests.motor_detection.small_runs import (
    random_network,
    small_config,
    small_patches,
    train_alone,
    write_labels,
    write_tomograms,
)
from tests.test_house_rules import broken_rules, modules


def test_the_table_above_is_complete_and_every_test_in_it_exists() -> None:
    rows = [line for line in (__doc__ or "").splitlines() if line[:2].strip().isdigit()]
    assert [int(line[:2]) for line in rows] == list(range(1, 16))
    for row in rows:
        place, _, name = row.split()[-1].rpartition("::")
        tree = ast.parse((ROOT / place if place else Path(__file__)).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row


def test_known_defect_9_fractions_of_a_voxel_survive_from_table_to_patch(tmp_path: Path) -> None:
    """The relabelled table stores shares of the shape; truncated to voxels, labels moved by half a voxel on average."""
    motor = np.array([[10.75, 200.5, 301.25]])
    written = LabelledTomogram("tomo", (300, 928, 960), 13.1, motor, 0)
    write_labels(tmp_path / "labels.csv", [written])
    (read,), _ = read_labels(tmp_path / "labels.csv")
    np.testing.assert_allclose(read.motors, motor, atol=1e-9)
    voxels = np.broadcast_to(np.uint8(0), written.shape)
    volume = ByteVolume(voxels, (13.1, 13.1, 13.1), 0.0, 1.0)
    arrays = cut_patch(volume, PatchPlan("single", (0, 190, 290)), read, (32, 32, 32))
    np.testing.assert_allclose(arrays["motors"], [[10.75, 10.5, 11.25]], atol=1e-5)


def test_known_defect_12_validation_keeps_picks_and_forgets_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a batch is scored, no map of the batches before is alive; what is gathered is small."""
    write_tomograms(tmp_path, range(7))
    config = small_config(tmp_path)
    patches = small_patches(config)
    maps: list[weakref.ref[Tensor]] = []
    gathered: list[Any] = []
    whole_score, whole_gather = validation.score_patches, validation.gather_objects

    def watched(batch: Sample, logits: Tensor, heat: Tensor, rest: Any) -> Any:
        assert not [kept for kept in maps if kept() is not None], "maps of earlier batches are still in memory"
        maps.extend([weakref.ref(logits), weakref.ref(heat)])
        return whole_score(batch, logits, heat, rest)

    def noted(rows: Any) -> Any:
        gathered.extend(rows)
        return whole_gather(rows)

    monkeypatch.setattr(validation, "score_patches", watched)
    monkeypatch.setattr(validation, "gather_objects", noted)
    with process_group(True) as device:
        validation.validate(random_network(16, "batch", False), patches, config, device)
    assert len(maps) == len(patches.validation) and len(gathered) == len(patches.validation)
    for _, figures, scored in gathered:
        arrays = [scored.points, scored.scores, scored.truths, scored.spacing_angstrom]
        assert len(figures) < 10 and sum(array.nbytes for array in arrays) < 10_000


def test_known_defect_13_everything_runs_without_a_graphics_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original called .cuda() everywhere. Convert, train, validate and pick, on a machine that has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_tomograms(tmp_path, range(7))
    config = small_config(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    records = train_alone(config, tmp_path / "run", small_patches(config))
    assert len(records) == 1 and np.isfinite(records[0]["loss"])
    assert inference_device() == torch.device("cpu")
    labelled, paths = read_tomograms(config.data, True)
    tomogram = open_tomogram(paths[labelled[0].tomo_id], labelled[0], 0.0)
    peaks = pick_motors([random_network(16, "batch", False)], tomogram, config, inference_device())
    assert peaks.points.shape == (len(peaks.scores), 3)


def test_known_defect_14_the_rules_are_checked_by_a_machine() -> None:
    """Defaults, dict.get and globals, as the original wrote them against its own rules, are found; ours has none."""
    rules = ("default arguments", "global statement", "index directly")
    planted = "CONFIG = {}\ndef train(epochs: int = 25) -> None:\n    global CONFIG\n    CONFIG.get('lr', 1e-3)\n"
    found = " ".join(broken_rules(ast.parse(planted), "motor_detection"))
    assert all(rule in found for rule in rules)
    ours = [path for path in modules() if path.is_relative_to(ROOT / "motor_detection")]
    assert len(ours) > 20
    for path in ours:
        breaches = broken_rules(ast.parse(path.read_text()), "motor_detection")
        assert not [breach for breach in breaches if any(rule in breach for rule in rules)], path
