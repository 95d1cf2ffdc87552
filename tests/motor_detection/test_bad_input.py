"""Everything a user can get wrong ends in one line that names the place and the remedy, and in the right exit code."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common.checkpoint import save_checkpoint
from common.config import as_yaml
from common.errors import BAD_DATA, WRONG_CALL, run_script
from common.volumes.mrc import write_mrc
from motor_detection import convert, eval, predict, train
from motor_detection.patches import PATCH_ARRAYS, read_patch, write_patch
from motor_detection.trainer import begin
from tests.motor_detection.small_runs import (
    NO_PATCHES,
    producers_forked,
    small_config,
    tomogram_label,
    tomogram_voxels,
    write_tomograms,
)

Main = Callable[[list[str]], int]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Seven tomograms, their labels and a config.yaml."""
    write_tomograms(tmp_path, range(7))
    (tmp_path / "config.yaml").write_text(as_yaml(small_config(tmp_path)))
    return tmp_path


def run(main: Main, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and error lines of one script; nothing but errors may be on stderr, and no traceback."""
    with pytest.MonkeyPatch.context() as patch, producers_forked():
        patch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(SystemExit) as left:
            run_script(main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert not any("Traceback" in line for line in lines), lines
    assert isinstance(left.value.code, int)
    return left.value.code, lines


def words_for(place: Path, *changes: str) -> list[str]:
    return ["--preset", "kaggle", "--config", str(place / "config.yaml"), *changes]


def expect(lines: list[str], *parts: str) -> None:
    assert any(line.startswith("error: ") and all(part in line for part in parts) for line in lines), lines


def test_a_missing_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(convert.main, words_for(place, f"data.root={place}/nowhere"), capsys)
    assert code == WRONG_CALL
    expect(lines, f"{place}/nowhere")


def test_an_empty_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    code, lines = run(convert.main, words_for(place, f"data.root={place}/empty"), capsys)
    assert code == BAD_DATA
    expect(lines, f"{place}/empty", ".mrc")


def test_an_empty_slice_folder_goes_wrong_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "tomograms" / "tomo_1")
    (place / "tomograms" / "tomo_1").mkdir()
    code, lines = run(convert.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, "tomo_1")


def test_a_truncated_slice_is_named_and_the_rest_is_converted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = place / "tomograms" / "tomo_1" / "slice_0007.png"
    bad.write_bytes(bad.read_bytes()[:200])
    code, lines = run(convert.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, str(bad))
    assert sorted(p.parent.name for p in (place / "patches").glob("*/complete.json")) == [
        f"tomo_{number}" for number in (0, 2, 3, 4, 5, 6)
    ]


def test_slices_of_different_sizes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    odd = place / "tomograms" / "tomo_2" / "slice_0003.png"
    Image.fromarray(np.zeros((46, 57), np.uint8)).save(odd)
    code, lines = run(convert.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, str(odd), "57")


@pytest.mark.parametrize(
    ("column", "value", "parts"),
    [
        ("coordinates", "[(0.5, 1.5, 0.5)]", ["coordinates", "tomo_1"]),
        ("voxel_spacing", 0.0, ["voxel_spacing", "tomo_1"]),
        ("voxel_spacing", np.nan, ["voxel_spacing", "tomo_1"]),
        ("coordinates", "[(0.5, 0.5", ["coordinates", "tomo_1"]),
        ("z_shape", 35, ["tomo_1", "35"]),
    ],
    ids=["outside the volume", "spacing 0", "spacing NaN", "malformed", "wrong shape"],
)
def test_a_bad_label(
    place: Path, capsys: pytest.CaptureFixture[str], column: str, value: object, parts: list[str]
) -> None:
    table = pd.read_csv(place / "labels.csv").astype({column: object})
    table.loc[table.tomo_id == "tomo_1", column] = value
    table.to_csv(place / "labels.csv", index=False)
    code, lines = run(convert.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, *parts)


def test_duplicated_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(place / "labels.csv")
    pd.concat([table, table[table.tomo_id == "tomo_2"]]).to_csv(place / "labels.csv", index=False)
    code, lines = run(convert.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, "tomo_2", "labels.csv")


def test_an_unknown_tomogram(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "tomograms" / "tomo_3")
    code, lines = run(convert.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, "tomo_3")


def test_several_wrong_words_are_told_at_once_with_the_nearest_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(place, "train.step=5", "model.stride=2.5", "loss.name=dice", "voxel_spacing_angstrom=3")
    code, lines = run(train.main, words, capsys)
    assert code == WRONG_CALL
    expect(lines, "train.step", "train.steps")
    expect(lines, "model.stride", "whole number")
    expect(lines, "loss.name", "weighted_bce")
    expect(lines, "voxel_spacing_angstrom", "data.voxel_spacing_angstrom")


def test_training_before_converting(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(train.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, "data.patches", "convert.py")


def test_a_loss_that_is_not_a_number_names_the_patches(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(convert.main, words_for(place), capsys)[0] == 0
    patches = sorted((place / "patches").glob("tomo_[0123]/*.npz"))
    for path in patches:
        write_patch(path, read_patch(path, tuple(PATCH_ARRAYS)) | {"intensity": np.array([128.0, np.nan], np.float32)})
    code, lines = run(train.main, words_for(place), capsys)
    assert code == BAD_DATA
    expect(lines, "not finite", str(place / "patches"))


def test_no_tomogram_in_the_validation_fold(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(convert.main, words_for(place), capsys)[0] == 0
    code, lines = run(train.main, words_for(place, "data.validation_fold=7"), capsys)
    assert code == WRONG_CALL
    expect(lines, "data.validation_fold", "[0, 1, 2, 3]")


def test_evaluating_before_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(eval.main, words_for(place), capsys)
    assert code == WRONG_CALL
    expect(lines, "--run", "train")


@pytest.fixture
def checkpoint(place: Path) -> Path:
    config = small_config(place)
    save_checkpoint(begin(config, torch.device("cpu")).as_checkpoint(config, NO_PATCHES), place / "best.pt")
    return place / "best.pt"


def predict_words(place: Path, checkpoint: Path, volume: Path, *changes: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--input", str(volume), "--output", str(place / "out"), *changes]


def test_a_volume_without_spacing_asks_for_it(
    place: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "a.mrc"
    write_mrc(path, tomogram_voxels(tomogram_label(1)).astype(np.int16), (1.0, 1.0, 1.0))
    raw = bytearray(path.read_bytes())
    raw[40:52] = bytes(12)  # the cell's lengths
    path.write_bytes(raw)
    code, lines = run(predict.main, predict_words(place, checkpoint, path), capsys)
    assert code == BAD_DATA
    expect(lines, str(path), "data.voxel_spacing_angstrom=")
    code, lines = run(predict.main, predict_words(place, checkpoint, path, "data.voxel_spacing_angstrom=13.1"), capsys)
    assert code == 0, lines


def test_one_bad_tomogram_does_not_stop_the_others(
    place: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = place / "tomograms" / "tomo_1" / "slice_0007.png"
    bad.write_bytes(b"no image")
    words = predict_words(place, checkpoint, place / "tomograms", "data.voxel_spacing_angstrom=13.1")
    code, lines = run(predict.main, words, capsys)
    assert code == BAD_DATA
    expect(lines, str(bad))
    assert set(pd.read_csv(place / "out" / "picks.csv").tomo_id) == {f"tomo_{number}" for number in (0, 2, 3, 4, 5, 6)}


def test_a_checkpoint_of_another_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weights": {"a": torch.zeros(1)}}, place / "other.pt")
    words = predict_words(place, place / "other.pt", place / "tomograms")
    code, lines = run(predict.main, words, capsys)
    assert code == BAD_DATA
    expect(lines, "other.pt", "motor_detection")


def test_a_truncated_checkpoint(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    code, lines = run(predict.main, predict_words(place, checkpoint, place / "tomograms"), capsys)
    assert code == BAD_DATA
    expect(lines, "best.pt")


def test_no_input_and_bad_threshold(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(predict.main, predict_words(place, checkpoint, place / "nothing"), capsys)
    assert code == WRONG_CALL
    expect(lines, "--input", "nothing")
    words = [*predict_words(place, checkpoint, place / "tomograms"), "--threshold", "7"]
    code, lines = run(predict.main, words, capsys)
    assert code == WRONG_CALL
    expect(lines, "--threshold")
