"""A run is judged: thresholds from validation alone, every figure there and finite, whatever the volumes hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.volumes.opening import open_volume
from common.volumes.streaming import open_streamed
from common.volumes.volume import Volume
from em_segmentation.config import PHANTOM, Config
from em_segmentation.judging import Verdict, check_judged, judge, predict_role
from em_segmentation.judging_instances import Predictions, Roles
from em_segmentation.pages import summary, write_pages
from em_segmentation.prediction import note_of
from em_segmentation.targets import build_target
from em_segmentation.volumes import Annotated, measure_scale
from tests.em_segmentation.small_networks import alone, changed, image_at, random_model, small_config, write_checkpoint

SHAPE = (8, 24, 20)
VOXEL_SIZE = (24.0, 12.0, 12.0)
PHANTOM_KEYS = ("mitochondria_jaccard", "adapted_rand_error", "voi_split", "voi_merge", "baseline_mitochondria_jaccard",
                "baseline_adapted_rand_error")  # fmt: skip


def true_labels(seed: int) -> np.ndarray:
    """Cells of a Voronoi diagram parted by background, and a mask in some of them; int64 [2, z, y, x]."""
    draw = np.random.default_rng(seed)
    centres = draw.uniform(0, 1, (9, 3)) * SHAPE
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    distance = np.linalg.norm((grid[..., None, :] - centres) * (2, 1, 1), axis=-1)
    nearest = np.sort(distance, -1)
    ids = np.where(nearest[..., 1] - nearest[..., 0] > 1.5, distance.argmin(-1) + 1, 0)
    return np.stack([ids, (nearest[..., 0] < 4).astype(int)]).astype(np.int64)


def volume_at(folder: Path, name: str, labels: np.ndarray) -> Annotated:
    """An image, dark between objects, with its labels."""
    draw = np.random.default_rng(7)
    grey = 100 + 80 * (labels[0] > 0) - 60 * (labels[1] > 0) + draw.normal(0, 10, SHAPE)
    np.save(folder / f"{name}.npy", np.clip(grey, 0, 255).astype(np.uint8))
    np.save(folder / f"{name}_labels.npy", labels)
    image = open_volume(folder / f"{name}.npy", "auto")
    label = open_volume(folder / f"{name}_labels.npy", "czyx")
    return Annotated(image, label, None, (0, SHAPE[0]), VOXEL_SIZE, measure_scale(image, (0, SHAPE[0])))


def prediction_at(folder: Path, name: str, labels: np.ndarray, noise: float, config: Config) -> Volume:
    """The true affinities and mask with noise, as bytes, and the note that predict_role leaves."""
    ids, mask = torch.from_numpy(labels)[:, None]
    known = torch.ones_like(ids, dtype=torch.bool)
    parts = {"affinity": build_target("affinity", ids, known, config.targets, VOXEL_SIZE).values[0].numpy(),
             "semantic": mask.float().numpy()}  # fmt: skip
    values = np.concatenate([parts[target] for target in config.targets.names])
    values = 0.15 + 0.7 * values + np.random.default_rng(3).normal(0, noise, values.shape)
    np.save(folder / f"{name}_prediction.npy", np.clip(values * 255, 0, 255).round().astype(np.uint8))
    note_of(folder / f"{name}_prediction.npy").write_text("made from it")
    return open_volume(folder / f"{name}_prediction.npy", "czyx")


def phantom_like() -> Config:
    """Affinities and one mask."""
    return changed(
        PHANTOM,
        data={"voxel_size_nm": VOXEL_SIZE},
        targets={"semantic_classes": 1, "semantic_names": ("mitochondria",), "loss_functions": ()},
        decoding={"thresholds": (200, 150, 100, 50), "exclusive_classes": ()},
    )


def judged(folder: Path, config: Config, tests: list[np.ndarray], vals: list[np.ndarray], noise: float) -> Verdict:
    """judge() on volumes of these labels with predictions of these labels."""
    roles: Roles = {"val": [], "test": []}
    predictions: Predictions = {"val": [], "test": []}
    for role, labels_of_role in (("val", vals), ("test", tests)):
        for number, labels in enumerate(labels_of_role):
            roles[role].append(volume_at(folder, f"{role}_{number}", labels))
            predictions[role].append(prediction_at(folder, f"{role}_{number}", labels, noise, config))
    verdict = judge(roles, predictions, quick(config), folder)
    json.dumps(verdict.figures, allow_nan=False)
    assert summary(verdict, quick(config))
    return verdict


def quick(config: Config) -> Config:
    return changed(config, evaluation={"bootstrap_resamples": 100})


def test_a_good_prediction_is_judged_good(tmp_path: Path) -> None:
    found = judged(tmp_path, phantom_like(), [true_labels(0)], [true_labels(1)], 0.1)
    figures = found.figures
    assert set(PHANTOM_KEYS) <= figures.keys()
    assert figures["mitochondria_jaccard"] > 0.97
    assert figures["adapted_rand_error"] < 0.05
    assert (
        figures["mitochondria_jaccard_low"] <= figures["mitochondria_jaccard"] <= figures["mitochondria_jaccard_high"]
    )
    assert figures["adapted_rand_error"] < figures["baseline_adapted_rand_error"]
    assert figures["mitochondria_jaccard"] > figures["baseline_mitochondria_jaccard"]
    assert figures["chance_mitochondria_jaccard"] == pytest.approx(true_labels(0)[1].mean())
    assert (figures["test_volumes"], figures["validation_volumes"]) == (1, 1)
    assert found.classes is not None and found.instances is not None
    assert [curve.name for curve in found.curves] == ["mitochondria Jaccard index", "adapted Rand error"]
    for curve in found.curves:
        best = max(curve.values) if "Jaccard" in curve.name else min(curve.values)
        assert curve.values[curve.thresholds.index(curve.chosen)] == best


def test_the_chosen_thresholds_never_look_at_the_test_volumes(tmp_path: Path) -> None:
    """Planted: quite other test labels, images and predictions; everything that is chosen stays."""
    chosen = []
    for number, tests in enumerate(
        ([true_labels(0)], [np.zeros((2, *SHAPE), np.int64)], [true_labels(5), true_labels(6)])
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = judged(folder, phantom_like(), tests, [true_labels(1)], 0.25)
        words = (found.figures["baseline_mitochondria"], found.figures["baseline_instances"])
        chosen.append((found.figures["semantic_threshold"], found.figures["instance_threshold"], found.curves, words))
    assert chosen[0] == chosen[1] == chosen[2]


def test_the_thresholds_do_look_at_the_validation_volumes(tmp_path: Path) -> None:
    found = []
    for number, noise in enumerate((0.02, 0.5)):
        (tmp_path / str(number)).mkdir()
        found.append(judged(tmp_path / str(number), phantom_like(), [true_labels(0)], [true_labels(1)], noise).curves)
    assert found[0] != found[1]


def test_without_validation_volumes_the_configs_thresholds_hold(tmp_path: Path) -> None:
    config = changed(phantom_like(), decoding={"threshold": 77})
    found = judged(tmp_path, config, [true_labels(0)], [], 0.1)
    assert found.curves == []
    assert found.figures["instance_threshold"] == 77
    assert "semantic_threshold" not in found.figures
    assert found.figures["baseline_mitochondria"] == "Otsu threshold of the raw image, dark side"
    assert set(PHANTOM_KEYS) <= found.figures.keys()


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_test_volume_without_anything_in_it(tmp_path: Path, noise: float) -> None:
    found = judged(tmp_path, phantom_like(), [np.zeros((2, *SHAPE), np.int64)], [true_labels(1)], noise).figures
    assert found["num_true_objects"] == 0
    assert found["chance_mitochondria_jaccard"] == 0
    assert found["mitochondria_jaccard"] in (0.0, 1.0)
    assert found["adapted_rand_error"] == 0


def test_validation_volumes_without_anything_in_them(tmp_path: Path) -> None:
    found = judged(tmp_path, phantom_like(), [true_labels(0)], [np.zeros((2, *SHAPE), np.int64)], 0.1).figures
    assert found["instance_threshold"] == 200, "of equals the first"


def test_several_test_volumes_of_equal_ids(tmp_path: Path) -> None:
    """Twice the same volume: the figures of one, twice the objects."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = judged(tmp_path / "one", phantom_like(), [true_labels(0)], [true_labels(1)], 0.2).figures
    two = judged(tmp_path / "two", phantom_like(), [true_labels(0)] * 2, [true_labels(1)], 0.2).figures
    for name in (*PHANTOM_KEYS, "average_precision_50", "boundary_f1", "v_rand"):
        assert two[name] == pytest.approx(one[name]), name
    assert two["num_true_objects"] == 2 * one["num_true_objects"]
    assert two["num_objects"] == 2 * one["num_objects"]


