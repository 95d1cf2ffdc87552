"""Where a config's volumes and runs lie, and which constants make another run."""

import dataclasses
from pathlib import Path

import pytest

from common.config import fingerprint
from em_segmentation import places
from em_segmentation.config import BASE, Config
from em_segmentation.places import SHAPING, resolve, run_folder, training_identity
from tests.em_segmentation.small_runs import changed

HARMLESS = (
    "system.num_gpus=0", "system.num_cpus=3", "data.num_workers=0", "data.persistent_workers=false",
    "data.use_cache=true", "data.voxel_size_nm=[9,9,9]", "data.test_image=a.npy", "data.test_label=a.npy",
    "data.test_mask=a.npy", "data.test_sections=[0,3]", "checkpoint.every_n_steps=7", "checkpoint.save_last=false",
    "logging.log_every_n_steps=3", "logging.pictures=false", "inference.overlap=0", "decoding.threshold=1",
    "evaluation.seed=4", "run.root=elsewhere", "run.preset=other",
)  # fmt: skip
SHAPES_WEIGHTS = (
    "system.seed=1", "system.deterministic=false", "model.dropout=0.1", "model.start_from=a.pt", "data.train_sections=[0,3]",
    "data.patch_size=[16,16,16]", "data.batch_size=3", "data.min_foreground=0.1", "data.val_patches=3",
    "data.augmentation=false", "targets.boundary_thickness=2", "augmentation.noise=0", "optimizer.lr=0.5",
    "scheduler.name=constant", "training.max_epochs=3", "training.precision=bf16-mixed", "training.ema_decay=0",
    "checkpoint.save_top_k=2", "checkpoint.monitor=val_dice", "early_stopping.patience=4", "phantom.seed=1",
)  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_no_weight_is_the_same_run(change: str) -> None:
    assert training_identity(changed(BASE, *together(change))) == training_identity(BASE)


def together(change: str) -> tuple[str, ...]:
    """A constant with those it needs beside it."""
    needs = {"data.test_label=a.npy": "data.test_image=a.npy", "data.test_mask=a.npy": "data.test_image=a.npy"}
    return (change, needs[change]) if change in needs else (change,)


@pytest.mark.parametrize("change", SHAPES_WEIGHTS)
def test_what_shapes_the_weights_is_another_run_in_another_folder(change: str) -> None:
    other = changed(BASE, change)
    assert training_identity(other) != training_identity(BASE)
    assert run_folder(other).name != run_folder(BASE).name and run_folder(other).name.startswith("base-")


def test_every_section_is_known_to_shape_the_weights_or_not() -> None:
    sections = {field.name for field in dataclasses.fields(Config)}
    assert sections - set(SHAPING) == {"logging", "inference", "decoding", "evaluation", "run"}


def test_a_name_is_a_folder_under_the_root() -> None:
    assert run_folder(changed(BASE, "run.root=a/b", "run.name=lab-1")) == Path("a/b/lab-1")


def test_files_are_taken_as_given() -> None:
    config = changed(BASE, "data.train_image=nowhere.npy", "data.train_label=nowhere.npy")
    assert resolve(config) is config


def test_the_phantom_lies_beside_its_root_and_its_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def written(settings: object, folder: Path, workers: int) -> dict[str, list[Path]]:
        asked.append((settings, folder, workers))
        return {role: [folder / f"{role}_0"] for role in ("train", "validation", "test")}

    monkeypatch.setattr(places, "write_phantom", written)
    config = changed(BASE, "data.source=phantom", f"data.root={tmp_path}/em", "data.num_workers=3")
    found = resolve(config).data
    folder = tmp_path / f"em-{fingerprint(config.phantom)}"
    assert asked == [(config.phantom, folder, places.PRODUCERS)]
    assert found.train_image == (str(folder / "train_0/image.npy"),)
    assert found.val_label == (str(folder / "validation_0/labels.npy"),)
    assert found.test_label == (str(folder / "test_0/labels.npy"),)
    assert found.voxel_size_nm == config.phantom.voxel_size_nm
    assert training_identity(config) == training_identity(changed(config, "data.num_workers=0"))
