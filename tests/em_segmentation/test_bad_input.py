"""Bad input, the way a user meets it: train.py's own main, its exit code, and one line that says what and where."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import load_checkpoint, save_checkpoint
from common.config import as_yaml
from common.errors import BAD_DATA, WRONG_CALL
from em_segmentation import train, trainer
from em_segmentation.model_defs.registry import KIND
from tests.common_runs import said
from tests.em_segmentation.small_runs import changed, small_config, train_alone, write_volumes

BAD_YAML = "model: {architecture: [}"


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes and a config.yaml for a run of one step; never written to by a test."""
    folder = tmp_path_factory.mktemp("bad_input")
    write_volumes(folder)
    config = changed(small_config(folder), "training.max_epochs=1", "training.steps_per_epoch=1")
    (folder / "config.yaml").write_text(as_yaml(config))
    return folder


def problems(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, *words: str) -> list[str]:
    call = ["--preset", "base", "--config", str(volumes / "config.yaml"), f"run.root={tmp_path}/runs", *words]
    found, _, lines = said(train.main, call, capsys)
    assert found == code and lines, lines
    return lines


def expect(lines: list[str], *parts: str) -> None:
    assert len(lines) == 1 and all(part in lines[0] for part in parts), lines


def test_wrong_words_are_told_all_at_once_with_the_nearest_name(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (
        "training.max_epoch=5",
        "data.batch_size=2.5",
        "optimizer.name=Adam",
        "patch_size=[1,1,1]",
        "model.dropout=2",
    )
    lines = problems(volumes, tmp_path, capsys, WRONG_CALL, *wrong[:4])
    assert len(lines) == 4
    for parts in (("training.max_epoch", "training.max_epochs"), ("data.batch_size", "whole number"),
                  ("optimizer.name", "AdamW"), ("patch_size", "data.patch_size")):  # fmt: skip
        assert any(all(part in line for part in parts) for line in lines), lines
    expect(problems(volumes, tmp_path, capsys, WRONG_CALL, wrong[4]), "model.dropout", "0 to 0.99")


def test_a_yaml_that_is_none_is_told(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(BAD_YAML)
    for name in ("bad.yaml", "none.yaml"):
        lines = problems(volumes, tmp_path, capsys, WRONG_CALL, "--config", str(tmp_path / name))
        expect(lines, "--config", name)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("data.train_image={0}/nowhere.npy", ("data.train_label", "expected one per image, got 2 for 1")),
        ("data.val_image={0}/nowhere.npy", ("{0}/nowhere.npy", "no such file")),
        ("data.val_image={0}/no_*.npy", ("data.val_image", "matches nothing")),
        ("data.val_image={0}/config.yaml", ("config.yaml", "unknown kind of volume")),
        ("data.val_sections=[0,99]", ("data.val_sections", "13 sections")),
        ("data.voxel_size_nm=null", ("data.voxel_size_nm", "train_0_image.npy")),
        ("data.patch_size=[64,16,16]", ("data.patch_size", "train_0_image.npy", "[14, 26, 38]")),
        ("data.patch_size=[8,16,24]", ("augmentation.turn", "patches as high as wide")),
        ("data.image_axes=zyq", ("zyq", "no order of axes")),
        ("model.architecture=resnet", ("model.architecture", "expected one of")),
        ("model.start_from={0}/none.pt", ("none.pt", "no such checkpoint")),
        ("checkpoint.monitor=val_acc", ("checkpoint.monitor", "val_loss, val_dice")),
        ("training.precision=16-mixed", ("training.precision", "GPUs only")),
        ("targets.label_channels=[0,3]", ("targets.label_channels", "at least 4")),
        ("data.val_sections=[0,3]", ("data.patch_size", "val_0_image.npy", "[3, 22, 34]")),
    ],
)
def test_a_config_that_does_not_fit_its_volumes(
    volumes: Path, tmp_path: Path, change: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(volumes)
    code = BAD_DATA if "start_from" in change else WRONG_CALL
    lines = problems(volumes, tmp_path, capsys, code, change.replace("{0}", place))
    expect(lines, *(part.replace("{0}", place) for part in parts))
    assert not (tmp_path / "runs" / "run").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("decoding.smoothing=[8,8,8]", ("decoding.smoothing", "overflows 32 bits")),
        ("decoding.method=mutex", ("targets.affinity_offsets", "mutex needs offsets of several voxels")),
        ("targets.affinity_offsets=[[0,1,0],[0,0,1]]", ("targets.affinity_offsets", "direct neighbours along z")),
        (
            "inference.tta=all targets.affinity_offsets=[[1,0,0],[0,1,0],[0,0,1],[0,0,3]]",
            ("inference.tta", "[0, 0, 3]"),
        ),
    ],
)
def test_what_only_prediction_would_meet_is_told_before_training(
    volumes: Path, tmp_path: Path, change: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = problems(volumes, tmp_path, capsys, WRONG_CALL, "decoding.target=affinity", *change.split())
    expect(lines, *parts)


def test_one_volume_in_two_roles_is_told(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"data.val_{kind}={volumes}/train_1_{file}.npy" for kind, file in (("image", "image"), ("label", "labels"))
    )
    expect(
        problems(volumes, tmp_path, capsys, WRONG_CALL, *words), "data.val_image", "train_1_image.npy", "as train_image"
    )


def test_negative_ids_are_told_with_their_file(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.load(volumes / "val_0_labels.npy").astype(np.int32)
    labels[2, 3, 4] = -1
    np.save(tmp_path / "negative.npy", labels)
    lines = problems(volumes, tmp_path, capsys, BAD_DATA, f"data.val_label={tmp_path}/negative.npy")
    expect(lines, "negative.npy", "holds the id -1")


def test_truncated_and_foreign_files_are_told(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (volumes / "val_0_image.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("cut.npy", "text.npy", "empty.npy"):
        lines = problems(volumes, tmp_path, capsys, BAD_DATA, f"data.val_image={tmp_path}/{name}")
        expect(lines, name, "truncated or no plain array")


def test_a_truncated_hdf5_file_and_a_wrong_name_inside_are_told(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volumes/raw"] = np.load(volumes / "val_0_image.npy")
        file["volumes/labels"] = np.load(volumes / "val_0_labels.npy")
    lines = problems(volumes, tmp_path, capsys, WRONG_CALL, f"data.val_image={tmp_path}/a.h5:volumes/row")
    expect(lines, "no dataset 'volumes/row'", "did you mean a.h5:volumes/raw")
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    lines = problems(volumes, tmp_path, capsys, BAD_DATA, f"data.val_image={tmp_path}/cut.h5:volumes/raw")
    expect(lines, "cut.h5", "copy or export it again")


def test_a_tiff_with_pages_of_different_sizes_is_told(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile = pytest.importorskip("tifffile")
    image = np.load(volumes / "val_0_image.npy")
    with tifffile.TiffWriter(tmp_path / "odd.tif") as file:
        for z, section in enumerate(image):
            file.write(section[:, : 34 if z != 5 else 30], contiguous=False)
    lines = problems(volumes, tmp_path, capsys, BAD_DATA, f"data.val_image={tmp_path}/odd.tif")
    expect(lines, "odd.tif")


def test_an_archive_is_told_to_be_unpacked(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "volumes.tar.gz", "w:gz") as file:
        file.add(volumes / "val_0_image.npy", "a.npy")
    lines = problems(volumes, tmp_path, capsys, WRONG_CALL, f"data.val_image={tmp_path}/volumes.tar.gz")
    expect(lines, "unpack it first")


def test_a_class_that_the_config_does_not_know_is_told(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("targets.names=[semantic]", "targets.weights=[1]", "targets.label_channels=[0]",
             "targets.semantic_classes=2", "model.loss_functions=[CrossEntropyLoss]", "model.loss_weights=[1]")  # fmt: skip
    expect(problems(volumes, tmp_path, capsys, BAD_DATA, *words), "found class", "targets.semantic_classes=2")


def test_known_defect_8_full_memory_is_one_line(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"), MemoryError()):

        def full(*given: object, raised: BaseException = error) -> None:
            raise raised

        monkeypatch.setattr(trainer, "take_step", full)
        expect(problems(volumes, tmp_path, capsys, BAD_DATA), "out of memory", "patches")


@pytest.mark.parametrize(
    "change", ["data.val_label=/nowhere.npy", "model.start_from=/nowhere.pt", "model.architecture=none",
               "model.out_channels=9", "checkpoint.monitor=none", "data.patch_size=[99,99,99]"],
)  # fmt: skip
def test_fresh_deletes_nothing_before_everything_else_is_right(
    volumes: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(small_config(volumes), "training.max_epochs=1", "training.steps_per_epoch=1")
    run = tmp_path / "runs" / "run"
    train_alone(config, run)
    (run / "config.yaml").write_text(as_yaml(config))
    before = (run / "checkpoints/best.pt").read_bytes()
    capsys.readouterr()
    assert (
        len(problems(volumes, tmp_path, capsys, BAD_DATA if "start" in change else WRONG_CALL, change, "--fresh")) == 1
    )
    assert (run / "checkpoints/best.pt").read_bytes() == before


def test_a_last_checkpoint_that_was_cut_or_is_anothers_is_told(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(small_config(volumes), "training.max_epochs=1", "training.steps_per_epoch=1")
    last = tmp_path / "runs/run/checkpoints/last.pt"
    train_alone(config, tmp_path / "runs/run")
    capsys.readouterr()
    whole, state = last.read_bytes(), load_checkpoint(last, KIND, {})
    last.write_bytes(whole[: len(whole) // 3])
    expect(problems(volumes, tmp_path, capsys, BAD_DATA), "last.pt", "not a readable checkpoint")
    save_checkpoint(state | {"kind": "motor_detection"}, last)
    expect(problems(volumes, tmp_path, capsys, BAD_DATA), "last.pt", "found motor_detection")


def test_a_run_of_another_config_is_not_continued_in_its_folder(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--preset", "base", "--config", str(volumes / "config.yaml"), f"run.root={tmp_path}/runs"]
    assert said(train.main, call, capsys)[0] == 0
    expect(problems(volumes, tmp_path, capsys, WRONG_CALL, "system.seed=5"), "run.name", "seed: 5", "--fresh")


def test_masks_without_anything_annotated_are_told(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else nothing is learnt, or the first epoch is perfect."""
    for role, names in (("train", ("train_0", "train_1")), ("val", ("val_0",))):
        for name in names:
            np.save(tmp_path / f"{name}_mask.npy", np.zeros_like(np.load(volumes / f"{name}_labels.npy"), np.uint8))
        masks = ",".join(str(tmp_path / f"{name}_mask.npy") for name in names)
        lines = problems(volumes, tmp_path, capsys, BAD_DATA, f"data.{role}_mask=[{masks}]", f"run.name={role}")
        expect(lines, f"data.{role}_mask:", "annotated")


def test_tiles_and_offsets_that_cannot_be_are_told_before_training(
    volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("model.norm=group", "inference.tiling=exact", "model.filters=[8,8]")
    lines = problems(volumes, tmp_path, capsys, WRONG_CALL, *words)
    expect(lines, "inference.tiling: rsunet with model.norm=group", "blended")
    far = "targets.affinity_offsets=[[1,0,0],[0,1,0],[0,0,1],[8,0,0]]"
    expect(problems(volumes, tmp_path, capsys, WRONG_CALL, far), "[8, 0, 0] leaves every patch")