def test_several_classes(tmp_path: Path) -> None:
    """Softmax bytes: each class has its own figures; the best of all channels is found."""
    config = changed(
        small_config(),
        targets={"names": ("semantic",), "weights": (1.0,), "label_channels": (1,), "semantic_classes": 3,
                 "semantic_names": ("membrane", "vesicle")},
    )  # fmt: skip
    labels = true_labels(0)
    labels[1] += labels[1] * (labels[0] % 2)  # classes 0, 1, 2
    np.save(tmp_path / "p.npy", np.eye(3, dtype=np.uint8)[labels[1]].transpose(3, 0, 1, 2) * 200)
    note_of(tmp_path / "p.npy").write_text("made from it")
    roles = {"val": [], "test": [volume_at(tmp_path, "test", labels)]}
    found = judge(roles, {"val": [], "test": [open_volume(tmp_path / "p.npy", "czyx")]}, quick(config), tmp_path)
    assert found.figures["membrane_jaccard"] == found.figures["vesicle_jaccard"] == 1
    assert found.figures["chance_vesicle_jaccard"] == pytest.approx((labels[1] == 2).mean())
    assert found.instances is None
    mixed = np.load(tmp_path / "p.npy")
    mixed[1, labels[1] == 2], mixed[2, labels[1] == 2] = 100, 90  # a vesicle that touches a membrane and looks like one
    np.save(tmp_path / "p.npy", mixed)
    note_of(tmp_path / "p.npy").write_text("made from another")
    open_streamed(tmp_path / "test_0_classes.npy", (1, *SHAPE), np.dtype(np.uint8), "of other settings")
    prediction = open_volume(tmp_path / "p.npy", "czyx")
    exclusive = changed(quick(config), decoding={"exclusive_classes": (2, 1)})
    assert judge(roles, {"val": [], "test": [prediction]}, exclusive, tmp_path).figures["vesicle_jaccard"] < 1
    assert set(np.unique(np.load(tmp_path / "test_0_classes.npy"))) == {0, 1}
    labels[1, 0, 0, 0] = 300
    strange = volume_at(tmp_path, "strange", labels)
    with pytest.raises(UserError, match=r"strange_labels\.npy: holds the classes 0 to 300; expected 0 to 2") as caught:
        judge(
            {"val": [], "test": [strange]},
            {"val": [], "test": [open_volume(tmp_path / "p.npy", "czyx")]},
            quick(config),
            tmp_path,
        )
    assert caught.value.exit_code == 1


def test_sections_that_are_pictures_of_their_own(tmp_path: Path) -> None:
    """by_section: an id that runs through all sections is one object in each."""
    config = changed(phantom_like(), decoding={"by_section": True})
    found = judged(tmp_path, config, [true_labels(0)], [true_labels(1)], 0.1).figures
    expected = sum(len(np.unique(section)) - 1 for section in true_labels(0)[0])
    assert found["num_true_objects"] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"in_channels": 3}}, "has 1 channels, the network takes 3"),
        ({"decoding": {"label_channel": 2}}, "has 2 channels, expected at least 3"),
        ({"targets": {"label_channels": (0, 4)}}, "has 2 channels, expected at least 5"),
    ],
)
def test_volumes_that_do_not_fit_are_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    volume = volume_at(tmp_path, "test", true_labels(0))
    check_judged(volume, phantom_like())
    with pytest.raises(UserError, match=words) as caught:
        check_judged(volume, changed(phantom_like(), **change))
    assert len(caught.value.problems) == 1


def test_predictions_of_a_role_replace_unfinished_ones_of_other_settings(tmp_path: Path) -> None:
    """A killed evaluation with other settings is no obstacle: the folder is eval's own."""
    config = small_config()
    write_checkpoint(config, tmp_path / "best.pt", 0)
    image = image_at(tmp_path / "image.npy", SHAPE, 0)
    volume = Annotated(image, None, None, (0, 8), VOXEL_SIZE, measure_scale(image, (0, 8)))
    open_streamed(tmp_path / "test_0_prediction.npy", (1, 2, 3, 4), np.dtype(np.uint8), "another")
    with alone():
        found = predict_role(random_model(config, 0), [volume], config, tmp_path / "best.pt", tmp_path, "test")
    assert [one.shape for one in found] == [SHAPE]


def test_pages_hold_all_pictures(tmp_path: Path) -> None:
    found = judged(tmp_path, phantom_like(), [true_labels(0)], [true_labels(1)], 0.2)
    volume = volume_at(tmp_path, "test_0", true_labels(0))
    write_pages(found, [volume], quick(phantom_like()), tmp_path)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"overlay.png", "errors.png", "thresholds.png"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 3
    for words in ("adapted Rand error", "<td>mitochondria: Jaccard", "Splits and merges", "How thresholds were chosen"):
        assert words in page
    assert page.index("95% interval") < page.index("data:image/png"), "the results come first"
    assert "mitochondria jaccard" not in page, "the table of results says it already"
